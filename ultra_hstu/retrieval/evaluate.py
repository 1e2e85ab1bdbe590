"""Full-corpus evaluation: every user's target against every item, but those that `eval` hides."""

import functools
from collections.abc import Hashable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from kernels import jagged
from ultra_hstu.criteria import RETRIEVAL, Metrics
from ultra_hstu.data.feed import Loader
from ultra_hstu.evaluate import Evaluator
from ultra_hstu.nn.norms import l2_normalize as unit_rows
from ultra_hstu.retrieval.batch import Batch
from ultra_hstu.retrieval.metrics import mean_metrics, ranks
from ultra_hstu.retrieval.recipe import Recipe, there_are


class CorpusEvaluator(Evaluator):
    """Ranks the targets of one split with the model, its items normalised as in training.

    In a mesh every device ranks for its part of a batch's users, against the whole table.
    """

    criteria = RETRIEVAL
    recipe: Recipe

    def __init__(self, recipe: Recipe, loader: Loader, longest: int):
        """
        Args:
          longest: events of a history, at most.
        """
        super().__init__(recipe, loader, jax.ShapeDtypeStruct((loader.batch_users,), jnp.int32))
        self.longest = longest
        self.l2_normalize = recipe.config.loss.l2_normalize
        self.hides = recipe.config.eval.repeats == "hide"

    def outputs(self, scored: PyTree, batch: Batch) -> Int[Array, " b"]:
        """Ranks from 1; 2501 where a target is not among the best 2500."""
        model, shards = self.recipe.model(scored), self.recipe.shards
        users_bD, table_ID = model.users(batch, shards), model.all_items(shards)
        if self.l2_normalize:  # the scores are then those that serving responds with
            users_bD = unit_rows(users_bD)
        # The item after a history's last row is the target of the example.
        target_B = batch.target_T[batch.last_row_B]
        hidden_BN = batch.hidden_BN
        if self.hides and hidden_BN is None:
            hidden_BN = jagged.pad(batch.item_T, batch.offsets, self.longest)
        target_b, hidden_bN = shards.part((target_B, hidden_BN))
        return ranks(
            users_bD,
            table_ID,
            target_b,
            hidden_bN,
            l2_normalize=self.l2_normalize,
            corpus_I=there_are(batch.items_1, table_ID),
        )

    @property
    def static(self) -> Hashable:
        return super().static, self.longest, self.recipe.num_items

    @functools.cached_property
    def repeats(self) -> float:
        """Share of the targets that stand in the events whose items `eval.hide` names."""
        columns, item_E = self.plan.examples.columns, self.loader.store.host.item_E
        spans = zip(columns.get("hide_from", columns["start"]), columns["stop"], strict=True)
        return float(np.mean([item_E[stop] in item_E[first:stop] for first, stop in spans]))

    def metrics(self, output_P: Int[np.ndarray, " n"]) -> Metrics:
        """HR and NDCG @ {1, 5, 10, 50, 100, 200} and MRR over all users of the split; `repeats`.

        A target that `repeats` counts is not found, unless `eval.repeats` is "rank".
        """
        return mean_metrics(output_P) | {"repeats": self.repeats}
