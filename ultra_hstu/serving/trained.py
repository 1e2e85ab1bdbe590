"""What serving reads of a trained run: its parameters, and the data that it was trained on."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ultra_hstu.checkpoint import Checkpoints, abstract
from ultra_hstu.data.interactions import Interactions, load_interactions
from ultra_hstu.retrieval.task import RetrievalTask
from ultra_hstu.step import Params, Steps
from ultra_hstu.workdir import Workdir


def load_params(folder: Workdir, recipe: Steps) -> tuple[int, Params]:
    """(step, parameters) of the best checkpoint of a run, or of the newest where none was evaluated.

    Raises:
      ValueError: if the run has no checkpoint, none that can be read, or parameters that are not finite.
    """
    checkpoints = Checkpoints(folder.checkpoints, read_only=True)
    restored = checkpoints.restore(abstract(jax.eval_shape(lambda: recipe.init(0))), best=True)
    if restored is None:
        raise ValueError(
            f"{folder.path} has no checkpoint yet: train it first, with experiments.train --workdir={folder.path}"
        )
    step, params = restored[0], restored[1].params
    if broken := [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if not _finite(leaf)
    ]:
        raise ValueError(
            f"the checkpoint of step {step} in {folder.path} holds NaN or infinity in {broken[0]}: train again"
        )
    return step, params


class RunData:
    """The data that a run was trained on, read when it is first asked for."""

    def __init__(self, workdir: str, raw_dir: str | None = None):
        self.folder = Workdir(workdir)
        self.config = self.folder.read_for_one_device(raw_dir)

    @functools.cached_property
    def interactions(self) -> Interactions:
        """Raises ValueError where the data is not what the run was trained on, or cannot be read."""
        interactions = load_interactions(self.config.data)
        self.folder.check_data(interactions)
        return interactions

    @functools.cached_property
    def count_I(self) -> Float[np.ndarray, " I1"]:
        """How often each item occurs in the training data."""
        return np.ceil(RetrievalTask.of(self.config, self.interactions).popularity())


def _finite(leaf: Any) -> bool:
    return not jnp.issubdtype(leaf.dtype, jnp.inexact) or bool(jnp.isfinite(leaf).all())
