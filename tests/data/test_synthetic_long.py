"""Long synthetic histories, and the best possible prediction of them."""

import math

import numpy as np
import pytest

from tests.data.data_files import load
from ultra_hstu.config import SyntheticLongConfig
from ultra_hstu.data import best_prediction, synthetic_long
from ultra_hstu.data.synthetic_long import CATEGORY, LIKED

SMALL = SyntheticLongConfig(
    users=3000, length=80, categories=8, items_per_category=3, likes=0.5, others=1.0
)


@pytest.fixture(scope="module")
def data():
    return synthetic_long.draw(SMALL)


def test_what_is_drawn(data):
    """Categories by their power law, items within them; likes by user and category."""
    category_E, liked_E = data.actions[CATEGORY], data.actions[LIKED]
    assert ((data.items - 1) % 8 + 1 == category_E).all()
    assert data.num_items == 24 and len(np.unique(data.items)) == 24
    share_C = np.bincount(category_E, minlength=9)[1:] / data.num_events
    np.testing.assert_allclose(share_C, synthetic_long.category_probabilities(SMALL), atol=0.004)
    assert share_C[0] == pytest.approx(2 * share_C[1], rel=0.05)
    # Beta(1/2, 1): mean 1/3, and two events of a category are both liked with its second moment.
    assert liked_E.mean() == pytest.approx(1 / 3, abs=0.01)
    user_E = np.repeat(np.arange(data.num_users), data.lengths)
    likes_UC, events_UC = (np.zeros((3000, 9)) for _ in range(2))
    np.add.at(likes_UC, (user_E, category_E), liked_E)
    np.add.at(events_UC, (user_E, category_E), 1)
    both = (likes_UC * (likes_UC - 1)).sum() / (events_UC * (events_UC - 1)).sum()
    assert both == pytest.approx(0.5 * 1.5 / (1.5 * 2.5), abs=0.01)


def test_the_posterior_is_that_of_counting(data):
    start, stop = np.array([0, 97]), np.array([50, 97])
    targets = [np.array([50, 51, 52]), np.array([97])]
    logits = best_prediction.logits(data, SMALL, start, stop, targets)
    for first, last, asked, found in zip(start, stop, targets, logits, strict=True):
        for event, logit in zip(asked, found, strict=True):
            same = [
                e
                for e in range(first, last)
                if data.actions[CATEGORY][e] == data.actions[CATEGORY][event]
            ]
            likes = sum(int(data.actions[LIKED][e]) for e in same)
            p = (0.5 + likes) / (1.5 + len(same))
            assert logit == pytest.approx(math.log(p / (1 - p)))


def test_the_floor_is_the_loss_of_the_best_prediction(data):
    """And it falls with length, to the loss of knowing everything."""
    entropy = -(math.log(1 / 3) / 3 + 2 / 3 * math.log(2 / 3))
    for length in (5, 60):
        first = data.offsets[:-1] + length
        asked = [np.arange(at, at + 20) for at in first]
        logit_UM = np.stack(best_prediction.logits(data, SMALL, first - length, first, asked))
        wrong_UM = np.where(data.actions[LIKED][np.stack(asked)] == 1, -logit_UM, logit_UM)
        loss_U = np.logaddexp(0, wrong_UM).mean(1) / entropy
        error = loss_U.std() / math.sqrt(len(loss_U))
        assert abs(loss_U.mean() - best_prediction.floor(SMALL, length)) < 4 * error < 0.03
    floors = [best_prediction.floor(SMALL, length) for length in (0, 1, 4, 64, 4096)]
    assert floors[0] == pytest.approx(1)
    assert (np.diff(floors) < 0).all()
    assert best_prediction.lowest(SMALL) < floors[-1] < best_prediction.lowest(SMALL) + 0.01
    theta = np.random.default_rng(0).beta(0.5, 1.0, 200_000)
    knowing = -(theta * np.log(theta) + (1 - theta) * np.log1p(-theta)).mean() / entropy
    assert best_prediction.lowest(SMALL) == pytest.approx(knowing, abs=0.003)


def test_it_is_prepared_once_and_depends_on_its_settings(tmp_path, monkeypatch):
    small = SyntheticLongConfig(users=4, length=6, categories=3)
    made = load(tmp_path, "synthetic_long", synthetic_long=small)
    assert made.fingerprint() == synthetic_long.draw(small).fingerprint()
    assert made.timestamps is None and made.features == (CATEGORY,)
    other = SyntheticLongConfig(users=4, length=6, categories=3, seed=1)
    changed = load(tmp_path, "synthetic_long", synthetic_long=other).fingerprint()
    assert changed["sha256"] != made.fingerprint()["sha256"]
    monkeypatch.setattr(synthetic_long, "draw", lambda _: pytest.fail("drawn a second time"))
    load(tmp_path, "synthetic_long", synthetic_long=small)
    with pytest.raises(ValueError, match="synthetic_long is generated: it reads no raw_dir"):
        load(tmp_path, "synthetic_long", tmp_path, synthetic_long=small)
