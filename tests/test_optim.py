"""The learning rate over steps."""

import math

import pytest

from ultra_hstu.config import Config, OptimConfig, from_config_dict
from ultra_hstu.optim import learning_rate


def rates(**fields):
    schedule = learning_rate(OptimConfig(learning_rate=0.5, **fields))
    return [float(schedule(step)) for step in (0, 5, 10, 60, 110, 200)]


def test_constant():
    assert rates() == [0.5] * 6


def test_warm_up():
    assert rates(warmup_steps=10) == pytest.approx([0, 0.25, 0.5, 0.5, 0.5, 0.5])


def test_decay():
    assert rates(decay_steps=110) == pytest.approx(
        [0.25 * (1 + math.cos(math.pi * step / 110)) for step in (0, 5, 10, 60, 110)] + [0],
        abs=1e-7,
    )


def test_warm_up_and_decay():
    assert rates(warmup_steps=10, decay_steps=110) == pytest.approx(
        [0, 0.25, 0.5, 0.25, 0, 0], abs=1e-7
    )


def test_decay_ends_after_the_warm_up():
    with pytest.raises(ValueError, match="decay_steps=5 must be above optim.warmup_steps=5"):
        from_config_dict({"optim": {"warmup_steps": 5, "decay_steps": 5}})
    assert Config().optim.decay_steps is None
