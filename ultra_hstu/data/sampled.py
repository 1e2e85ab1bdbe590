"""Stochastic length in the loader: every epoch trains on its own parts of the long histories, a function of (seed, epoch).

The plan of an epoch is made with the lengths that are kept. Where the newest events stay, only the start of a history moves; otherwise the
events of a batch's histories travel with it, as int32 [T], and `start` and `stop` point into them. Targets are never cut, and a row of a
retrieval batch predicts the event that followed it, kept or not.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int

from ultra_hstu.config import DataConfig
from ultra_hstu.data.feed import Plan, Planner, Table
from ultra_hstu.sampling import LoadBalancer, Subsequence, stochastic_length, subsequence

_LENGTHS, _EVENTS = (
    2,
    3,
)  # streams of random numbers beside the loader's own, which shuffles with (seed, epoch)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How training histories are cut."""

    alpha: float
    subsequence: Subsequence = "recent"
    gamma: float | None = (
        None  # cost of a history is length^gamma, for load balance; None: no balance
    )
    recalibrate_every: int = 100

    @staticmethod
    def of(config: DataConfig, gamma: float) -> "Sampling | None":
        """What a configuration asks for; None where histories stay whole."""
        if config.stochastic_length is None:
            return None
        return Sampling(
            config.stochastic_length,
            config.subsequence,
            gamma if config.load_balance else None,
            config.recalibrate_every,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class History:
    """One of the histories of an example, of which a mixture of transducers has several: columns `start{suffix}` and `stop{suffix}`."""

    max_length: int  # N of stochastic length
    suffix: str = ""
    rows_per_event: int = 1
    index: Int[np.ndarray, " n"] | None = (
        None  # events that the columns count, where they do not count all events
    )


@dataclasses.dataclass(frozen=True, eq=False)
class CutTable:
    """Examples of which `kept` events a history stay, the newest until something else is chosen."""

    whole: Any  # Table
    histories: tuple[History, ...]
    kept_nR: Int[np.ndarray, "n R"]

    @property
    def columns(self) -> dict[str, np.ndarray]:
        starts = {
            f"start{history.suffix}": self.stop(r) - self.kept_nR[:, r]
            for r, history in enumerate(self.histories)
        }
        return self.whole.columns | starts

    @property
    def lengths(self) -> Int[np.ndarray, "n *R"]:
        return self.whole.lengths - (
            self.rows_per_event_R * (self.whole_nR - self.kept_nR)
        ).reshape(self.whole.lengths.shape)

    @property
    def rows_per_event_R(self) -> Int[np.ndarray, " R"]:
        return np.array([history.rows_per_event for history in self.histories])

    @property
    def whole_nR(self) -> Int[np.ndarray, "n R"]:
        return np.stack([self.stop(r) - self.start(r) for r in range(len(self.histories))], axis=1)

    def start(self, r: int) -> np.ndarray:
        return self.whole.columns[f"start{self.histories[r].suffix}"]

    def stop(self, r: int) -> np.ndarray:
        return self.whole.columns[f"stop{self.histories[r].suffix}"]


@dataclasses.dataclass(frozen=True, eq=False)
class ChosenPlan(Plan):
    """A plan whose batches name the events of their histories: columns `event{suffix}`, [S, T]."""

    sampling: Sampling
    times_E: np.ndarray | None
    rows_R: tuple[int, ...]  # of a data group's buffer
    shards: int  # data groups, side by side in the columns
    seed: int
    epoch: int

    def columns(self, steps_S: Int[np.ndarray, " S"]) -> dict[str, np.ndarray]:
        columns, table = super().columns(steps_S), self.examples
        place_SGb = self.place_SB[steps_S].reshape(len(steps_S), self.shards, -1)
        for r, (history, rows) in enumerate(zip(table.histories, self.rows_R, strict=True)):
            kept_SGb = np.where(place_SGb >= 0, table.kept_nR[place_SGb, r], 0)
            stop_SGb = np.cumsum(kept_SGb, axis=2)
            event_SGT = np.zeros((len(steps_S), self.shards, rows), np.int32)
            for s, g, b in zip(*np.nonzero(kept_SGb), strict=True):
                stop = stop_SGb[s, g, b]
                event_SGT[s, g, stop - kept_SGb[s, g, b] : stop] = self._events(
                    r, int(place_SGb[s, g, b])
                )
            parts = {"start": stop_SGb - kept_SGb, "stop": stop_SGb, "event": event_SGT}
            columns |= {
                name + history.suffix: part.reshape(len(steps_S), -1).astype(np.int32)
                for name, part in parts.items()
            }
        return columns

    def _events(self, r: int, example: int) -> np.ndarray:
        table, index = self.examples, self.examples.histories[r].index
        start, stop, keep = (
            table.start(r)[example],
            table.stop(r)[example],
            table.kept_nR[example, r],
        )
        event_n = np.arange(start, stop) if index is None else index[start:stop]
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
      times_E: seconds of every event, for `weighted` subsequences; None where the data has no times: then places count.
    """

    sampling: Sampling
    histories: tuple[History, ...]
    times_E: Int[np.ndarray, " E"] | None

    def taken(self, examples: Table, seed: int, epoch: int) -> CutTable:
        return plain_cut(examples, self.histories, self.sampling, seed, epoch)

    def plan(
        self,
        examples: Table,
        *,
        batch_users: int,
        rows: int | tuple[int, ...],
        seed: int,
        epoch: int,
        shuffle: bool,
        groups: int = 1,
        buffers: int = 1,
    ) -> Plan:
        packing: dict[str, Any] = dict(
            batch_users=batch_users, rows=rows, groups=groups, buffers=buffers
        )
        plan = super().plan(examples, seed=seed, epoch=epoch, shuffle=shuffle, **packing)
        rows_R = rows if isinstance(rows, tuple) else (rows,)
        if self.sampling.gamma is not None:
            place_GB = plan.place_SB.reshape(
                -1, batch_users // groups
            )  # all groups of all steps get the same load
            plan = Plan(
                plan.place_SB,
                balanced_cut(plan.examples, place_GB, rows_R, self.sampling, seed, epoch),
            )
        if self.sampling.subsequence == "recent":
            return plan
        buffer_R = tuple(buffers * rows for rows in rows_R)
        return ChosenPlan(
            plan.place_SB,
            plan.examples,
            self.sampling,
            self.times_E,
            buffer_R,
            groups // buffers,
            seed,
            epoch,
        )


def plain_cut(
    table: Table, histories: tuple[History, ...], sampling: Sampling, seed: int, epoch: int
) -> CutTable:
    """Every history by its own draw."""
    whole = CutTable(
        table, histories, np.zeros((len(table.lengths), len(histories)), np.int64)
    ).whole_nR
    uniform_nR = _uniform(whole.shape, seed, epoch)
    kept = [
        stochastic_length(whole[:, r], history.max_length, sampling.alpha, uniform_nR[:, r])
        for r, history in enumerate(histories)
    ]
    return CutTable(table, histories, np.stack(kept, axis=1))


def balanced_cut(
    cut: CutTable,
    place_SB: Int[np.ndarray, "S B"],
    rows_R: tuple[int, ...],
    sampling: Sampling,
    seed: int,
    epoch: int,
) -> CutTable:
    """The same batches with their whole histories chosen anew, so that all have nearly the same load; none outgrows its rows.

    An epoch is planned before it begins, so the load of the first `recalibrate_every` batches under plain draws is known without training on
    them: nothing is carried from one epoch to the next, and a plan is a function of (seed, epoch).
    """
    assert sampling.gamma is not None
    uniform_nR = _uniform(cut.kept_nR.shape, seed, epoch)
    fixed_nR = (
        cut.lengths.reshape(cut.kept_nR.shape) - cut.rows_per_event_R * cut.kept_nR
    )  # contextual tokens and targets
    kept_nR, whole_nR = cut.kept_nR.copy(), cut.whole_nR
    batches = [places[places >= 0] for places in place_SB]
    for r, history in enumerate(cut.histories):
        settings = (history.max_length, sampling.alpha, sampling.gamma, sampling.recalibrate_every)
        balancer = LoadBalancer(
            *settings, mean=float
        )  # the plan holds the batches of all ranks, and every process makes the whole plan
        balancer.calibrate(
            [
                balancer.load(cut.kept_nR[places, r])
                for places in batches[: sampling.recalibrate_every]
            ]
        )
        for places in batches:
            capacity = (rows_R[r] - int(fixed_nR[places, r].sum())) // history.rows_per_event
            kept_nR[places, r] = balancer.choose(
                whole_nR[places, r], uniform_nR[places, r], capacity
            )
    return dataclasses.replace(cut, kept_nR=kept_nR)


def _uniform(shape: tuple[int, ...], seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch, _LENGTHS)).random(shape)
