"""The best possible prediction of `data.synthetic_long`, and its NE: the floor of every model.

theta ~ Beta(a, b) of a user's category, of which a history holds n events, s of them liked, gives
the posterior Beta(a + s, b + n - s), so that the next one is liked with probability
(a + s) / (a + b + n). Over all histories of L events n ~ Binomial(L, p_k) and
s ~ BetaBinomial(n, a, b), which makes the expected log loss a finite sum. It falls with L, as a
longer history holds the shorter one.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int64
from scipy import special, stats

from ultra_hstu.config import SyntheticLongConfig
from ultra_hstu.data.interactions import Interactions
from ultra_hstu.data.synthetic_long import CATEGORY, LIKED, category_probabilities


def floor(settings: SyntheticLongConfig, length: int) -> float:
    """NE of the best prediction after the newest `length` events: its expected log loss over the
    entropy of the share of likes, a / (a + b).
    """
    a, b = settings.likes, settings.others
    p_C = category_probabilities(settings)
    loss_N = _losses(_largest(length, p_C[0]), a, b)
    n_N = np.arange(len(loss_N))
    loss = sum(p * float(stats.binom.pmf(n_N, length, p) @ loss_N) for p in p_C.tolist())
    return loss / _entropy(a / (a + b))


def lowest(settings: SyntheticLongConfig) -> float:
    """NE of knowing every theta: what the floor falls to as histories grow."""
    a, b = settings.likes, settings.others
    total = a + b
    # E[-theta log theta] of Beta(a, b), from the derivative of its moments.
    loss = sum(
        one / total * (special.digamma(total + 1) - special.digamma(one + 1)) for one in (a, b)
    )
    return float(loss) / _entropy(a / total)


def logits(
    interactions: Interactions,
    settings: SyntheticLongConfig,
    start: Int64[np.ndarray, " n"],
    stop: Int64[np.ndarray, " n"],
    targets: Sequence[Int64[np.ndarray, " _"]],
) -> list[Float64[np.ndarray, " _"]]:
    """The log odds of the best prediction of each request's targets.

    Args:
        start, stop: of each request's history, a range of events.
        targets: events that each request asks about.
    """
    size = settings.categories + 1
    category_E, liked_E = interactions.actions[CATEGORY], interactions.actions[LIKED]
    found = []
    for first, last, asked in zip(start.tolist(), stop.tolist(), targets, strict=True):
        history = category_E[first:last]
        events_C = np.bincount(history, minlength=size)
        likes_C = np.bincount(history[liked_E[first:last] == 1], minlength=size)
        n, s = events_C[category_E[asked]], likes_C[category_E[asked]]
        found.append(np.log(settings.likes + s) - np.log(settings.others + n - s))
    return found


def _largest(length: int, p: float) -> int:
    """The number of events of a category that more than a share of 1e-15 of histories exceeds."""
    return int(stats.binom.isf(1e-15, length, p)) if length else 0


def _losses(most: int, a: float, b: float) -> Float64[np.ndarray, " n"]:
    """The expected log loss of the next event after 0..most events of its category."""
    k = np.arange(most + 1)
    fact, of_a, of_b, of_both = (special.gammaln(k + one) for one in (1, a, b, a + b))
    log_a, log_b, log_both = np.log(k + a), np.log(k + b), np.log(k + a + b)
    found = np.empty(most + 1)
    for n in k.tolist():
        s, others = k[: n + 1], k[n::-1]
        log_pmf = fact[n] - fact[s] - fact[others] + of_a[s] + of_b[others] - of_both[n]
        pmf = np.exp(log_pmf - special.betaln(a, b))
        mean_log = ((a + s) * log_a[s] + (b + others) * log_b[others]) / (a + b + n)
        found[n] = log_both[n] - pmf @ mean_log
    return found


def _entropy(p: float) -> float:
    """In nats, of an event of probability p in (0, 1)."""
    return -p * math.log(p) - (1 - p) * math.log1p(-p)
