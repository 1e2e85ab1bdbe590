"""A cache cut into users and put together again, at sizes that are chosen, scores as before."""

import dataclasses

import numpy as np
import pytest

from tests.serving.small_serving import built, full_pass
from ultra_hstu import serving
from ultra_hstu.nn.key_values import pack


def taken(candidates, users):
    """The candidates of some users, in their order, and where they stood."""
    spans = [np.arange(*candidates.offsets[user : user + 2]) for user in users]
    place_C = np.concatenate(spans)
    columns = {
        name: np.asarray(getattr(candidates, name))[place_C]
        for name in ("item_C", "feature_CF", "time_C")
    }
    return serving.Candidates(**columns, offsets=np.cumsum([0, *map(len, spans)])), place_C


@pytest.mark.parametrize("form", ["contextual", "mixture"])
def test_users_of_different_calls_score_as_in_a_full_pass(form):
    """Joined in other orders, one of them twice, one without history among them.

    One program serves all, and what does not fit is named.
    """
    history, candidates, want = full_pass(form)
    model = serving.CompiledRanker(built(form)[1])
    bucket = serving.Bucket(8, {name: 8 * longest for name, longest in model.form.max_history})
    cache = serving.encode_history(model, history, bucket=bucket)
    users = serving.split(cache)
    assert 0 < sum(user.nbytes for user in users) <= cache.nbytes
    programs = model.programs.score._cache_size()
    for order in ([4, 1, 6, 4, 0], [3], [0, 1, 2, 3, 4, 5, 6]):
        joined = serving.join(model, [users[user].copy() for user in order], bucket)
        assert joined.users == len(order) and joined.bucket_users == 8
        asked, place_C = taken(candidates, order)
        got = serving.score(model, joined, asked, micro_batch=8, bucket=64)
        np.testing.assert_allclose(got, want[place_C], atol=2e-5 * max(1, np.abs(want).max()))
    assert model.programs.score._cache_size() == programs + 1
    for call, message in (
        (
            lambda: serving.encode_history(model, history, bucket=serving.Bucket(3, bucket.events)),
            "7 users with .* are more than",
        ),
        (
            lambda: serving.join(model, users, serving.Bucket(3, bucket.events)),
            "7 users are more than",
        ),
        (
            lambda: serving.join(model, users, serving.Bucket(7, dict.fromkeys(bucket.events, 5))),
            "rows are more than the .* of the bucket",
        ),
        (
            lambda: serving.score(model, joined, candidates, bucket=3),
            "candidates are more than the 3 of the bucket",
        ),
        # The older name of the keyword.
        (
            lambda: serving.encode_history(model, history, room=serving.Room(3, bucket.events)),
            "7 users with .* are more than",
        ),
        (lambda: serving.score(model, joined, candidates, room=3), "more than the 3 of the bucket"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_small_keys_and_values_come_back_as_they_were(kind):
    """With their scales, below a truncation and above it."""
    model = serving.CompiledRanker(built("contextual")[1])
    bucket = serving.Bucket(8, {"events": 96})
    cache = serving.encode_history(model, full_pass("contextual")[0], bucket=bucket)
    small = tuple(
        dataclasses.replace(
            part, layers=tuple(pack(layer.k_SHK, layer.v_SHV, kind) for layer in part.layers)
        )
        for part in cache.channels["events"]
    )
    users = serving.split(dataclasses.replace(cache, channels={"events": small}))
    joined = serving.join(model, users, bucket).channels["events"]
    assert [len(part.layers) for part in joined] == [1, 2]
    for got, want in zip(joined, small, strict=True):
        rows = got.frame.offsets[-1]
        for one, other in zip(got.layers, want.layers, strict=True):
            for name in ("k_SHK", "v_SHV", "k_scale_SH1", "v_scale_SH1"):
                np.testing.assert_array_equal(
                    np.asarray(getattr(one, name))[:rows], np.asarray(getattr(other, name))[:rows]
                )
