"""Evaluation of ranking: every event of a split is predicted once, from requests.

Base rates, which need no model, are measured on the same events.
"""

from collections.abc import Hashable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, PyTree

from ultra_hstu.criteria import Criteria, Metrics, warmth
from ultra_hstu.data.feed import Loader
from ultra_hstu.evaluate import Evaluator
from ultra_hstu.ranking.batch import RankBatch, RankEvents
from ultra_hstu.ranking.metrics import ranking_metrics
from ultra_hstu.ranking.recipe import RankRecipe

PRIOR_EVENTS = 20.0  # a base rate of items or users starts as if so many events had the rate of all


class RequestEvaluator(Evaluator):
    """Predicts the events of one split.

    Attributes:
      event_P, user_P: what is predicted, and whose it is, in the order of `predict`.

    Raises:
      ValueError: if the split has no events, or no metric could choose the best epoch on it: no
        label at all, or one class only in each binary task.
    """

    recipe: RankRecipe

    def __init__(
        self,
        recipe: RankRecipe,
        loader: Loader,
        criteria: Criteria,
        split: str,
        count_I: Int[np.ndarray, " I1"] | None = None,
    ):
        """
        Args:
          count_I: how many training events each item has; None: not known.
        """
        self.count_I, self.criteria, self.kinds, targets = (
            count_I,
            criteria,
            recipe.tasks,
            recipe.config.rank.targets,
        )
        places = loader.batch_users * targets
        super().__init__(
            recipe, loader, jax.ShapeDtypeStruct((places, len(self.kinds)), jnp.float32)
        )
        columns = self.plan.columns(np.arange(len(self.plan)))
        # The order of `RankGather`: request after request, each with `targets` places.
        place_M = np.arange(targets)
        real_SBM = place_M < columns["count"][:, :, None]
        self.used_SP = real_SBM.reshape(len(self.plan), places)
        event_SBM = columns["target"][:, :, None].astype(np.int64) + place_M
        user_SBM = np.broadcast_to(columns["user"][:, :, None], real_SBM.shape)
        self.event_P, self.user_P = event_SBM[real_SBM], user_SBM[real_SBM]
        self.events: RankEvents = loader.store.host
        chance = self.metrics(np.zeros((len(self.event_P), len(self.kinds)), np.float32))
        if criteria.selection not in chance:
            raise ValueError(
                f"the {split} events give {', '.join(self.kinds)} no labels of both classes "
                f"(regressions: none at all), so that {criteria.selection.upper()} has no value: "
                f"raise rank.{split}_fraction, or choose other rank.tasks"
            )

    @property
    def static(self) -> Hashable:
        return super().static, self.recipe.sizes, self.recipe.item_features

    def outputs(self, scored: PyTree, batch: RankBatch) -> Float32[Array, "p K"]:
        """The logits (values, in regressions) of the events `event_P`."""
        return self.recipe.logits(scored, batch)

    def __call__(self, scored: PyTree) -> Metrics:
        """The metrics of `ranking_metrics`, without those that have no value here.

        Raises:
          FloatingPointError: predictions that are not finite.
        """
        logit_PK = self.predict(scored)
        if not (finite_PK := np.isfinite(logit_PK)).all():
            raise FloatingPointError(
                f"{(~finite_PK).sum()} of {finite_PK.size} predictions are not finite: the "
                "parameters have diverged. Lower optim.learning_rate or set optim.clip_norm, in a "
                "new --workdir."
            )
        return self.metrics(logit_PK)

    def metrics(self, output_P: Float32[np.ndarray, "P K"]) -> Metrics:
        """The metrics of any predictions of the events `event_P`.

        Those of a task come again for the targets of each part of `criteria.WARMTH`, as
        `ne/correct/cold`, with their number, `targets/correct/cold`.
        """
        columns = (self.events.label_EK, self.events.weight_EK)
        label_PK, weight_PK = (np.asarray(column_EK)[self.event_P] for column_EK in columns)
        values = ranking_metrics(output_P, label_PK, weight_PK, self.user_P, self.kinds)
        if self.count_I is not None:
            count_P = self.count_I[np.asarray(self.events.item_E)[self.event_P]]
            for part, of_part_P in warmth(count_P).items():
                values |= {f"targets/{task}/{part}": float(of_part_P.sum()) for task in self.kinds}
                if of_part_P.any():
                    found = ranking_metrics(
                        output_P[of_part_P],
                        label_PK[of_part_P],
                        weight_PK[of_part_P],
                        self.user_P[of_part_P],
                        self.kinds,
                    )
                    values |= {f"{name}/{part}": x for name, x in found.items() if "/" in name}
        return {name: value for name, value in values.items() if not np.isnan(value)}


def base_rates(
    evaluator: RequestEvaluator, user_E: Int[np.ndarray, " E"], train_E: Bool[np.ndarray, " E"]
) -> dict[str, Metrics]:
    """The metrics of rates of the training events: of everything, of the item, the user, and both.

    A rate is a mean of labels. Those of an item or user are drawn to the rate of all with the
    weight of `PRIOR_EVENTS` events. For both, their logits (in a regression, values) are added and
    that of all is subtracted.

    Args:
      user_E, train_E: whose each event of the data is, and whether it is a training event.
    """
    target_P, events = evaluator.event_P, evaluator.events
    item_E, label_EK, weight_EK = map(
        np.asarray, (events.item_E, events.label_EK, events.weight_EK)
    )
    columns = []
    for k, kind in enumerate(evaluator.kinds.values()):
        weight_E = weight_EK[:, k] * train_E
        hit_E = weight_E * np.where(weight_E > 0, label_EK[:, k], 0.0)
        # One event of either class more, as a rate of 0 or 1 would be infinitely wrong once.
        extra, ones = (2.0, 1.0) if kind == "binary" else (1e-9, 0.0)
        rate = (hit_E.sum() + ones) / (weight_E.sum() + extra)
        item_P, user_P = (
            _rates_of_groups(group_E, weight_E, hit_E, rate)[group_E[target_P]]
            for group_E in (item_E, user_E)
        )
        scale = _logit if kind == "binary" else np.asarray
        everything, item, user = scale(np.full(len(target_P), rate)), scale(item_P), scale(user_P)
        columns.append((everything, item, user, item + user - everything))
    names = ("base rate", "item's rate", "user's rate", "item and user")
    predictions = np.stack(columns, axis=-1).astype(np.float32)  # [4, P, K]
    return {
        name: evaluator.metrics(output_PK)
        for name, output_PK in zip(names, predictions, strict=True)
    }


def _rates_of_groups(
    group_E: Int[np.ndarray, " E"],
    weight_E: Float[np.ndarray, " E"],
    hit_E: Float[np.ndarray, " E"],
    rate: np.floating,
) -> Float[np.ndarray, " G"]:
    hits_G = np.bincount(group_E, weights=hit_E) + PRIOR_EVENTS * rate
    return hits_G / (np.bincount(group_E, weights=weight_E) + PRIOR_EVENTS)


def _logit(rate_P: Float[np.ndarray, " P"]) -> Float[np.ndarray, " P"]:
    return np.log(rate_P) - np.log1p(-rate_P)
