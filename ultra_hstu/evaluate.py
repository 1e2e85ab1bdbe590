"""The loop of an evaluation, which all tasks share: one split through one compiled call."""

import abc
from collections.abc import Hashable
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int, PyTree, Shaped

from ultra_hstu import programs
from ultra_hstu.criteria import Criteria, Metrics
from ultra_hstu.data.feed import Feed, Loader, feed_specs
from ultra_hstu.parallel import processes
from ultra_hstu.step import Steps, shapes

STEPS_PER_CALL = 8
Outputs = Shaped[np.ndarray, "P ..."]  # of a whole split
StepOutputs = Shaped[Array, "S P ..."]


class Evaluator(abc.ABC):
    """Measures one split. It compiles once, and peak memory does not depend on the number of users.

    A subclass says what a batch gives (`outputs`) and what all of it means (`metrics`). In a mesh
    every device computes the outputs of its part of a batch, and each receives those of all parts.

    Args:
      loader: batches of the split, `STEPS_PER_CALL` a call.
      like: shape and dtype of the outputs of one step, [P, ...].
    """

    criteria: Criteria

    def __init__(self, recipe: Steps, loader: Loader, like: jax.ShapeDtypeStruct):
        self.recipe, self.loader, self.plan = recipe, loader, loader.plan(shuffle=False)
        # The places of every step's outputs that belong to an example.
        self.used_SP: Bool[np.ndarray, "S P"] = self.plan.place_SB >= 0
        self._like = like
        self._run = jax.jit(self._over_devices)
        self._program: Future[jax.stages.Compiled] | None = None

    @abc.abstractmethod
    def outputs(self, scored: PyTree, batch: PyTree) -> Shaped[Array, "p ..."]:
        """What a batch gives, this device's part as `Shards.part` divides it."""

    @abc.abstractmethod
    def metrics(self, output_P: Outputs) -> Metrics:
        """The metrics of the outputs of a whole split, as `predict` orders them."""

    def begin(self, scored: PyTree, pool: Executor) -> None:
        """Traces for the shapes that all calls have, and compiles in the pool."""
        if self._program is None:
            group = next(iter(self.loader.groups(self.plan)))
            arguments = (scored, group.feed, np.int32(group.steps))
            begun = programs.begin(self._run, arguments, 0, self._closed_over(), pool)
            self._program = begun.program

    def compile(self, scored: PyTree) -> None:
        """Compiles for the shapes that all calls have; without it the first call does so."""
        with ThreadPoolExecutor(1) as pool:
            self.begin(scored, pool)
        self.wait()

    def wait(self) -> None:
        """Returns when what `begin` has begun is done, in all processes."""
        if self._program is not None:
            self._program.result()
        processes.barrier()

    def adopt(self, other: "Evaluator") -> bool:
        """Takes the compiled program of an evaluator of the same model, if the shapes are the same.

        Returns whether they are.
        """
        pair = self, other
        feeds = [next(iter(one.loader.groups(one.plan))).feed for one in pair]
        same = shapes(feeds[0]) == shapes(feeds[1]) and self.static == other.static
        same &= not (self.recipe.holds_data or other.recipe.holds_data)
        if same and other._program is not None:
            self._program = other._program
        return same

    @property
    def static(self) -> Hashable:
        """What a program depends on, beside the configuration and the shapes of its inputs."""
        return self._like

    def _closed_over(self) -> list[object]:
        """What the program depends on, beside its arguments."""
        apart = ("loader", "plan", "recipe", "used_SP", "_run", "_program")
        return [type(self), self.recipe, {k: v for k, v in vars(self).items() if k not in apart}]

    def predict(self, scored: PyTree) -> Outputs:
        """The outputs of every example, in the order of the split."""
        if processes.several() and self._program is None:
            self.compile(scored)  # the others would wait in the first call
        run = self._run if self._program is None else self._program.result()
        pending = [
            (group.steps, run(scored, group.feed, np.int32(group.steps)))
            for group in self.loader.groups(self.plan)
        ]
        outputs = [np.asarray(output_SP)[:steps] for steps, output_SP in pending]
        return np.concatenate(outputs)[self.used_SP]

    def __call__(self, scored: PyTree) -> Metrics:
        return self.metrics(self.predict(scored))

    def _over_devices(self, scored: PyTree, feed: Feed, steps: Int[Array, ""]) -> StepOutputs:
        everywhere = PartitionSpec()
        of_scored = everywhere if self.recipe.mesh is None else self.recipe.specs.params
        run = self.recipe.over_devices(
            self._steps, (of_scored, feed_specs(feed), everywhere), everywhere
        )
        return run(scored, feed, steps)

    def _steps(self, scored: PyTree, feed: Feed, steps: Int[Array, ""]) -> StepOutputs:
        shards, count = self.recipe.shards, self._like.shape[0]

        def step(number: Array, output_SP: Array) -> Array:
            output_p = self.outputs(scored, feed.batch(number))
            return output_SP.at[number].set(shards.collect(output_p, count // shards.data))

        zeros_SP = jnp.zeros((STEPS_PER_CALL, *self._like.shape), self._like.dtype)
        return jax.lax.fori_loop(0, steps, step, zeros_SP)
