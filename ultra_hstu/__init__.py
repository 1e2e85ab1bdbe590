"""Generative recommenders in JAX: HSTU and ULTRA-HSTU. docs/library.md shows how to use them.

A name is imported when it is first used, so that importing the package takes no time.
"""

import ast
import functools
import importlib
from pathlib import Path
from typing import TYPE_CHECKING

try:
    from kernels import DISTRIBUTION as _  # noqa: F401
except ImportError as _error:
    from importlib import metadata, util

    _spec = util.find_spec("kernels")
    _owners = sorted({*metadata.packages_distributions().get("kernels", ())} - {"ultra-hstu"})
    raise ImportError(
        "the package `kernels` of ultra-hstu is not found; there is that of "
        f"{', '.join(_owners) or 'nobody that is installed'}, {_spec and _spec.origin}: "
        "install ultra-hstu in an environment without it"
    ) from _error

if TYPE_CHECKING:  # and by `__getattr__`, which reads it
    from kernels.hstu_attention import RelativeBias, hstu_attention, make_plan
    from kernels.mask import AttentionMask
    from ultra_hstu.config import (
        Config,
        DataConfig,
        LossConfig,
        ModelConfig,
        OptimConfig,
        ParallelConfig,
        RankConfig,
        TrainConfig,
    )
    from ultra_hstu.data.interactions import Interactions, load_interactions
    from ultra_hstu.library import fit, respond
    from ultra_hstu.nn.hstu import HSTU
    from ultra_hstu.nn.sasrec import SASRec
    from ultra_hstu.parallel.context_attention import context_parallel_attention
    from ultra_hstu.parallel.layout import Layout
    from ultra_hstu.parallel.mesh import make_mesh
    from ultra_hstu.parallel.shards import Shards
    from ultra_hstu.run import Interrupted
    from ultra_hstu.sequences import Sequences
    from ultra_hstu.serving.recommend import RecommendationModel
    from ultra_hstu.serving.service import open_service

__all__ = [
    "HSTU",
    "AttentionMask",
    "Config",
    "DataConfig",
    "Interactions",
    "Interrupted",
    "Layout",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "RankConfig",
    "RecommendationModel",
    "RelativeBias",
    "SASRec",
    "Sequences",
    "Shards",
    "TrainConfig",
    "context_parallel_attention",
    "fit",
    "hstu_attention",
    "load_interactions",
    "make_mesh",
    "make_plan",
    "open_service",
    "respond",
]

if not TYPE_CHECKING:  # a type checker would take any name for one of these

    @functools.cache
    def _modules() -> dict[str, str]:
        """The module of each name, from the imports of this file."""
        nodes = ast.walk(ast.parse(Path(__file__).read_text()))
        imports = (node for node in nodes if isinstance(node, ast.ImportFrom))
        return {name.name: node.module for node in imports for name in node.names}

    def __getattr__(name: str):
        if name not in __all__:
            raise AttributeError(f"ultra_hstu has no {name!r}; it has {', '.join(__all__)}")
        return getattr(importlib.import_module(_modules()[name]), name)

    def __dir__() -> list[str]:
        return [*globals(), *__all__]
