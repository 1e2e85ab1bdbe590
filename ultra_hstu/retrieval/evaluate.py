"""Full-corpus ranking of a split: every user's target against every item, seen items removed."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Int

from kernels import jagged
from ultra_hstu import criteria
from ultra_hstu.criteria import RETRIEVAL, Criteria
from ultra_hstu.data.feed import OF_GROUPS, Feed, Loader, feed_specs
from ultra_hstu.parallel import processes
from ultra_hstu.parallel.mesh import put
from ultra_hstu.ranking import evaluate as ranking_evaluate
from ultra_hstu.ranking.evaluate import RankingEvaluator
from ultra_hstu.retrieval import metrics
from ultra_hstu.retrieval.batch import Batch
from ultra_hstu.retrieval.recipe import Recipe
from ultra_hstu.step import Params
from ultra_hstu.task import RankTask, Task

STEPS_PER_CALL = 8

# (what a scorer needs, batch) -> vectors [b, D] of the users that this device ranks for, and item table [I+1, D]; their products are the scores
Scorer = Callable[[Any, Batch], tuple[jax.Array, jax.Array]]


class Evaluator:
    """Ranks the targets of one split. Compiled once; peak memory does not depend on the number of users.

    In a mesh every device ranks for its part of a batch's users, against the whole table.

    Args:
      scorer: what gives the vectors, from something that every device holds; None scores with the task's model, normalised as in training.
    """

    criteria = RETRIEVAL

    def __init__(self, task: Task, split: str, scorer: Scorer | None = None):
        self.task, self.recipe = task, task.recipe
        data = self.recipe.shards.data
        users = -(-task.config.train.eval_users // data) * data
        self.loader: Loader = task.loader(split, batch_users=users, steps_per_call=STEPS_PER_CALL)
        self.plan = self.loader.plan(shuffle=False)
        self.examples = self.plan.examples
        l2_normalize = task.config.loss.l2_normalize and scorer is None
        longest = int(self.examples.lengths.max())
        steps = functools.partial(
            _rank_steps,
            self.recipe,
            scorer or functools.partial(_encode, self.recipe),
            l2_normalize,
            longest,
        )
        self._of_model = scorer is None
        self._rank: Any = jax.jit(self._over_devices(steps))

    def _over_devices(self, steps: Callable[..., Any]) -> Callable[..., Any]:
        def run(scored: Any, feed: Feed, targets_SB: jax.Array, number: jax.Array) -> jax.Array:
            everywhere = PartitionSpec()
            params = (
                self.recipe.specs.params
                if self._of_model and self.recipe.mesh is not None
                else everywhere
            )
            specs = (params, feed_specs(feed), OF_GROUPS, everywhere)
            return self.recipe.over_devices(steps, specs, everywhere)(
                scored, feed, targets_SB, number
            )

        return run

    def compile(self, scored: Params | Any) -> None:
        """Compiles for the shapes that all calls have; without it the first call does so."""
        if isinstance(self._rank, jax.stages.Compiled):
            return
        group = next(iter(self.loader.groups(self.plan)))
        targets_SB = put(
            np.zeros((STEPS_PER_CALL, self.loader.batch_users), np.int32),
            self.recipe.mesh,
            OF_GROUPS,
        )
        self._rank = self._rank.lower(
            scored, group.feed, targets_SB, np.int32(group.steps)
        ).compile()
        processes.barrier()

    def ranks(self, scored: Params | Any) -> Int[np.ndarray, " n"]:
        """The 1-based rank of every example's target, in the order of the split; 2501 where it is not among the best 2500."""
        if processes.several():
            self.compile(scored)  # and not in the first call, which the others would wait in
        target_item = self.task.interactions.items[self.examples.stop].astype(np.int32)
        place_SB = self.plan.place_SB
        targets_SB = np.where(place_SB >= 0, target_item[np.maximum(place_SB, 0)], 0).astype(
            np.int32
        )
        ranks = np.zeros(len(self.examples), np.int32)
        pending = []
        for group in self.loader.groups(self.plan):
            taken_S = np.minimum(
                np.arange(group.first, group.first + STEPS_PER_CALL), group.first + group.steps - 1
            )
            targets = put(targets_SB[taken_S], self.recipe.mesh, OF_GROUPS)
            pending.append(
                (
                    group.first,
                    group.steps,
                    self._rank(scored, group.feed, targets, np.int32(group.steps)),
                )
            )
        for first, steps, ranks_SB in pending:
            examples_SB = place_SB[first : first + steps]
            used_SB = examples_SB >= 0
            ranks[examples_SB[used_SB]] = np.asarray(ranks_SB)[:steps][used_SB]
        return ranks

    def __call__(self, scored: Params | Any) -> dict[str, float]:
        """HR and NDCG @ {1, 5, 10, 50, 100, 200} and MRR over all users of the split."""
        ranks_U = jnp.asarray(self.ranks(scored))
        return metrics.mean_metrics(metrics.ranking_metrics(ranks_U, jnp.ones(ranks_U.shape)))


def evaluator(task: Task | RankTask, split: str) -> Evaluator | RankingEvaluator:
    """What measures a run on a split. Raises ValueError if the split has nothing to measure."""
    return RankingEvaluator(task, split) if isinstance(task, RankTask) else Evaluator(task, split)


def criteria_of(task: Task | RankTask) -> Criteria:
    """What a run of this task is judged by."""
    return criteria.ranking(task.recipe.tasks) if isinstance(task, RankTask) else RETRIEVAL


def baselines(task: Task | RankTask, split: str) -> dict[str, dict[str, float]]:
    """The metrics of what needs no model, by name."""
    return (
        ranking_evaluate.baselines(task, split)
        if isinstance(task, RankTask)
        else {"popularity": popularity_metrics(task, split)}
    )


def popularity_metrics(task: Task, split: str) -> dict[str, float]:
    """The metrics of recommending what is popular in the training data."""
    scores_I1 = jnp.asarray(task.popularity()[:, None])
    shards = task.recipe.shards
    return Evaluator(
        task,
        split,
        scorer=lambda table, batch: (jnp.ones((shards.part(batch.last_row_B).shape[0], 1)), table),
    )(scores_I1)


def _encode(recipe: Recipe, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    model = recipe.model(params)
    return model.users(batch, recipe.shards), model.all_items(recipe.shards)


def _rank_steps(
    recipe: Recipe,
    scorer: Scorer,
    l2_normalize: bool,
    longest: int,
    scored: Any,
    feed: Feed,
    targets_SB: Int[jax.Array, "S B"],
    steps: Int[jax.Array, ""],
) -> Int[jax.Array, "S B2"]:
    """Ranks of the users of all groups."""
    shards, batch_users = recipe.shards, targets_SB.shape[1]

    def rank(step: jax.Array, ranks_SB: jax.Array) -> jax.Array:
        batch = feed.batch(step)
        users_bD, table_ID = scorer(scored, batch)
        target_b, seen_bN = shards.part(
            (targets_SB[step], jagged.pad(batch.item_T, batch.offsets, longest))
        )
        ranks_b = metrics.ranks(users_bD, table_ID, target_b, seen_bN, l2_normalize=l2_normalize)
        return ranks_SB.at[step].set(shards.collect(ranks_b, batch_users))

    return jax.lax.fori_loop(
        0, steps, rank, jnp.zeros((targets_SB.shape[0], shards.data * batch_users), jnp.int32)
    )
