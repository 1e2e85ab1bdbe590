"""Full-corpus evaluation: every user's target against every item, but those that `eval` hides."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from kernels import jagged
from ultra_hstu.criteria import RETRIEVAL, Metrics
from ultra_hstu.data.feed import Loader
from ultra_hstu.evaluate import Evaluator
from ultra_hstu.nn.norms import l2_normalize as unit_rows
from ultra_hstu.retrieval.batch import Batch
from ultra_hstu.retrieval.metrics import mean_metrics, ranks
from ultra_hstu.retrieval.recipe import Recipe

Vectors = tuple[Float[Array, "b D"], Float[Array, "I1 D"]]  # of users, and of all items


class CorpusEvaluator(Evaluator):
    """Ranks the targets of one split with the model, its items normalised as in training.

    In a mesh every device ranks for its part of a batch's users, against the whole table.
    """

    criteria = RETRIEVAL
    recipe: Recipe

    def __init__(self, recipe: Recipe, loader: Loader):
        super().__init__(recipe, loader, jax.ShapeDtypeStruct((loader.batch_users,), jnp.int32))
        self.longest = int(self.plan.examples.lengths.max())
        self.l2_normalize = recipe.config.loss.l2_normalize
        self.hides = recipe.config.eval.repeats == "hide"

    def vectors(self, scored: PyTree, batch: Batch) -> Vectors:
        """Vectors of the users that this device ranks for, and of all items."""
        model = self.recipe.model(scored)
        shards = self.recipe.shards
        return model.users(batch, shards), model.all_items(shards)

    def outputs(self, scored: PyTree, batch: Batch) -> Int[Array, " b"]:
        """Ranks from 1; 2501 where a target is not among the best 2500."""
        users_bD, table_ID = self.vectors(scored, batch)
        if self.l2_normalize:  # the scores are then those that serving responds with
            users_bD = unit_rows(users_bD)
        # The item after a history's last row is the target of the example.
        target_B = batch.target_T[batch.last_row_B]
        hidden_BN = batch.hidden_BN
        if self.hides and hidden_BN is None:
            hidden_BN = jagged.pad(batch.item_T, batch.offsets, self.longest)
        target_b, hidden_bN = self.recipe.shards.part((target_B, hidden_BN))
        return ranks(users_bD, table_ID, target_b, hidden_bN, l2_normalize=self.l2_normalize)

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


class PopularityEvaluator(CorpusEvaluator):
    """Ranks by one score an item, [I + 1, 1], the same for all users."""

    scores_model = False

    def __init__(self, recipe: Recipe, loader: Loader):
        super().__init__(recipe, loader)
        self.l2_normalize = False

    def vectors(self, scored: PyTree, batch: Batch) -> Vectors:
        users = self.recipe.shards.part(batch.last_row_B).shape[0]
        return jnp.ones((users, 1)), scored
