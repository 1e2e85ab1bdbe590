"""Evaluation of the ranking task: every event of a split predicted once, from requests as in serving; and what needs no model."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float32, Int

from ultra_hstu import criteria
from ultra_hstu.data.feed import Feed, Loader, feed_specs
from ultra_hstu.parallel import processes
from ultra_hstu.ranking.batch import RankEvents
from ultra_hstu.ranking.metrics import ranking_metrics
from ultra_hstu.step import Params
from ultra_hstu.task import RankTask

STEPS_PER_CALL = 8
PRIOR_EVENTS = 20.0  # of a base rate of items or users: so many events at the rate of all


class RankingEvaluator:
    """Predicts the events of one split. Compiled once; beside the predictions themselves, memory does not depend on the number of users.

    Raises:
      ValueError: if the split has no events, or no metric could choose the best epoch on it: no label at all, or one class only in each binary task.
    """

    def __init__(self, task: RankTask, split: str):
        self.task, self.kinds = task, task.recipe.tasks
        self.criteria = criteria.ranking(self.kinds)
        self.recipe, data = task.recipe, task.recipe.shards.data
        requests = -(-task.config.train.eval_users // data) * data
        self.loader: Loader = task.loader(
            split, batch_users=requests, steps_per_call=STEPS_PER_CALL
        )
        self.plan = self.loader.plan(shuffle=False)
        columns = self.plan.columns(np.arange(len(self.plan)))
        # RankGather's order of predictions: request after request, each with room for `targets` of them.
        place_M = np.arange(task.config.rank.targets)
        self._real_SBM: Bool[np.ndarray, "S B M"] = place_M < columns["count"][:, :, None]
        self.event_P: Int[np.ndarray, " P"] = (
            columns["target"][:, :, None].astype(np.int64) + place_M
        )[self._real_SBM]
        self.user_P = np.broadcast_to(columns["user"][:, :, None], self._real_SBM.shape)[
            self._real_SBM
        ]
        self._predict: Any = jax.jit(self._over_devices)
        chance = self.metrics(np.zeros((len(self.event_P), len(self.kinds)), np.float32))
        if self.criteria.selection not in chance:
            raise ValueError(
                f"the {split} events give {', '.join(self.kinds)} no labels of both classes (regressions: none at all), so that "
                f"{self.criteria.selection.upper()} has no value: raise rank.{split}_fraction, or choose other rank.tasks"
            )

    def compile(self, params: Params) -> None:
        """Compiles for the shapes that all calls have; without it the first call does so."""
        if isinstance(self._predict, jax.stages.Compiled):
            return
        group = next(iter(self.loader.groups(self.plan)))
        self._predict = self._predict.lower(params, group.feed, np.int32(group.steps)).compile()
        processes.barrier()

    def predict(self, params: Params) -> Float32[np.ndarray, "P K"]:
        """The logits (values, in regressions) of the events `event_P`."""
        if processes.several():
            self.compile(params)  # and not in the first call, which the others would wait in
        groups = [
            (group.first, group.steps, self._predict(params, group.feed, np.int32(group.steps)))
            for group in self.loader.groups(self.plan)
        ]
        parts = []
        for first, steps, logit_SPK in groups:
            real_SBM = self._real_SBM[first : first + steps]
            parts.append(np.asarray(logit_SPK)[:steps].reshape(*real_SBM.shape, -1)[real_SBM])
        return np.concatenate(parts)

    def __call__(self, params: Params) -> dict[str, float]:
        """The metrics of `ranking_metrics`, without those that have no value here.

        Raises:
          FloatingPointError: predictions that are not finite.
        """
        logit_PK = self.predict(params)
        if not (finite_PK := np.isfinite(logit_PK)).all():
            raise FloatingPointError(
                f"{(~finite_PK).sum()} of {finite_PK.size} predictions are not finite: the parameters have diverged. Lower "
                "optim.learning_rate or set optim.clip_norm, in a new --workdir."
            )
        return self.metrics(logit_PK)

    def metrics(self, logit_PK: Float32[np.ndarray, "P K"]) -> dict[str, float]:
        """The metrics of any predictions of the events `event_P`."""
        events: RankEvents = self.task.source.events
        labels = (
            np.asarray(events.label_EK)[self.event_P],
            np.asarray(events.weight_EK)[self.event_P],
        )
        values = ranking_metrics(logit_PK, *labels, self.user_P, self.kinds)
        return {name: value for name, value in values.items() if not np.isnan(value)}

    def _over_devices(
        self, params: Params, feed: Feed, steps: Int[jax.Array, ""]
    ) -> Float32[jax.Array, "S P K"]:
        everywhere = PartitionSpec()
        of_params = everywhere if self.recipe.mesh is None else self.recipe.specs.params
        return self.recipe.over_devices(
            self._predict_steps, (of_params, feed_specs(feed), everywhere), everywhere
        )(params, feed, steps)

    def _predict_steps(
        self, params: Params, feed: Feed, steps: Int[jax.Array, ""]
    ) -> Float32[jax.Array, "S P K"]:
        """The predictions for the requests of all groups."""
        shards, slots = self.recipe.shards, self.loader.batch_users * self.task.config.rank.targets

        def predict(step: jax.Array, logit_SPK: jax.Array) -> jax.Array:
            logit_pK = self.recipe.logits(params, feed.batch(step))
            return logit_SPK.at[step].set(shards.collect(logit_pK, slots // shards.data))

        return jax.lax.fori_loop(
            0, steps, predict, jnp.zeros((STEPS_PER_CALL, slots, len(self.kinds)))
        )


def baselines(task: RankTask, split: str) -> dict[str, dict[str, float]]:
    """The metrics of what needs no model, learnt from the training events: base rates of everything, of the item, of the user, and of both.

    A rate is a mean of labels. Those of an item or user are drawn to the rate of all with the weight of `PRIOR_EVENTS` events; of both, their logits
    (in a regression, values) are added and that of all subtracted.
    """
    evaluator = RankingEvaluator(task, split)
    events, interactions = task.source.events, task.interactions
    first_U, last_U = task.source.parts.bounds("train")
    user_E = np.repeat(np.arange(interactions.num_users), interactions.lengths)
    row_E = np.arange(interactions.num_events)
    train_E = (row_E >= first_U[user_E]) & (row_E < last_U[user_E])
    item_E, target_P = np.asarray(events.item_E), evaluator.event_P
    predictions: dict[str, list[np.ndarray]] = {
        name: [] for name in ("base rate", "item's rate", "user's rate", "item and user")
    }
    for k, kind in enumerate(evaluator.kinds.values()):
        weight_E = np.asarray(events.weight_EK)[:, k] * train_E
        label_E = np.where(weight_E > 0, np.asarray(events.label_EK)[:, k], 0.0)
        # One event of either class more: a rate of 0 or 1 would be infinitely wrong about the first exception.
        extra, ones = (2.0, 1.0) if kind == "binary" else (1e-9, 0.0)
        rate = ((weight_E * label_E).sum() + ones) / (weight_E.sum() + extra)

        def rates(group_E: np.ndarray, weight_E=weight_E, label_E=label_E, rate=rate) -> np.ndarray:
            total_G = np.bincount(group_E, weights=weight_E)
            return (
                (np.bincount(group_E, weights=weight_E * label_E) + PRIOR_EVENTS * rate)
                / (total_G + PRIOR_EVENTS)
            )[group_E[target_P]]

        scale = (lambda p: np.log(p) - np.log1p(-p)) if kind == "binary" else (lambda value: value)
        everything, item, user = (
            scale(np.full(len(target_P), rate)),
            scale(rates(item_E)),
            scale(rates(user_E)),
        )
        for name, logit_P in zip(
            predictions, (everything, item, user, item + user - everything), strict=True
        ):
            predictions[name].append(logit_P)
    return {
        name: evaluator.metrics(np.stack(logits, axis=1).astype(np.float32))
        for name, logits in predictions.items()
    }
