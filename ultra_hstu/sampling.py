"""Stochastic length and its load-balanced form: training on parts of long histories.

Stochastic length (HSTU, arXiv 2402.17152, equation 4): a history of n events longer than the
threshold N^(alpha/2) is trained on whole with probability N^alpha / n^2, and otherwise cut to the
threshold. Devices draw for themselves, so some draw more whole histories than others and all wait
for the slowest. The load-balanced form (ULTRA-HSTU, arXiv 2602.16986) keeps the probabilities, but
the draws of a device depend on each other and bring its load close to the mean of all.

Host code in numpy. Every choice is a function of lengths, times and the random numbers that are
given: nothing is drawn from hidden state.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

Subsequence = Literal["recent", "random", "weighted"]
Lengths = Int[np.ndarray, "*n"]  # events of each history
Uniform = Float[np.ndarray, "*n"]  # random numbers in [0, 1), one a history
RECALIBRATION_WEIGHT = 0.5  # of the newest estimate in the target load
MADE_UP = 0.3  # share of what the batches are behind that a batch makes up for


def threshold(max_length: int, alpha: float) -> int:
    """`int(N^(alpha / 2))`: histories up to this length are never cut.

    Raises:
      ValueError: if alpha is outside (1, 2] or `max_length` below 1.
    """
    if not 1 < alpha <= 2:
        raise ValueError(
            f"{alpha=} must be in (1, 2]: the cost of attention falls from N^2 to N^alpha"
        )
    if max_length < 1:
        raise ValueError(f"{max_length=} must be at least 1")
    return int(max_length ** (alpha / 2))


def keep_probability(lengths: Lengths, max_length: int, alpha: float) -> Float[np.ndarray, "*n"]:
    """`N^alpha / n^2`, the probability that a history above the threshold stays whole.

    Not clipped: 1 or more below the threshold.
    """
    return max_length**alpha / np.maximum(lengths, 1).astype(np.float64) ** 2


def stochastic_length(lengths: Lengths, max_length: int, alpha: float, uniform: Uniform) -> Lengths:
    """How many events of each history are kept, decided by `uniform` numbers in [0, 1).

    Raises:
      ValueError: as `threshold`.
    """
    cut = threshold(max_length, alpha)
    return np.where(
        (lengths > cut) & (uniform < 1 - keep_probability(lengths, max_length, alpha)), cut, lengths
    )


def subsequence(
    kind: Subsequence,
    length: int,
    keep: int,
    rng: np.random.Generator,
    times: Int[np.ndarray, " n"] | None = None,
) -> Int[np.ndarray, " k"]:
    """Which `keep` of `length` events stay: their places, ascending.

    - `recent`: the newest.
    - `random`: any, all equally likely.
    - `weighted`: drawn one after another without replacement, event i with weight `1 - f_i /
      sum(f)`, f_i the time from it to the newest event; without times, the number of events after
      it. Where the weights that are not 0 do not suffice, newer events come first.

    Raises:
      ValueError: if `keep` is not in 0..length, times are not one an event, or the kind is unknown.
    """
    if not 0 <= keep <= length:
        raise ValueError(f"{keep=} events cannot be kept of {length}: give 0 to {length}")
    if times is not None and len(times) != length:
        raise ValueError(f"{len(times)} times for {length} events: give one an event, or None")
    if kind == "recent":
        return np.arange(length - keep, length)
    if kind == "random":
        return np.sort(rng.choice(length, keep, replace=False))
    if kind != "weighted":
        raise ValueError(f"data.subsequence must be recent, random or weighted, not {kind!r}")
    age = (np.arange(length)[::-1] if times is None else times[-1:] - times).astype(np.float64)
    weight = 1 - age / max(age.sum(), 1)
    # Exponential races: the k smallest of Exp(1) / weight are k draws without replacement
    # (Efraimidis and Spirakis, 2006).
    draw = rng.exponential(size=length)
    key = np.divide(draw, weight, out=np.full(length, np.inf), where=weight > 0)
    return np.sort(np.lexsort([age, key])[:keep])


@dataclasses.dataclass
class LoadBalancer:
    """Load-balanced stochastic length of one device.

    The load of a batch is the sum of `length^gamma`. For the first `recalibrate_every` steps a
    device draws plain stochastic lengths and watches their load; the mean over devices becomes the
    target. From then on the draws of a batch depend on each other, so that the load comes close to
    the target. Every `recalibrate_every` steps the target moves half-way to the newest mean.

    The law: over many batches, a history of n events stays whole as often as equation 4 says,
    N^alpha / n^2, whatever its length. Three steps keep it:

    1. The probabilities of a batch move up or down together, so that its expected load is the
       target (`moved_probability`).
    2. Histories are drawn one by one, the longest first. Every draw moves the probabilities of
       those that are left against it, by as much load as it differs from its expectation, each in
       proportion to what is free of it (correlated Poisson sampling, Bondesson and Thorburn, 2008).
       These moves are 0 in expectation: no history is drawn more or less often for them.
    3. A target can be out of a batch's reach. By how much the batches are behind the law, in
       expected load, later ones aim higher or lower.

    Attributes:
      max_length, alpha: of stochastic length.
      gamma: exponent of a sequence's cost, see `flops.cost_exponent`.
      recalibrate_every: steps between two means over devices, which are the only communication.
      mean: the mean of a number over devices.
      target, observed, behind, step: the state.
    """

    max_length: int
    alpha: float
    gamma: float
    recalibrate_every: int = 100
    mean: Callable[[float], float] = float
    target: float | None = None
    observed: float = 0.0  # sum of plain loads since the last mean
    behind: float = 0.0  # what the law expects beyond the expected loads of the batches so far
    step: int = 0

    def __post_init__(self) -> None:
        threshold(self.max_length, self.alpha)
        if not self.gamma > 0:
            raise ValueError(f"gamma={self.gamma} must be positive: a longer sequence costs more")
        if self.recalibrate_every < 1:
            raise ValueError(f"recalibrate_every={self.recalibrate_every} must be at least 1")

    def load(self, lengths: Lengths) -> float:
        return float(np.sum(lengths.astype(np.float64) ** self.gamma))

    def calibrate(self, plain_loads: Sequence[float]) -> None:
        """Sets the target to the mean, over devices too, of the loads that plain draws would have:
        for a caller that knows its batches ahead.
        """
        self.target = self.mean(float(np.mean(plain_loads)))

    def choose(
        self,
        lengths: Lengths,
        uniform: Uniform,
        capacity: int | None = None,
    ) -> Lengths:
        """How many events of each history of a step are kept.

        Args:
          uniform: random numbers in [0, 1), one a history.
          capacity: events that are kept together, at most; None: any number. What is cut already
            cannot be cut further.
        """
        plain = stochastic_length(lengths, self.max_length, self.alpha, uniform)
        kept = plain if self.target is None else self._balanced(lengths, uniform, capacity)
        self.observed += self.load(plain)
        self.step += 1
        if self.step % self.recalibrate_every == 0:
            newest = self.mean(self.observed / self.recalibrate_every)
            self.target = (
                newest
                if self.target is None
                else self.target + RECALIBRATION_WEIGHT * (newest - self.target)
            )
            self.observed = 0.0
        return kept

    def _balanced(self, lengths: Lengths, uniform: Uniform, capacity: int | None) -> Lengths:
        assert self.target is not None
        cut = threshold(self.max_length, self.alpha)
        kept = np.minimum(lengths, cut)
        (long,) = np.nonzero(lengths > cut)
        order = long[np.argsort(-lengths[long], kind="stable")]  # the longest first
        more = lengths[order] - cut  # events that a whole history has beyond the threshold
        load = lengths[order].astype(np.float64) ** self.gamma - float(cut) ** self.gamma
        law = keep_probability(lengths[order], self.max_length, self.alpha)
        wanted = self.target - self.load(kept) + MADE_UP * self.behind
        probability = moved_probability(law, load, wanted)
        self.behind += float((law - probability) @ load)
        free = np.inf if capacity is None else capacity - int(kept.sum())
        for i, history in enumerate(order):
            p, left = probability[i], probability[i + 1 :]
            whole = uniform[history] >= 1 - p and more[i] <= free
            if whole:
                kept[history] = lengths[history]
                free -= more[i]
            if 0 < p < 1:
                # How far each may move, for the two outcomes alike in proportion.
                range_ = np.minimum(left / (1 - p), (1 - left) / p)
                share = load[i] / max(load[i], float(range_ @ load[i + 1 :]))
                probability[i + 1 :] = np.clip(left - (whole - p) * share * range_, 0, 1)
        return kept


def moved_probability(
    probability: Float[np.ndarray, " n"], load: Float[np.ndarray, " n"], wanted: float
) -> Float[np.ndarray, " n"]:
    """`p + c p (1 - p)`, c in -1..1: the expected load comes to the wanted one, as far as c goes.

    Probabilities move in proportion to their variance, and none leaves 0..1. The c of a history
    follows from the loads of the others, its own counting as the mean of all: over batches it is
    then as often positive as negative, whatever the length.

    Args:
      load: of each history, if it is drawn.
      wanted: the expected load, the sum of the products of the two.
    """
    if not len(load):
        return probability
    free, own = probability * (1 - probability) * load, probability * load
    missing = wanted - own.sum() + own - (free @ own) / free.sum()
    return probability * (1 + np.clip(missing / free.sum(), -1.0, 1.0) * (1 - probability))
