"""Where a run starts that another one has begun: its parameters, on another vocabulary."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree
from rich.console import Console

from ultra_hstu import progress
from ultra_hstu.checkpoint import abstract, load_state
from ultra_hstu.config import Config
from ultra_hstu.fields import difference
from ultra_hstu.model_config import MASKS
from ultra_hstu.step import Params, TrainState
from ultra_hstu.task import Task
from ultra_hstu.vocabulary import NEW, Index, Vocabulary, carried
from ultra_hstu.workdir import Workdir

# Fields of a model that another start may change: they say how it is computed, or trained.
FREE_MODEL = (
    "item_std",
    "uvqk_std",
    "input_dropout",
    "linear_dropout",
    "dtype",
    "implementation",
    *MASKS,
    "projection",
    "projection_gradient",
    "layer_implementation",
    "remat",
    "chunk_rows",
)
FREE_MOL = ("item_dropout", "gate_dropout", "balance", "user_dropout", "user_penalty")
FREE_RANK = ("validation_fraction", "test_fraction", "targets", "train_targets", "requests")

log = logging.getLogger(__name__)


def parameters_of(
    source: Path | str, task: Task, console: Console
) -> tuple[Params, dict[str, Any]]:
    """The parameters of a run on a task's vocabulary, and where they are from.

    Entries of what both have are kept; those of what is new start from their mean; those of what is
    not here any more are left out, and a warning names some. The terminal says how many.

    Raises:
      ValueError: no run, one without a checkpoint, or another model, with every field that differs.
    """
    folder = Workdir(source)
    folder = folder.seeds.get(task.config.train.seed, folder).newest()
    if not folder.config.exists():
        missing = "is not there" if not folder.path.exists() else "holds no run"
        raise ValueError(
            f"train.init_from={str(source)!r}: the folder {missing}. Name one that "
            "experiments.train has trained, or leave it out to start from a seed"
        )
    stored = folder.read_config()
    if lines := difference(_structure(stored), _structure(task.config)):
        listed = "\n  ".join(lines)
        raise ValueError(
            f"train.init_from={str(source)!r} is another model, whose parameters do not fit "
            f"(there -> here):\n  {listed}\nSet these fields as they are there, or leave "
            "train.init_from out."
        )
    old, new = Vocabulary.load(folder), task.vocabulary
    try:
        tables = new.tables(old)
    except ValueError as error:
        raise ValueError(f"train.init_from={str(source)!r}: {error}") from None
    lost = new.lost(old)
    if len(lost) == old.catalog.num_items:
        raise ValueError(
            f"train.init_from={str(source)!r} knows none of the {new.catalog.num_items} items "
            "here: it was trained on others, and nothing of its item table could be used"
        )
    # Checkpoints are read whole, with the state of the optimizer that was theirs.
    there = task.with_config(dataclasses.replace(task.config, optim=stored.optim))
    step, state, _ = load_state(folder, like_of(there, old))
    params = carried(state.params, like_of(task).params, tables, item_std=task.item_std)
    source_of = {name.removeprefix("embedding."): "from their mean" for name in tables}
    if task.config.features.items:
        source_of["item_table"] = "from their features"
    elif task.item_std is not None:
        source_of["item_table"] = "drawn"
    counts = {name.removeprefix("embedding."): _counts(index) for name, index in tables.items()}
    said = "; ".join(
        f"{name}: {count['kept']:,} entries kept, {count['new']:,} new {source_of[name]}"
        for name, count in counts.items()
    )
    progress.line(console, "start", f"from {stored.name}, step {step}: {said}")
    if lost:
        log.warning(
            "%d of the %d items that %s knows are not here any more, and their entries are left "
            "out: %s",
            len(lost),
            old.catalog.num_items,
            folder.path,
            ", ".join(map(repr, lost[:5])) + ", ..." * (len(lost) > 5),
        )
    origin = {"run": str(source), "name": stored.name, "step": step, "tables": counts}
    return params, origin | {"lost_items": len(lost)}


def like_of(task: Task, vocabulary: Vocabulary | None = None) -> TrainState:
    """Shapes, dtypes and shardings of a task's state, or of that on another vocabulary."""
    recipe = task.recipe if vocabulary is None else task.sized(vocabulary)
    shapes = jax.eval_shape(lambda: recipe.init(0))
    if recipe.shardings is None:
        return abstract(shapes)

    def place(where: jax.sharding.Sharding, tree: PyTree) -> PyTree:
        """A parameter of a state is a node there, and has one sharding."""
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree
        )

    return jax.tree.map(place, recipe.shardings, shapes)


def _counts(index: Index) -> dict[str, int]:
    kept, new = int((index >= 0).sum()), int((index == NEW).sum())
    return {"kept": kept, "new": new}


def _structure(config: Config) -> dict[str, Any]:
    """The fields that say what parameters there are, and what they mean."""
    model, rank = (dataclasses.asdict(section) for section in (config.model, config.rank))
    for section, free in ((model, FREE_MODEL), (rank, FREE_RANK)):
        for name in free:
            section.pop(name)
    if config.rank.tasks and config.model.relative_bias:  # with an entry for their distances, too
        rank["targets"] = config.rank.targets
    for channel in model["channels"].values():
        for name in MASKS:
            channel.pop(name)
    features = dataclasses.asdict(config.features)
    features.pop("id_dropout")
    mixture: dict[str, Any] = {}
    if config.loss.similarity == "mol":
        mixture = dataclasses.asdict(config.mol)
        for name in FREE_MOL:
            mixture.pop(name)
    return {
        "model": model,
        "rank": rank,
        "features": features,
        "data": {"max_history": config.data.max_history},
        "loss": {"similarity": config.loss.similarity},
        "mol": mixture,
    }
