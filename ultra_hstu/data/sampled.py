"""Stochastic length in the loader: every epoch trains on its own parts of the long histories.

The plan of an epoch is made with the lengths that are kept, a function of (seed, epoch). Where the
newest events stay, only the start of a history moves. Otherwise the events of a batch's histories
travel with it, as int32 [T], and `start` and `stop` point into them. Targets are never cut, and a
row of a retrieval batch predicts the event that followed it, kept or not.
"""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from ultra_hstu.data.packing import ExampleTable, HostColumns, Packing, Plan, Planner
from ultra_hstu.parallel import processes
from ultra_hstu.parallel.mesh import groups_here
from ultra_hstu.sampling import LoadBalancer, Subsequence, stochastic_length, subsequence

# Streams of random numbers beside the loader's own, which shuffles with (seed, epoch).
_LENGTHS, _EVENTS = 2, 3
PerHistory = Int[np.ndarray, "n R"]  # of n examples with R histories each


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How training histories are cut."""

    alpha: float
    subsequence: Subsequence = "recent"
    gamma: float | None = None  # a history costs length^gamma, for load balance; None: no balance
    recalibrate_every: int = 100


@dataclasses.dataclass(frozen=True, eq=False)
class SampledHistory:
    """One of the histories of an example, in the columns `start{suffix}` and `stop{suffix}`.

    An example of a mixture of transducers has several.
    """

    max_length: int  # N of stochastic length
    suffix: str = ""
    rows_per_event: int = 1
    index: Int[np.ndarray, " n"] | None = None  # events that the columns count; None: all events


@dataclasses.dataclass(frozen=True, eq=False)
class CutTable:
    """Examples that keep `kept_nR` events of each history, the newest until others are chosen."""

    whole: ExampleTable
    histories: tuple[SampledHistory, ...]
    kept_nR: PerHistory

    @property
    def columns(self) -> HostColumns:
        start_nR = self.stop_nR - self.kept_nR
        starts = {f"start{one.suffix}": start_nR[:, r] for r, one in enumerate(self.histories)}
        return self.whole.columns | starts

    @property
    def lengths(self) -> Int[np.ndarray, "n *R"]:
        dropped_nR = self.rows_per_event_R * (self.whole_nR - self.kept_nR)
        return self.whole.lengths - dropped_nR.reshape(self.whole.lengths.shape)

    @property
    def rows_per_event_R(self) -> Int[np.ndarray, " R"]:
        return np.array([history.rows_per_event for history in self.histories])

    @functools.cached_property
    def whole_nR(self) -> PerHistory:
        return self.stop_nR - self._columns_nR("start")

    @functools.cached_property
    def stop_nR(self) -> PerHistory:
        return self._columns_nR("stop")

    def _columns_nR(self, name: str) -> PerHistory:
        columns = [self.whole.columns[name + history.suffix] for history in self.histories]
        return np.stack(columns, axis=1)


@dataclasses.dataclass(frozen=True, eq=False)
class ChosenPlan(Plan):
    """A plan whose batches name the events of their histories: columns `event{suffix}`, [S, T]."""

    examples: CutTable
    sampling: Sampling
    times_E: Int[np.ndarray, " E"] | None
    packing: Packing
    seed: int
    epoch: int

    def columns(
        self, steps_S: Int[np.ndarray, " S"], dtype: type[np.signedinteger] = np.int32
    ) -> HostColumns:
        columns, table = super().columns(steps_S, dtype), self.examples
        shards = self.packing.groups // self.packing.buffers  # data groups, side by side
        place_SGb = self.place_SB[steps_S].reshape(len(steps_S), shards, -1)
        for r, (history, rows) in enumerate(zip(table.histories, self.packing.rows, strict=True)):
            kept_SGb = np.where(place_SGb >= 0, table.kept_nR[place_SGb, r], 0)
            stop_SGb = np.cumsum(kept_SGb, axis=2)
            event_SGT = np.zeros((len(steps_S), shards, self.packing.buffers * rows), np.int32)
            for s, g, b in zip(*np.nonzero(kept_SGb), strict=True):
                stop = stop_SGb[s, g, b]
                events_n = self._events(r, int(place_SGb[s, g, b]))
                event_SGT[s, g, stop - kept_SGb[s, g, b] : stop] = events_n
            parts = {"start": stop_SGb - kept_SGb, "stop": stop_SGb, "event": event_SGT}
            columns |= {
                name + history.suffix: part.reshape(len(steps_S), -1).astype(np.int32)
                for name, part in parts.items()
            }
        return columns

    def _events(self, r: int, example: int) -> Int[np.ndarray, " k"]:
        table, index = self.examples, self.examples.histories[r].index
        stop, keep = table.stop_nR[example, r], table.kept_nR[example, r]
        event_n = np.arange(stop - table.whole_nR[example, r], stop)
        event_n = event_n if index is None else index[event_n]
        if keep == len(event_n):
            return event_n
        rng = np.random.default_rng((self.seed, self.epoch, _EVENTS, r, example))
        times = None if self.times_E is None else self.times_E[event_n]
        return event_n[subsequence(self.sampling.subsequence, len(event_n), int(keep), rng, times)]


@dataclasses.dataclass(frozen=True, eq=False)
class SampledPlanner(Planner):
    """Plans epochs over parts of long histories.

    Attributes:
      histories: of an example, in the order of the buffers of a batch.
      times_E: seconds of every event, for `weighted` subsequences; None where the data has no
        times: then places count.
      mesh: of the batches, as of a `Loader`.
    """

    sampling: Sampling
    histories: tuple[SampledHistory, ...]
    times_E: Int[np.ndarray, " E"] | None
    mesh: Mesh | None = None

    def taken(self, examples: ExampleTable, seed: int, epoch: int) -> CutTable:
        """Cuts every history by its own draw."""
        nothing_nR = np.zeros((len(examples.lengths), len(self.histories)), np.int64)
        whole = CutTable(examples, self.histories, nothing_nR)
        uniform_nR, alpha = _uniform(nothing_nR.shape, seed, epoch), self.sampling.alpha
        kept = [
            stochastic_length(whole.whole_nR[:, r], history.max_length, alpha, uniform_nR[:, r])
            for r, history in enumerate(self.histories)
        ]
        return CutTable(examples, self.histories, np.stack(kept, axis=1))

    def plan(
        self, examples: ExampleTable, packing: Packing, *, seed: int, epoch: int, shuffle: bool
    ) -> Plan:
        plan = super().plan(examples, packing, seed=seed, epoch=epoch, shuffle=shuffle)
        cut = plan.examples
        assert isinstance(cut, CutTable)  # that is what `taken` gave
        if (gamma := self.sampling.gamma) is not None:
            place_SGb = plan.place_SB.reshape(len(plan), packing.groups, -1)
            cut = self._balanced(cut, place_SGb, packing, gamma, seed, epoch)
        if self.sampling.subsequence == "recent":
            return Plan(plan.place_SB, cut)
        return ChosenPlan(plan.place_SB, cut, self.sampling, self.times_E, packing, seed, epoch)

    def _balanced(
        self,
        cut: CutTable,
        place_SGb: Int[np.ndarray, "S G b"],
        packing: Packing,
        gamma: float,
        seed: int,
        epoch: int,
    ) -> CutTable:
        """The same batches, whole histories chosen anew, so that all have nearly one load.

        No batch outgrows its rows. A process chooses for the groups whose batches it makes. An
        epoch is planned before it begins, so the loads of plain draws, whose means over all groups
        are the targets, are known without training: nothing is carried from one epoch to the next,
        and a plan is a function of (seed, epoch).
        """
        uniform_nR = _uniform(cut.kept_nR.shape, seed, epoch)
        # Contextual tokens and targets are never cut.
        fixed_nR = cut.lengths.reshape(cut.kept_nR.shape) - cut.rows_per_event_R * cut.kept_nR
        kept_nR, whole_nR = cut.kept_nR.copy(), cut.whole_nR
        every = min(self.sampling.recalibrate_every, len(place_SGb))
        own = self._own_groups(packing)
        for r, history in enumerate(cut.histories):
            kept_SGb = np.where(place_SGb >= 0, cut.kept_nR[place_SGb, r], 0)[:, own]
            load_SG = (kept_SGb.astype(np.float64) ** gamma).sum(axis=2)
            means = _means_over_groups(load_SG, own, every)
            for group in own:
                agreed = functools.partial(_next, iter([means[0], *means]))
                balancer = LoadBalancer(
                    history.max_length, self.sampling.alpha, gamma, every, mean=agreed
                )
                balancer.calibrate([means[0]])
                for place_b in place_SGb[:, group]:
                    places = place_b[place_b >= 0]
                    rows = packing.rows[r] - int(fixed_nR[places, r].sum())
                    kept_nR[places, r] = balancer.choose(
                        whole_nR[places, r], uniform_nR[places, r], rows // history.rows_per_event
                    )
        return dataclasses.replace(cut, kept_nR=kept_nR)

    def _own_groups(self, packing: Packing) -> list[int]:
        """Numbers of the groups whose batches this process makes."""
        shards = range(1) if self.mesh is None else groups_here(self.mesh)
        return [shard * packing.buffers + i for shard in shards for i in range(packing.buffers)]


def _means_over_groups(
    load_SG: Float[np.ndarray, "S G"], own: list[int], every: int
) -> list[float]:
    """The mean of each `every` steps over the groups of all processes, which call this together.

    Args:
      own: numbers of the groups that this process has the loads of.
    """
    windows = len(load_SG) // every
    load_WG = load_SG[: windows * every].reshape(windows, every, len(own)).mean(axis=1)
    given = {str(group): load_W.tolist() for group, load_W in zip(own, load_WG.T, strict=True)}
    known = {name: load for one in processes.all_gather(given) for name, load in one.items()}
    # In the order of the groups, so that the bits do not depend on who has which.
    return np.mean([known[name] for name in sorted(known, key=int)], axis=0).tolist()


def _next(means: Iterator[float], own: float) -> float:
    return next(means)


def _uniform(shape: tuple[int, ...], seed: int, epoch: int) -> Float[np.ndarray, "n R"]:
    return np.random.default_rng((seed, epoch, _LENGTHS)).random(shape)
