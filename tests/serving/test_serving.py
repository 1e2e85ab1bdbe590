"""Cached scoring says what one full forward pass says, for every form of model and any batches.

A growing cache says what a new one would.
"""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from tests.serving.small_serving import DATA, FORMS, built, full_pass, requests, task_of
from ultra_hstu import serving, tasks
from ultra_hstu.serving.score import growth


def close(got, want, form, bound=1e-5):
    scale = np.abs(want).max()
    np.testing.assert_allclose(got, want, atol=(3e-2 if "bfloat16" in form else bound) * scale)
    assert want.std() > 1e-3 * scale, "the scores differ among themselves"


@pytest.mark.parametrize("form", FORMS)
def test_scores_are_those_of_a_full_pass(form):
    """Users with long, short and no histories; different numbers of candidates."""
    history, candidates, want = full_pass(form)
    assert len({*np.diff(candidates.offsets).tolist()}) > 2
    encoded = serving.encode_history(built(form)[1], history)
    close(serving.score(built(form)[1], encoded, candidates), want, form)


@pytest.mark.parametrize("micro_batch", [1, 5])
def test_micro_batches(micro_batch):
    """Also steps that straddle users, and a last one that is not full."""
    history, candidates, want = full_pass("ULTRA")
    model = serving.CompiledRanker(built("ULTRA")[1])
    encoded = serving.encode_history(model, history)
    close(serving.score(model, encoded, candidates, micro_batch=micro_batch), want, "ULTRA")


def test_matrices_of_layers_are_rounded_once():
    """A compiled ranker holds them in the dtype of its layers, and says the same to the bit.

    fp8 rounds the float32 ones.
    """
    config = task_of("merged").config
    task = tasks.of(
        dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16")), DATA
    )
    ranker, (history, candidates, _) = (
        task.recipe.model(task.recipe.init(0).params),
        full_pass("merged"),
    )
    rounded, plain = serving.CompiledRanker(ranker), serving.CompiledRanker(ranker)
    plain.params = nnx.split(ranker)[1]

    def dtypes(model):
        return {
            (".".join(map(str, path)), str(leaf.dtype))
            for path, leaf in nnx.to_flat_state(model.params)
        }

    changed = {
        name.rpartition(".")[2]
        for name, dtype in dtypes(rounded) - dtypes(plain)
        if dtype == "bfloat16"
    }
    assert changed == {"uvqk", "output"} and all(
        "layers" in name for name, _ in dtypes(rounded) - dtypes(plain)
    )
    scores = [
        serving.score(model, serving.encode_history(model, history), candidates, micro_batch=5)
        for model in (rounded, plain)
    ]
    np.testing.assert_array_equal(*scores)
    held = [
        leaf
        for encoder in rounded.encoders.values()
        for leaf in jax.tree.leaves(nnx.state(encoder))
    ]
    assert held and not any(isinstance(leaf, jax.Array) for leaf in held), (
        "the float32 ones are not kept alive"
    )
    assert {dtype for _, dtype in dtypes(serving.CompiledRanker(built("bfloat16, fp8")[1]))} == {
        "float32"
    }


def histories(form, *left_B):
    """The histories of `full_pass` in pieces.

    The first leaves out the newest left_B[0] events of each user, the next goes up to left_B[1],
    ..., the last has the rest.
    """
    task, model, _ = built(form)
    columns = requests(task)[0]
    names = [name.removeprefix("start/") for name in columns if name.startswith("start/")]
    pieces, done = [], {name: columns[f"start/{name}"] for name in names}
    for left in (*left_B, np.zeros(len(columns["user"]), int)):
        piece = dict(columns)
        for name in names:
            piece[f"start/{name}"] = done[name]
            piece[f"stop/{name}"] = done[name] = np.maximum(
                columns[f"stop/{name}"] - left, done[name]
            )
        pieces.append(serving.from_source(task.events, piece, model.form)[0])
    return pieces


@pytest.mark.parametrize("form", FORMS)
def test_appended_events(form):
    """In two steps, different users growing by different numbers; the request's time moves too."""
    _, candidates, want = full_pass(form)
    model = serving.CompiledRanker(built(form)[1])
    first, *new = histories(form, np.array([3, 0, 2, 4, 5, 0, 1]), np.array([2, 0, 1, 0, 5, 0, 0]))
    encoded = serving.encode_history(
        model, dataclasses.replace(first, now_B=np.asarray(first.now_B) - 1000)
    )
    for events in new:
        encoded = serving.append(model, encoded, events)
    close(serving.score(model, encoded, candidates), want, form)


def test_what_stays_of_a_growing_cache(monkeypatch):
    """Rows computed anew.

    Histories of 11, 0, 2, 12, 12, 12 and 5 events come without the newest 3, 0, 2, 4, 5, 0 and 1.
    """
    left = np.array([3, 0, 2, 4, 5, 0, 1])

    def grown(form, channel="events"):
        before, added = histories(form, left)
        model, (whole,) = built(form)[1], histories(form)
        parts = (events.channels[channel].lengths for events in (before, whole, added))
        return growth(model.encoders[channel], model.form, *parts)

    added = left.sum()
    assert grown("bfloat16, fp8").new_rows == added, "a window alone: the new rows"
    masks, ultra, biased = grown("a mask a layer"), grown("ULTRA"), grown("biased, truncated")
    assert masks.keep_B.tolist() == [5, 0, 0, 5, 4, 12, 1], "three full rows lose what they saw"
    assert biased.keep_B.tolist() == [7, 0, 0, 7, 6, 11, 3], (
        "the last row asks at another time, without new events too"
    )
    assert ultra.keep_B.tolist() == [6, 0, 0, 6, 5, 12, 2]
    assert ultra.keep_kept_B.tolist() == [0, 0, 0, 0, 0, 5, 2], (
        "of five rows above the truncation, where others have fallen off none"
    )
    assert biased.keep_kept_B.tolist() == [0, 0, 0, 0, 0, 4, 3]
    interleaved = grown("interleaved, biased")
    assert interleaved.new_rows == 2 * added + 6 - 1, (
        "of everybody who has had events the last row, that of the action"
    )
    assert grown("merged").keep_B.tolist() == [0, 0, 0, 0, 0, 12, 0], (
        "positions count from the targets"
    )
    assert grown("contextual").nothing_stays
    encoder = built("ULTRA")[1].encoders["events"]
    monkeypatch.setattr(encoder, "divisor", dataclasses.replace(encoder.divisor, by="length"))
    assert grown("ULTRA").keep_B.tolist() == [0, 0, 0, 0, 0, 12, 0], "every row is divided anew"
