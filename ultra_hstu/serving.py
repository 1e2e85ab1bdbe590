"""Recommendations from a trained run: a history in, the best unseen items out."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from ultra_hstu.checkpoint import Checkpoints, abstract
from ultra_hstu.config import Config
from ultra_hstu.data import signals
from ultra_hstu.data.batching import Events, gather_batch
from ultra_hstu.data.interactions import Catalog
from ultra_hstu.metrics import best_items
from ultra_hstu.nn.norms import l2_normalize
from ultra_hstu.quantization import packed, unpacked
from ultra_hstu.recipe import Params, Recipe, Steps
from ultra_hstu.workdir import Workdir


def load_params(folder: Workdir, recipe: Steps) -> tuple[int, Params]:
    """(step, parameters) of the best checkpoint of a run, or of the newest where none was evaluated.

    Raises:
      ValueError: if the run has no checkpoint, or none that can be read.
    """
    checkpoints = Checkpoints(folder.checkpoints, read_only=True)
    restored = checkpoints.restore(abstract(jax.eval_shape(lambda: recipe.init(0))), best=True)
    if restored is None:
        raise ValueError(f"{folder.path} has no checkpoint yet: train it first, with experiments.train --workdir={folder.path}")
    return restored[0], restored[1].params


@dataclasses.dataclass(frozen=True)
class Recommendation:
    item: int | str  # raw id, as in the source
    title: str | None
    score: float


class RecommendationModel:
    """A trained run, ready to recommend. Compiled once: every history is one slice of `config.data.max_history` rows or fewer."""

    def __init__(self, workdir: str, *, tables: str = "float32"):
        """
        Args:
          tables: how the item table goes to the device and stays there: one of `quantization.KINDS`.
        """
        folder = Workdir(workdir)
        self.config: Config = folder.read_config().on_one_device()
        if self.config.rank.tasks:
            raise ValueError(
                f"{workdir} is a ranking run (rank.tasks={self.config.rank.tasks}): it predicts what a user does with given items. "
                "Recommendations over the catalogue come from a retrieval run"
            )
        self.catalog = Catalog.load(folder.catalog)
        self.recipe = Recipe(self.config, self.catalog.num_items)
        self.params = jax.device_put(packed(load_params(folder, self.recipe)[1], tables))
        self._best = jax.jit(functools.partial(_best, self.recipe, self.config.data.max_history), static_argnames="k")

    def recommend(
        self,
        items: ArrayLike,
        times: ArrayLike | None = None,
        *,
        actions: Mapping[str, ArrayLike] | None = None,
        now: int | None = None,
        k: int = 10,
    ) -> list[Recommendation]:
        """The k unseen items with the highest scores.

        Args:
          items: dense ids (`catalog.encode` makes them), oldest first; the newest `max_history` count.
          times: seconds, one an event; without them all events count as simultaneous.
          actions: what the user did with each item, by the names of the source ("rating"), for a run whose tokens hold signals; without them
            such a run sees items alone.
          now: time of the request in the same seconds; None takes the next event to follow the last at once.

        Raises:
          ValueError: for an empty history, a wrong number of times or actions, actions that the run's signals cannot be made from, or k outside 1..items.
        """
        num_items = self.catalog.num_items
        item_E = np.asarray(items)
        if item_E.size and not np.issubdtype(item_E.dtype, np.integer):
            raise ValueError(f"items must be dense ids (integers), got {item_E.dtype}: catalog.encode makes them")
        item_E = item_E.astype(np.int32)
        if item_E.size and not (1 <= item_E.min() and item_E.max() <= num_items):
            raise ValueError(f"items must be dense ids in 1..{num_items}, got {item_E.min()}..{item_E.max()}: catalog.encode makes them")
        time_E = np.zeros(len(item_E), np.int64) if times is None else np.asarray(times, np.int64)
        if not len(item_E):
            raise ValueError("the history is empty: give at least one item, or take the most popular items of the training data")
        if not 1 <= k <= num_items:
            raise ValueError(f"k={k} must be in 1..{num_items}, the number of items")
        if len(time_E) != len(item_E):
            raise ValueError(f"{len(item_E)} items but {len(time_E)} times: give one time an item")
        newest = slice(-self.config.data.max_history, None)
        length = len(item_E[newest])
        # Fixed size, so that one compilation serves every history; the slot behind the history carries the time of the request.
        events = Events.from_arrays(
            np.pad(item_E[newest], (0, self.config.data.max_history + 1 - length)),
            np.pad(time_E[newest], (0, self.config.data.max_history + 1 - length), constant_values=time_E[-1] if now is None else now),
        )
        if names := self.config.rank.signals:
            code_ES = np.zeros((len(item_E), len(names)), np.int32)
            if actions is not None:
                columns = {name: np.asarray(values) for name, values in actions.items()}
                if wrong := [name for name, values in columns.items() if len(values) != len(item_E)]:
                    raise ValueError(f"{len(item_E)} items but {len(columns[wrong[0]])} values of {wrong[0]!r}: give one an item")
                code_ES = signals.signals(columns, names, len(item_E))
            padding = ((0, self.config.data.max_history + 1 - length), (0, 0))
            events = dataclasses.replace(events, signal_ES=np.pad(code_ES[newest], padding))
        seen_I = np.zeros(num_items + 1, bool)
        seen_I[item_E] = True
        best_K, score_K = self._best(self.params, events, jnp.int32(length), jnp.asarray(~seen_I), k=k)
        found = np.asarray(best_K)[np.asarray(best_K) > 0]
        raw_ids = self.catalog.decode(found).tolist()
        titles = [None if self.catalog.titles is None else self.catalog.titles[item] for item in found]
        scores = np.asarray(score_K).tolist()
        return [Recommendation(raw, title, score) for raw, title, score in zip(raw_ids, titles, scores, strict=False)]


def _best(
    recipe: Recipe, rows: int, params: Params, events: Events, length: jax.Array, unseen_I: jax.Array, *, k: int
) -> tuple[jax.Array, jax.Array]:
    batch = gather_batch(events, jnp.zeros(1, jnp.int32), length[None], rows=rows)
    model = recipe.model(unpacked(params))
    user_1D = model.encode(batch, rngs=None)[batch.last_row_B]
    normalize = recipe.config.loss.l2_normalize
    user_1D = l2_normalize(user_1D) if normalize else user_1D
    best_1K, score_1K = best_items(user_1D, model.item_table[...], k=k, l2_normalize=normalize, corpus_I=unseen_I)
    return best_1K[0], score_1K[0]
