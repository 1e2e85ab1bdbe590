"""Lines and power laws of quality over compute, and how two models' compare, with intervals.

As arXiv 2602.16986 does: scaling efficiency is the ratio of the slopes of lines fitted to the gain
of NE over compute; an exponent is that of L(C) = alpha * C^-beta, fitted to the logarithms, with
what NE cannot fall below left out. Intervals are 95 % ones of a bootstrap over runs.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float64

SAMPLES = 2000  # of a bootstrap
Points = Float64[np.ndarray, "*samples n"]
Fitted = Float64[np.ndarray, "*samples"] | np.float64


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """Runs of one model: what each computes, and its NE.

    Raises:
      ValueError: fewer than two amounts of compute, or values that have no logarithm.
    """

    compute: Float64[np.ndarray, " n"]
    ne: Float64[np.ndarray, " n"]

    def __post_init__(self) -> None:
        if len(np.unique(self.compute)) < 2:
            raise ValueError(
                f"a curve needs runs of two amounts of compute, not {self.compute.tolist()}"
            )
        if not (np.concatenate([self.compute, self.ne]) > 0).all():
            raise ValueError("compute and NE of a curve must be greater than 0")

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]]) -> "Curve":
        """Of (compute, NE) pairs."""
        compute, ne = np.array(points, np.float64).reshape(-1, 2).T
        return cls(compute, ne)

    @property
    def decades(self) -> float:
        """How many powers of ten the compute spans."""
        return float(np.log10(self.compute.max() / self.compute.min()))


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A fitted value, with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A model's estimate over that of a baseline; None, and why, if it means nothing."""

    ratio: Estimate | None
    reason: str = ""


Fit = Callable[[Points, Points], Fitted]


def slope(compute: Points, ne: Points) -> Fitted:
    """How much NE falls for one more unit of compute, by least squares."""
    return -_slope(compute, ne)


def exponent(compute: Points, ne: Points) -> Fitted:
    """beta of NE = alpha * compute^-beta, by least squares of the logarithms."""
    return -_slope(np.log(compute), np.log(ne))


def line(curve: Curve) -> tuple[float, float]:
    """(a, b) of NE = a + b * compute."""
    b = float(_slope(curve.compute, curve.ne))
    return float(curve.ne.mean() - b * curve.compute.mean()), b


def power(curve: Curve) -> tuple[float, float]:
    """(alpha, beta) of NE = alpha * compute^-beta."""
    beta = float(exponent(curve.compute, curve.ne))
    return float(np.exp(np.mean(np.log(curve.ne) + beta * np.log(curve.compute)))), beta


def estimate(curve: Curve, fit: Fit) -> Estimate:
    """A fit of a curve, with its interval."""
    return _estimate(float(fit(curve.compute, curve.ne)), _bootstrap(curve, fit, seed=0))


def compare(curve: Curve, baseline: Curve, fit: Fit) -> Ratio:
    """The fit of a curve over that of a baseline.

    It means nothing where the NE of either does not surely fall as compute grows.
    """
    ours, theirs = (_bootstrap(one, fit, seed) for seed, one in enumerate((curve, baseline)))
    for name, one, samples in (("the baseline", baseline, theirs), ("the model", curve, ours)):
        found = _estimate(float(fit(one.compute, one.ne)), samples)
        if found.low <= 0:
            return Ratio(
                None,
                f"NE of {name} does not surely fall as compute grows: {found.value:.3g} "
                f"[{found.low:.3g}, {found.high:.3g}]",
            )
    value = float(fit(curve.compute, curve.ne) / fit(baseline.compute, baseline.ne))
    return Ratio(_estimate(value, ours / theirs))


def _slope(x: Points, y: Points) -> Fitted:
    centred = x - x.mean(-1, keepdims=True)
    return (centred * y).sum(-1) / (centred * centred).sum(-1)


def _bootstrap(curve: Curve, fit: Fit, seed: int) -> Float64[np.ndarray, " samples"]:
    """The fit of runs that are drawn with replacement, of two amounts of compute at least."""
    rng, runs = np.random.default_rng(seed), len(curve.ne)
    drawn = rng.integers(0, runs, (SAMPLES, runs))
    while (alike := np.ptp(curve.compute[drawn], axis=1) == 0).any():
        drawn[alike] = rng.integers(0, runs, (int(alike.sum()), runs))
    return np.asarray(fit(curve.compute[drawn], curve.ne[drawn]))


def _estimate(value: float, samples: Float64[np.ndarray, " samples"]) -> Estimate:
    low, high = np.percentile(samples, [2.5, 97.5]).tolist()
    return Estimate(value, low, high)
