"""Slow, plain definitions of everything that a reader will quote, from the raw files on.

Python's own numbers and loops alone, and nothing of the product: what is tested against this cannot
share a mistake with it. Files are in the format of MovieLens-1M.
"""

import fractions
import math
from typing import NamedTuple

CUTOFFS = (1, 5, 10, 50, 100, 200)
NOT_FOUND = 2501  # the rank of a target that is not among the best 2500, or hidden


class Event(NamedTuple):
    item: int
    rating: int
    time: int


class Example(NamedTuple):
    """A history, oldest event first, and the event that follows it."""

    user: int
    history: list[Event]
    target: Event


# --- files, order, split ---


def read_catalogue(path) -> list[int]:
    """Movie ids, ascending: the dense id of a movie is its place among them, from 1."""
    return sorted(int(line.split("::")[0]) for line in path.read_text("latin-1").splitlines())


def read_histories(path, fewest=3) -> dict[int, list[Event]]:
    """Each user's events by time, in the order of the file where times are equal.

    A line that repeats an earlier one of the same user, movie and time does not count, nor does a
    user with fewer than 3 events.
    """
    users: dict[int, list[Event]] = {}
    known = set()
    for line in path.read_text().splitlines():
        user, item, rating, time = map(int, line.split("::"))
        if (user, item, time) not in known:
            known.add((user, item, time))
            users.setdefault(user, []).append(Event(item, rating, time))
    return {
        user: sorted(events, key=lambda event: event.time)
        for user, events in sorted(users.items())
        if len(events) >= fewest
    }


def examples(histories, protocol, part, max_history, newest=0.1) -> list[Example]:
    """The examples of "train", "validation" or "test", at most one a user.

    The target stands at a place of the user's events; its history is the newest `max_history`
    events before it. In training the events of the history are targets, too, save the first.
    """
    if protocol == "temporal":
        times = sorted(event.time for events in histories.values() for event in events)
        cut = times[min(int(len(times) * (1 - newest)), len(times) - 1)]
    back = {"test": 0, "validation": 1, "train": 1 if protocol == "published" else 2}[part]
    found = []
    for user, events in histories.items():
        tested = len(events) - 1
        if protocol == "temporal":
            tested = sum(event.time < cut for event in events)
            if part == "test" and tested == len(events):
                continue  # no event from the cut on
        place = tested - back
        if place >= 1:
            history = events[:place][-max_history:]
            found.append(Example(user, history, events[place]))
    return found


def share(count, fraction) -> int:
    """floor(fraction * count), with the fraction as it is written."""
    return math.floor(fractions.Fraction(str(fraction)) * count)


def chronological(events, validation, test) -> dict[str, list[Event]]:
    """A user's events for ranking: the newest are test events, those before them validation."""
    last = len(events) - share(len(events), test)
    middle = last - share(len(events), validation)
    return {"train": events[:middle], "validation": events[middle:last], "test": events[last:]}


# --- retrieval ---


def cosine(user, item) -> float:
    """The user's vector with the normalised item: the order of a cosine."""
    norm = math.sqrt(math.fsum(x * x for x in item))
    return math.fsum(x * y for x, y in zip(user, item, strict=True)) / max(norm, 1e-6)


def rank(scores, target, hidden) -> int:
    """The target's rank among the items that are not hidden; what scores the same is better."""
    if target in hidden:
        return NOT_FOUND
    better = 0
    for item, score in scores.items():
        if item != target and item not in hidden and score >= scores[target]:
            better += 1
    return min(better + 1, NOT_FOUND)


def retrieval_metrics(ranks, repeats) -> dict[str, float]:
    """Means over users; `repeats` says of each whether its target stands in what is hidden."""
    metrics = {"mrr": sum(1 / found for found in ranks) / len(ranks)}
    metrics["repeats"] = sum(repeats) / len(repeats)
    for k in CUTOFFS:
        hits = [found for found in ranks if found <= k]
        metrics[f"hr@{k}"] = len(hits) / len(ranks)
        metrics[f"ndcg@{k}"] = sum(1 / math.log2(found + 1) for found in hits) / len(ranks)
    return metrics


# --- ranking; predictions are (user, logit, label), of weight 1 ---


def log_loss(predictions) -> float:
    total = 0.0
    for _, logit, label in predictions:
        probability = 1 / (1 + math.exp(-logit))
        total -= math.log(probability if label == 1 else 1 - probability)
    return total / len(predictions)


def base_rate(predictions) -> float:
    return sum(label for *_, label in predictions) / len(predictions)


def normalized_entropy(predictions) -> float:
    rate = base_rate(predictions)
    return log_loss(predictions) / -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))


def auc(predictions) -> float | None:
    """The share of pairs in the right order, ties a half; None with one class only."""
    ones = [logit for _, logit, label in predictions if label == 1]
    zeros = [logit for _, logit, label in predictions if label == 0]
    if not ones or not zeros:
        return None
    won = sum(1.0 if one > zero else 0.5 if one == zero else 0.0 for one in ones for zero in zeros)
    return won / (len(ones) * len(zeros))


def grouped_auc(predictions) -> float:
    total = weight = 0.0
    for user in {user for user, *_ in predictions}:
        own = [prediction for prediction in predictions if prediction[0] == user]
        if (value := auc(own)) is not None:
            total += len(own) * value
            weight += len(own)
    return total / weight
