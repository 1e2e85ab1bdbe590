"""What needs no model: four simple recommenders, on the same targets as a model.

- random: the mean over all orders of the catalogue, exact.
- popularity: by how often an item occurs in training.
- last item's neighbours: by how often an item came directly after the user's last one.
- item-item: by the sum, over the history, of the cosine of the users that two items share (Sarwar
  et al. 2001).

They know training events alone, and order the whole catalogue by (score, popularity, lower id), so
that no two items tie: an item without a score stands behind those that have one.

No array grows with the square of the catalogue. An item keeps its 50 best neighbours, and of a
user the newest 100 events are read, in training and before a target. So pairs of items cost at most
100 additions a training event, and scores 5,000 a target, in blocks, on one core of the host; the
neighbours of an item take at most 600 bytes.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int
from scipy import sparse

from ultra_hstu.criteria import Metrics
from ultra_hstu.retrieval.metrics import PUBLISHED_CUTOFF, mean_metrics
from ultra_hstu.retrieval.split import Examples

NEIGHBOURS = 50  # of an item
RECENT = 100  # events of a user
BLOCK_EVENTS = 50_000  # training events of the items whose pairs are counted at one time
BLOCK_USERS = 256  # users who are scored at one time

PerEvent = Int[np.ndarray, " E"]
PerUser = Int[np.ndarray, " U"]


def baselines(
    item_E: PerEvent,
    popularity_I1: Int[np.ndarray, " I1"],
    train: Examples,
    test: Examples,
    *,
    hides: bool,
) -> dict[str, Metrics]:
    """The metrics of all four on the targets of `test`, as a `CorpusEvaluator` gives them.

    Args:
      item_E: the items of all events, 1..I.
      popularity_I1: how often each item occurs in training; entry 0 is padding.
      hides: leave out the items of each user's earlier events, as `eval.repeats="hide"` does.
    """
    items = len(popularity_I1) - 1
    # Items are numbered by popularity from here on, the best 0: lower numbers win ties.
    number_I1 = np.zeros(items + 1, np.int64)
    number_I1[1 + np.argsort(-popularity_I1[1:], kind="stable")] = np.arange(items)
    number_E = number_I1[item_E]
    target_U = number_E[test.stop]
    first_U = test.start if test.hide_from is None else test.hide_from
    met = _items_of(number_E, first_U, test.stop, items)
    met_U = np.isin(np.arange(len(target_U)) * items + target_U, _keys(met))
    hidden = met if hides else sparse.csr_array(met.shape)
    lost_U = met_U & hides

    def of_scores(score: sparse.csr_array) -> Metrics:
        ahead_U = np.concatenate(
            [
                _ahead(score[users], target_U[users], hidden[users])
                for users in _blocks(np.arange(len(target_U)) // BLOCK_USERS)
            ]
        )
        found_U = ~lost_U & (ahead_U < PUBLISHED_CUTOFF)
        return mean_metrics(np.where(found_U, ahead_U + 1, PUBLISHED_CUTOFF + 1))

    last_U, recent_U = test.stop - 1, np.maximum(test.start, test.stop - RECENT)
    last = _items_of(number_E, last_U, test.stop, items)
    history = _items_of(number_E, recent_U, test.stop, items)
    ranked_U = items - np.diff(hidden.indptr)
    found = {
        "random": mean_metrics(*_random_ranks(ranked_U[~lost_U], int(lost_U.sum()))),
        "popularity": of_scores(sparse.csr_array(met.shape)),
        "last item's neighbours": of_scores(last @ _followers(number_E, train, items)),
        "item-item": of_scores(history @ _similar(number_E, train, items)),
    }
    return {name: values | {"repeats": float(met_U.mean())} for name, values in found.items()}


def _ahead(score: sparse.csr_array, target_U: PerUser, hidden: sparse.csr_array) -> PerUser:
    """How many items that are not hidden stand before each target.

    Args:
      score: [U, I], above 0 where an item has one.
      hidden: [U, I], an entry where an item is left out.
    """
    users, items = score.shape
    user_X, item_X = _users(score), score.indices
    goal_U = np.zeros(users)
    at_X = item_X == target_U[user_X]
    goal_U[user_X[at_X]] = score.data[at_X]
    shown_X = ~np.isin(_keys(score), _keys(hidden))
    popular_X = item_X < target_U[user_X]
    tied_X = score.data == goal_U[user_X]
    before_X = shown_X & ((score.data > goal_U[user_X]) | (tied_X & popular_X))
    ahead_U = np.bincount(user_X[before_X], minlength=users)
    # Without a score, a target also stands behind the more popular of those that have none either.
    popular_H = hidden.indices < target_U[_users(hidden)]
    rest_U = target_U - np.bincount(_users(hidden)[popular_H], minlength=users)
    rest_U -= np.bincount(user_X[shown_X & popular_X], minlength=users)
    return ahead_U + np.where(goal_U == 0, rest_U, 0)


def _random_ranks(
    ranked_U: PerUser, lost: int
) -> tuple[Int[np.ndarray, " R"], np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """Ranks from 1 on, and how many targets have each, in the mean over all orders of the items.

    Args:
      ranked_U: how many items are ranked for a user, the target among them.
      lost: how many targets more are not found.
    """
    rank_R = np.arange(1, PUBLISHED_CUTOFF + 2)
    ranked_U = np.sort(ranked_U)
    share_U = np.append(np.cumsum((1 / ranked_U)[::-1])[::-1], 0.0)  # 1 / n of this user and later
    weight_R = share_U[np.searchsorted(ranked_U, rank_R)]
    weight_R[-1] = len(ranked_U) + lost - weight_R[:-1].sum()
    return rank_R, weight_R


def _followers(number_E: PerEvent, train: Examples, items: int) -> sparse.csr_array:
    """[I, I]: how often an item came directly after another in training."""
    _, event_X = _events(train.start, train.stop)
    pairs = (np.ones(len(event_X)), (number_E[event_X], number_E[event_X + 1]))
    return _strongest(sparse.csr_array(pairs, shape=(items, items)))


def _similar(number_E: PerEvent, train: Examples, items: int) -> sparse.csr_array:
    """[I, I]: cosines of the users who met two items in training."""
    first_U = np.maximum(train.start, train.stop + 1 - RECENT)
    seen = _items_of(number_E, first_U, train.stop + 1, items)
    users_I = np.bincount(seen.indices, minlength=items)
    by_item, parts = seen.T.tocsr(), []
    for block in _blocks(np.cumsum(users_I) // BLOCK_EVENTS):
        shared = by_item[block] @ seen
        own_X = users_I[block][_users(shared)]
        shared.data /= np.sqrt(own_X * users_I[shared.indices])  # one rounding: equals stay equal
        parts.append(_strongest(shared))
    return sparse.vstack(parts, format="csr")


def _strongest(score: sparse.csr_array) -> sparse.csr_array:
    """The `NEIGHBOURS` largest entries of every row, the lower column among equals."""
    score.sum_duplicates()
    row_X = _users(score)
    order_X = np.lexsort((-score.data, row_X))
    kept_X = order_X[np.arange(len(row_X)) - score.indptr[row_X] < NEIGHBOURS]
    entries = (score.data[kept_X], (row_X[kept_X], score.indices[kept_X]))
    return sparse.csr_array(entries, shape=score.shape)


def _items_of(
    number_E: PerEvent, first_U: PerUser, stop_U: PerUser, items: int
) -> sparse.csr_array:
    """[U, I]: 1 where an item is among events first..stop-1 of a user."""
    user_X, event_X = _events(first_U, stop_U)
    entries = (np.ones(len(user_X)), (user_X, number_E[event_X]))
    found = sparse.csr_array(entries, shape=(len(first_U), items))
    found.sum_duplicates()
    found.data[:] = 1
    return found


def _events(first_U: PerUser, stop_U: PerUser) -> tuple[PerEvent, PerEvent]:
    """Every event of the stretches first..stop-1, behind whose stretch it is of."""
    length_U = stop_U - first_U
    user_X = np.repeat(np.arange(len(length_U)), length_U)
    return user_X, np.arange(len(user_X)) + (first_U - np.cumsum(length_U) + length_U)[user_X]


def _users(matrix: sparse.csr_array) -> PerEvent:
    """The row of every entry."""
    return np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))


def _keys(matrix: sparse.csr_array) -> PerEvent:
    """One number for every place that has an entry."""
    return _users(matrix) * matrix.shape[1] + matrix.indices


def _blocks(block_X: Int[np.ndarray, " X"]) -> Iterator[slice]:
    """The stretches of equal numbers."""
    edges = [0, *(np.flatnonzero(np.diff(block_X)) + 1).tolist(), len(block_X)]
    yield from map(slice, edges[:-1], edges[1:])
