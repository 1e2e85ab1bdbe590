"""Writes the cached scoring of a ranker as one file that runs without this code: `jax.export` programs, parameters, configuration and item map.

The file is a zip: `metadata.json`, `encode.bin` and `score.bin` (serialised programs at one capacity class), `params.npz`, `items.npz`, and `artefact.py`,
which reads all of it with JAX and NumPy alone. What JAX serialises is readable for at least six months of its versions.
"""

import dataclasses
import io
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
from flax import nnx

from ultra_hstu.config import Config
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.nn.key_values import KINDS
from ultra_hstu.ranking.batch import Form
from ultra_hstu.ranking.form import Sizes
from ultra_hstu.ranking.model import Ranker
from ultra_hstu.serving import artefact, exported
from ultra_hstu.serving.frozen import Channel, Programs
from ultra_hstu.serving.inputs import Candidates, Events, History
from ultra_hstu.serving.ranking import MICRO_BATCH
from ultra_hstu.serving.tokens import PaddedHistory
from ultra_hstu.serving.vocabulary import Vocabulary


def save(
    path: str | os.PathLike,
    model: Ranker,
    *,
    config: Config,
    catalog: Catalog,
    vocabulary: Vocabulary | None = None,
    candidates: int,
    users: int = 1,
    events: int | None = None,
    micro_batch: int = MICRO_BATCH,
    kind: Any = "same",
    platforms: Sequence[str] | None = None,
) -> None:
    """Writes `path`, whole or not at all. Attention is computed by `xla`, whatever the model names: its kernels are no part of what JAX can keep.

    Args:
      config, catalog: of the run.
      vocabulary: of the run, too, if `experiments.serve` shall serve the file.
      candidates, users, events: the capacity: of all users together, `events` for each channel; None: users x the longest history.
      micro_batch, kind: as in `score` and `encode_history`.
      platforms: "cpu", "cuda", ...; None: that of this process.

    Raises:
      ValueError: a capacity or micro_batch below 1, a catalogue of another number of items, a kind that is none.
    """
    for name, value in {
        "candidates": candidates,
        "users": users,
        "events": events,
        "micro_batch": micro_batch,
    }.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if kind not in KINDS:
        raise ValueError(f"{kind=} must be one of {', '.join(KINDS)}")
    if catalog.num_items != model.sizes.items:
        raise ValueError(
            f"the catalogue has {catalog.num_items} items, the model {model.sizes.items}: give the catalogue of this run"
        )
    form, sizes = model.form, model.sizes
    step = min(micro_batch, candidates)
    capacity: dict[str, Any] = {
        "users": users,
        "candidates": -(-candidates // step) * step,
        "events": {name: events or users * longest for name, longest in form.max_history},
    }
    programs, params = _portable(model)
    leaves, tree = jax.tree.flatten(params)

    def channels(params: Any, request: dict[str, Any]) -> dict[str, Channel]:
        history = History(
            {name: Events(**events) for name, events in request["channels"].items()},
            request["context_BC"],
            request["now_B"],
        )
        padded = PaddedHistory(history, request["used_B"])
        rows = {
            name: users * form.contextual + form.per_event * count
            for name, count in capacity["events"].items()
        }
        return {
            name: programs.encode(params, padded, None, name=name, rows=rows[name], kind=kind)
            for name in rows
        }

    def encode(params: list[Any], request: dict[str, Any]) -> list[Any]:
        return jax.tree.leaves(channels(jax.tree.unflatten(tree, params), request))

    def score(params: list[Any], cache: list[Any], request: dict[str, Any]) -> jax.Array:
        state, encoded = jax.tree.unflatten(tree, params), jax.tree.unflatten(cache_tree, cache)
        return programs.score(
            state, encoded, Candidates(**request), None, step=step, implementation="xla"
        )

    history, asked = _inputs(capacity, form, sizes)
    cache, cache_tree = jax.tree.flatten(jax.eval_shape(channels, params, history))
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]

    def serialized(function: jax.stages.Wrapped, *arguments: Any) -> bytes:
        return bytes(jax.export.export(function, platforms=platforms)(*arguments).serialize())

    metadata = {
        "format": artefact.FORMAT,
        "version": artefact.VERSION,
        "jax": jax.__version__,
        "platforms": list(platforms or [artefact._platform()]),
        "capacity": capacity,
        "micro_batch": step,
        "kind": kind,
        "channels": dict(form.max_history),
        "tasks": config.rank.tasks,
        "signals": config.rank.signals,
        "features": config.rank.features,
        "contextual": config.rank.contextual,
        "sizes": {
            name: getattr(sizes, name) for name in ("items", "signals", "features", "contextual")
        },
        "config": dataclasses.asdict(config),
        "online": None if vocabulary is None else exported.about(model, vocabulary),
    }
    parts = {
        "metadata.json": json.dumps(metadata, indent=1).encode(),
        "artefact.py": Path(artefact.__file__).read_bytes(),
        "items.npz": _npz(
            {"raw_ids": catalog.raw_ids}
            | ({} if catalog.titles is None else {"titles": np.array(catalog.titles)})
        ),
        "params.npz": _npz({str(i): np.asarray(leaf) for i, leaf in enumerate(leaves)}),
        "encode.bin": serialized(jax.jit(encode), shapes, history),
        "score.bin": serialized(jax.jit(score), shapes, cache, asked),
    }
    part = f"{os.fspath(path)}.part"
    with zipfile.ZipFile(part, "w") as file:
        for name, content in parts.items():
            file.writestr(name, content)
    os.replace(part, path)


def _inputs(
    capacity: dict[str, Any], form: Form, sizes: Sizes
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shapes of a history and of candidates, as `artefact.Scorer` hands them over."""

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, np.int32)

    users, candidates = capacity["users"], capacity["candidates"]
    channels = {
        name: {
            "item_E": ints(count),
            "time_E": ints(count),
            "signal_ES": ints(count, len(sizes.signals)),
            "feature_EF": ints(count, len(sizes.features)),
            "offsets": ints(users + 1),
        }
        for name, count in capacity["events"].items()
    }
    history = {
        "channels": channels,
        "context_BC": ints(users, form.contextual),
        "now_B": ints(users),
        "used_B": ints(users),
    }
    columns = {name: ints(candidates) for name in ("item_C", "time_C", "slot_C")}
    return history, columns | {
        "feature_CF": ints(candidates, len(sizes.features)),
        "offsets": ints(users + 1),
    }


def _portable(model: Ranker) -> tuple[Programs, Any]:
    """The functions of the model with attention in plain XLA, and its parameters."""
    copy: Ranker = nnx.merge(*nnx.split(model))
    for encoder in copy.encoders.values():
        encoder.implementation = "xla"
    graphdef, params = nnx.split(copy)
    return Programs(graphdef), params


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()
