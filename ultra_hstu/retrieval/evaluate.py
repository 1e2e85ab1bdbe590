"""Full-corpus evaluation: every user's target against every item, but those that `eval` hides."""

import functools
from collections.abc import Hashable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32, PyTree

from kernels import jagged
from ultra_hstu.criteria import RETRIEVAL, Metrics, by_warmth, warmth
from ultra_hstu.data.feed import Loader
from ultra_hstu.data.packing import HostColumns
from ultra_hstu.evaluate import Evaluator
from ultra_hstu.nn.norms import l2_normalize as unit_rows
from ultra_hstu.retrieval.batch import Batch
from ultra_hstu.retrieval.metrics import mean_metrics, ranks
from ultra_hstu.retrieval.mol import ItemPart
from ultra_hstu.retrieval.mol_scores import Answering, Mixtures, item_part
from ultra_hstu.retrieval.recipe import Recipe, there_are

BLOCK_USERS = 1024  # whose events are looked at on the host at one time


class CorpusEvaluator(Evaluator):
    """Ranks the targets of one split with the model, its items normalised as in training.

    In a mesh every device ranks for its part of a batch's users, against the whole table.
    """

    criteria = RETRIEVAL
    recipe: Recipe

    def __init__(
        self,
        recipe: Recipe,
        loader: Loader,
        longest: int,
        count_I: Int[np.ndarray, " I1"] | None = None,
    ):
        """
        Args:
          longest: rows of a history, at most.
          count_I: how many training events each item has; None: not known.
        """
        super().__init__(recipe, loader, jax.ShapeDtypeStruct((loader.batch_users,), jnp.int32))
        self.longest = longest
        self.l2_normalize = recipe.config.loss.l2_normalize
        self.hides = recipe.config.eval.repeats == "hide"
        self.count_I = count_I

    def outputs(self, scored: PyTree, batch: Batch) -> Int[Array, " b"]:
        """Ranks from 1; 2501 where a target is not among the best 2500."""
        model, shards = self.recipe.model(scored), self.recipe.shards
        users_bD, table_ID = model.queries(batch, shards), model.all_items(shards)
        scored_for: Array | Mixtures = users_bD
        table: Array | ItemPart = table_ID
        if model.mixture is not None:
            scored_for = Mixtures(Answering.of(model.mixture, users_bD))
            table = item_part(model.mixture, table_ID)
        elif self.l2_normalize:  # the scores are then those that serving responds with
            scored_for = unit_rows(users_bD)
        # The item after a history's last row is the target of the example.
        target_T, item_T = shards.whole((batch.target_T, batch.item_T))
        target_B = target_T[batch.last_row_B]
        hidden_BN = batch.hidden_BN
        if self.hides and hidden_BN is None:
            hidden_BN = jagged.pad(item_T, batch.offsets, self.longest)
        target_b, hidden_bN = shards.part((target_B, hidden_BN))
        return ranks(
            scored_for,
            table,
            target_b,
            hidden_bN,
            l2_normalize=self.l2_normalize,
            corpus_I=there_are(batch.items_1, table_ID),
        )

    @property
    def static(self) -> Hashable:
        recipe = self.recipe
        return super().static, self.longest, recipe.num_items, recipe.item_features

    @functools.cached_property
    def repeats(self) -> float:
        """Share of the targets that stand in the events whose items `eval.hide` names."""
        found = 0
        for item_E, part in self._blocks():
            spans = zip(part.get("hide_from", part["start"]), part["stop"], strict=True)
            found += sum(item_E[stop] in item_E[first:stop] for first, stop in spans)
        return found / len(self.plan.examples.lengths)

    def _blocks(self) -> Iterator[tuple[Int32[np.ndarray, " E"], HostColumns]]:
        """Items of events, and the columns of some examples in their numbers, block by block."""
        for first in range(0, len(self.plan.examples.lengths), BLOCK_USERS):
            block = slice(first, first + BLOCK_USERS)
            part = {name: column[block] for name, column in self.plan.examples.columns.items()}
            events, (columns,) = self.loader.store.of([part])
            yield events.item_E, columns

    def metrics(self, output_P: Int[np.ndarray, " n"]) -> Metrics:
        """HR and NDCG @ {1, 5, 10, 50, 100, 200} and MRR over all users of the split; `repeats`.

        A target that `repeats` counts is not found, unless `eval.repeats` is "rank". Some come
        again for the users of each part of `WARMTH`, as `hr@10/cold`, with their number,
        `users/cold`.
        """
        found = mean_metrics(output_P) | {"repeats": self.repeats}
        for name, users_U in self.warmth.items():
            of_part: Metrics = {"users": float(users_U.sum())}
            if users_U.any():
                of_part |= mean_metrics(output_P[users_U])
            shown = by_warmth(RETRIEVAL).details
            found |= {f"{one}/{name}": of_part[one] for one in shown if one in of_part}
        return found

    @functools.cached_property
    def warmth(self) -> dict[str, Bool[np.ndarray, " n"]]:
        """Which users each part of WARMTH has; nothing where no counts are known."""
        return {} if self.count_I is None else warmth(self.count_U)

    @functools.cached_property
    def count_U(self) -> Int[np.ndarray, " n"]:
        """How many training events the item of each target has."""
        assert self.count_I is not None
        targets = np.concatenate([item_E[part["stop"]] for item_E, part in self._blocks()])
        return self.count_I[targets][self.plan.place_SB[self.used_SP]]
