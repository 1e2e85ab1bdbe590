"""Metrics of ranking, exact, in float64 on the host: NE, AUC, grouped AUC, log loss, squared error.

All take one value a prediction and a weight that is not negative; entries of weight 0 count nowhere
and may hold anything. What has no value (no prediction, one class only, a logit that is NaN) is
NaN, never 0.
"""

import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Int, Num, Shaped

Values = Float[np.ndarray, " P"]
Numbers = Num[np.ndarray, " P"]
Groups = Shaped[np.ndarray, " P"]
Used = Float[np.ndarray, " U"]


def log_loss(logit_P: Values, label_P: Numbers, weight_P: Numbers) -> float:
    """The weighted mean of `-log sigmoid(x)` (label 1) and `-log sigmoid(-x)` (label 0), in nats.

    Raises:
      ValueError: labels outside {0, 1}, a negative weight.
    """
    logit_P, label_P, weight_P = _used(logit_P, label_P, weight_P, binary=True)
    return _mean(_cross_entropy(logit_P, label_P), weight_P)


def normalized_entropy(logit_P: Values, label_P: Numbers, weight_P: Numbers) -> float:
    """NE: the log loss over that of always predicting the base rate (He et al. 2014).

    The base rate is `base_rate` of the same evaluated entries, not of the training data: NE below 1
    beats the best constant in hindsight. With one class only that constant's log loss is 0 and NE
    is NaN.

    Raises:
      ValueError: labels outside {0, 1}, a negative weight.
    """
    logit_P, label_P, weight_P = _used(logit_P, label_P, weight_P, binary=True)
    rate = _mean(label_P, weight_P)
    if not 0 < rate < 1:
        return np.nan
    return _mean(_cross_entropy(logit_P, label_P), weight_P) / -(
        rate * math.log(rate) + (1 - rate) * math.log1p(-rate)
    )


def base_rate(label_P: Numbers, weight_P: Numbers) -> float:
    """The weighted share of ones.

    Raises ValueError for labels outside {0, 1} or a negative weight.
    """
    label_P, _, weight_P = _used(label_P, label_P, weight_P, binary=True)
    return _mean(label_P, weight_P)


def auc(logit_P: Values, label_P: Numbers, weight_P: Numbers) -> float:
    """The share of pairs (a one, a zero) in which the one has the higher logit; ties count half.

    NaN with one class only.

    A pair weighs the product of its weights. Exact: from sorted order, no bins.

    Raises:
      ValueError: labels outside {0, 1}, a negative weight.
    """
    return grouped_auc(logit_P, label_P, weight_P, np.zeros(len(logit_P), np.int32))


def grouped_auc(logit_P: Values, label_P: Numbers, weight_P: Numbers, group_P: Groups) -> float:
    """GAUC: the mean of the groups' AUC, weighted by their impressions (the sum of the weights).

    A group with one class only has no AUC and is left out of both sums; NaN where every group is
    such (Zhou et al. 2018, Deep Interest Network).

    Raises:
      ValueError: labels outside {0, 1}, a negative weight.
    """
    group_P = group_P[weight_P != 0]
    logit_P, label_P, weight_P = _used(logit_P, label_P, weight_P, binary=True)
    if not len(logit_P) or np.isnan(logit_P).any():
        return np.nan
    order_P = np.lexsort((logit_P, group_P))
    logit_P, group_P = logit_P[order_P], group_P[order_P]
    one_P, zero_P = (weight_P * label_P)[order_P], (weight_P * (1 - label_P))[order_P]
    group_first_G = _starts(group_P[1:] != group_P[:-1])
    # V: equal logits of one group.
    tie_first_V = _starts((group_P[1:] != group_P[:-1]) | (logit_P[1:] != logit_P[:-1]))
    one_V, zero_V = np.add.reduceat(one_P, tie_first_V), np.add.reduceat(zero_P, tie_first_V)
    value_first_G = np.searchsorted(tie_first_V, group_first_G)
    before_V = np.cumsum(zero_V) - zero_V
    values_G = np.diff(value_first_G, append=len(tie_first_V))
    below_V = before_V - np.repeat(before_V[value_first_G], values_G)  # zeros of the group below
    pairs_G = np.add.reduceat(one_V * (below_V + zero_V / 2), value_first_G)
    one_G, zero_G = np.add.reduceat(one_V, value_first_G), np.add.reduceat(zero_V, value_first_G)
    both_G = (one_G > 0) & (zero_G > 0)
    return _mean(pairs_G[both_G] / (one_G * zero_G)[both_G], (one_G + zero_G)[both_G])


def mse(value_P: Values, label_P: Numbers, weight_P: Numbers) -> float:
    """The weighted mean of `(value - label)^2`. Raises ValueError for a negative weight."""
    value_P, label_P, weight_P = _used(value_P, label_P, weight_P, binary=False)
    return _mean(np.square(value_P - label_P), weight_P)


def ranking_metrics(
    logit_PK: Float[np.ndarray, "P K"],
    label_PK: Num[np.ndarray, "P K"],
    weight_PK: Num[np.ndarray, "P K"],
    user_P: Groups,
    tasks: Mapping[str, str],
) -> dict[str, float]:
    """Every metric of every task, as "ne/correct", and the means over tasks.

    Args:
      user_P: the groups of grouped AUC.
      tasks: name -> "binary" or "regression", in the order of the K columns.

    Returns:
      Binary tasks: "ne/", "auc/", "gauc/", "log_loss/" and "base_rate/" with the task's name;
      regressions: "mse/". "ne" is the mean of the binary tasks' NE, those with one class only left
      out; "mse" is the mean over the regressions.

    Raises:
      ValueError: an unknown kind, not one task a column, labels of a binary task outside {0, 1}
        (named).
    """
    if len(tasks) != logit_PK.shape[1] or not set(tasks.values()) <= {"binary", "regression"}:
        raise ValueError(
            f"tasks={dict(tasks)} must say 'binary' or 'regression' for each of the "
            f"{logit_PK.shape[1]} columns"
        )
    metrics: dict[str, float] = {}
    normalised, squared = [], []
    for k, (name, kind) in enumerate(tasks.items()):
        logit_P, label_P, weight_P = logit_PK[:, k], label_PK[:, k], weight_PK[:, k]
        if kind == "regression":
            metrics[f"mse/{name}"] = mse(logit_P, label_P, weight_P)
            squared.append(metrics[f"mse/{name}"])
            continue
        try:
            rate = metrics[f"base_rate/{name}"] = base_rate(label_P, weight_P)
        except ValueError as error:
            raise ValueError(f"task {name!r}: {error}") from None
        metrics[f"ne/{name}"] = normalized_entropy(logit_P, label_P, weight_P)
        metrics[f"auc/{name}"] = auc(logit_P, label_P, weight_P)
        metrics[f"gauc/{name}"] = grouped_auc(logit_P, label_P, weight_P, user_P)
        metrics[f"log_loss/{name}"] = log_loss(logit_P, label_P, weight_P)
        if 0 < rate < 1:
            normalised.append(metrics[f"ne/{name}"])
    if "binary" in tasks.values():
        metrics["ne"] = float(np.mean(normalised)) if normalised else np.nan
    if "regression" in tasks.values():
        metrics["mse"] = float(np.mean(squared))
    return metrics


def _used(
    value_P: Numbers, label_P: Numbers, weight_P: Numbers, *, binary: bool
) -> tuple[Used, Used, Used]:
    """The entries that count, as float64, checked."""
    used_P = weight_P != 0
    value_P, label_P, weight_P = (
        array[used_P].astype(np.float64) for array in (value_P, label_P, weight_P)
    )
    if not (weight_P > 0).all():
        raise ValueError(f"weights must be at least 0, not {weight_P[~(weight_P > 0)][0]}")
    if binary and not (bad_P := np.isin(label_P, (0, 1))).all():
        raise ValueError(
            f"labels must be 0 or 1, not {label_P[~bad_P][0]:g}: a regression takes other numbers"
        )
    return value_P, label_P, weight_P


def _cross_entropy(logit_P: Values, label_P: Values) -> Values:
    wrong_P = np.where(label_P > 0, -logit_P, logit_P)
    # log(1 + exp(wrong)), for infinite ones too.
    return np.maximum(wrong_P, 0.0) + np.log1p(np.exp(-np.abs(wrong_P)))


def _mean(value_P: Values, weight_P: Values) -> float:
    total = float(weight_P.sum())
    return float((value_P * weight_P).sum()) / total if total > 0 else np.nan


def _starts(change_P: Bool[np.ndarray, " p"]) -> Int[np.ndarray, " starts"]:
    return np.concatenate([[0], np.flatnonzero(change_P) + 1])
