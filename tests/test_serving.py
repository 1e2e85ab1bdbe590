"""Cached scoring says what one full forward pass says, for every form of model, whatever the batches; and a growing cache what a new one would."""

import dataclasses

import jax
import numpy as np
import pytest
from small_serving import FORMS, MAX_HISTORY, built, full_pass, requests

from ultra_hstu import serving
from ultra_hstu.serving import cache as caches
from ultra_hstu.serving.capacity import capacity


def close(got, want, form, bound=1e-5):
    scale = np.abs(want).max()
    np.testing.assert_allclose(got, want, atol=(3e-2 if "bfloat16" in form else bound) * scale)
    assert want.std() > 1e-3 * scale, "the scores differ among themselves"


def of_user(candidates, user):
    """The candidates of one user, and where they stand."""
    span = slice(candidates.offsets[user], candidates.offsets[user + 1])
    part = [None if x is None else np.asarray(x)[span] for x in (candidates.item_C, candidates.feature_CF, candidates.time_C)]
    return serving.Candidates(*part, np.array([0, span.stop - span.start])), span


@pytest.mark.parametrize("form", FORMS)
def test_scores_are_those_of_a_full_pass(form):
    """Users with long, short and no histories; different numbers of candidates."""
    history, candidates, want = full_pass(form)
    assert len({*np.diff(candidates.offsets).tolist()}) > 2
    cache = serving.encode_history(built(form)[1], history)
    close(serving.score(built(form)[1], cache, candidates), want, form)


@pytest.mark.parametrize("micro_batch", [1, 5])
def test_micro_batches(micro_batch):
    """Also steps that straddle users, and a last one that is not full."""
    history, candidates, want = full_pass("ULTRA")
    model = serving.FrozenRanker(built("ULTRA")[1])
    cache = serving.encode_history(model, history)
    close(serving.score(model, cache, candidates, micro_batch=micro_batch), want, "ULTRA")


# How many of the newest events of every user come later, twice; the second user begins without any.
LATER = {"one": ((1, 0, 0, 2), (0, 0, 1, 1)), "many": ((0, 0, 4, 0), (5, 0, 3, 3))}
ALL_STAYS = {"ULTRA", "a mask a layer", "biased, truncated", "bfloat16, fp8", "interleaved, biased"}


def spans(form, later_B):
    """Columns of requests whose histories end `later_B` events before those of `full_pass`, and those of the events between."""
    task = built(form)[0]
    columns = requests(task)[0]
    before, between = dict(columns), dict(columns)
    later_B = np.pad(np.asarray(later_B), (0, len(columns["user"]) - len(later_B)))
    for name in (name.removeprefix("start/") for name in columns if name.startswith("start/")):
        start, stop = columns[f"start/{name}"], columns[f"stop/{name}"]
        before[f"stop/{name}"] = between[f"start/{name}"] = np.maximum(stop - later_B, start)
    form_ = built(form)[1].form
    return serving.from_source(task.source, before, form_)[0], serving.from_source(task.source, between, form_)[0]


@pytest.mark.parametrize("form", FORMS)
def test_appended_events(form):
    """In two steps, different users growing by different numbers; the request's time moves too."""
    _, candidates, want = full_pass(form)
    model = serving.FrozenRanker(built(form)[1])
    first, second = ((1, 0, 3, 2), (2, 0, 1, 0))
    history, middle = spans(form, np.add(first, second))[0], spans(form, second)[0]
    history = dataclasses.replace(history, now_B=np.asarray(history.now_B) - 1000)
    cache = serving.encode_history(model, history)
    new_events = {name: difference(history.channels[name], middle.channels[name]) for name in middle.channels}
    cache = serving.append(model, cache, dataclasses.replace(middle, channels=new_events))
    cache = serving.append(model, cache, spans(form, second)[1])
    close(serving.score(model, cache, candidates), want, form)


def difference(before, after):
    """The events of each user that `after` has and `before` has not."""
    span = [slice(stop - (n - m), stop) for stop, n, m in zip(after.offsets[1:], np.diff(after.offsets), np.diff(before.offsets), strict=True)]
    columns = ("item_E", "time_E", "signal_ES", "feature_EF")
    parts = {name: np.concatenate([getattr(after, name)[part] for part in span]) for name in columns}
    return serving.Events(**parts, offsets=np.concatenate([[0], np.cumsum([part.stop - part.start for part in span])]))
