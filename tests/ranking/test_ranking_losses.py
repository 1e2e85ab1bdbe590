"""The multi-task loss against its definition, written out entry by entry."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultra_hstu.ranking.loss import multitask_loss

KINDS = ("binary", "regression", "binary")


def definition(logit, label, weight, kinds):
    tasks = []
    for k, kind in enumerate(kinds):
        total = value = 0.0
        for x, y, w in zip(
            logit[:, k].tolist(), label[:, k].tolist(), weight[:, k].tolist(), strict=True
        ):
            if w:
                p = 1 / (1 + math.exp(-x))
                total += w
                value += w * (
                    -(y * math.log(p) + (1 - y) * math.log(1 - p))
                    if kind == "binary"
                    else (x - y) ** 2
                )
        tasks.append(value / total if total else 0.0)
    return sum(tasks) / len(tasks)


def example(seed=0, rows=20):
    rng = np.random.default_rng(seed)
    label = np.stack(
        [rng.integers(0, 2, rows), rng.normal(size=rows), rng.integers(0, 2, rows)], axis=1
    ).astype(np.float32)
    weight = rng.choice([0.0, 1.0, 0.25], (rows, 3)).astype(np.float32)
    return rng.normal(size=(rows, 3)).astype(np.float32), label, weight


@pytest.mark.parametrize("seed", range(3))
def test_definition_and_gradient(seed):
    logit, label, weight = example(seed)
    loss, gradient = jax.value_and_grad(multitask_loss)(
        jnp.asarray(logit), jnp.asarray(label), jnp.asarray(weight), KINDS
    )
    assert loss.dtype == jnp.float32 and float(loss) == pytest.approx(
        definition(logit, label, weight, KINDS), rel=1e-5
    )
    probability = 1 / (1 + np.exp(-logit.astype(np.float64)))
    slope = np.stack(
        [
            probability[:, 0] - label[:, 0],
            2 * (logit - label)[:, 1],
            probability[:, 2] - label[:, 2],
        ],
        axis=1,
    )
    np.testing.assert_allclose(gradient, slope * weight / weight.sum(0) / 3, atol=1e-6)


def test_what_has_no_weight_may_hold_anything():
    logit, label, weight = example()
    loss, gradient = jax.value_and_grad(multitask_loss)(
        jnp.asarray(logit), jnp.asarray(label), jnp.asarray(weight), KINDS
    )
    for rubbish in (np.nan, np.inf, -np.inf):
        broken = [jnp.asarray(np.where(weight > 0, array, rubbish)) for array in (logit, label)]
        again, gradient_again = jax.value_and_grad(multitask_loss)(
            *broken, jnp.asarray(weight), KINDS
        )
        assert float(again) == float(loss)
        np.testing.assert_array_equal(gradient_again, gradient)


def test_a_task_without_supervision_adds_nothing():
    logit, label, weight = example()
    weight[:, 2] = 0
    label[:, 2] = np.nan
    loss, gradient = jax.value_and_grad(multitask_loss)(
        jnp.asarray(logit), jnp.asarray(label), jnp.asarray(weight), KINDS
    )
    assert float(loss) == pytest.approx(
        2 / 3 * definition(logit[:, :2], label[:, :2], weight[:, :2], KINDS[:2]), rel=1e-5
    )
    assert np.all(np.asarray(gradient)[:, 2] == 0) and np.isfinite(gradient).all()
    loss, gradient = jax.value_and_grad(multitask_loss)(
        jnp.asarray(logit), jnp.asarray(label), jnp.zeros((20, 3)), KINDS
    )
    assert float(loss) == 0 and np.all(np.asarray(gradient) == 0)


def test_extreme_logits_and_low_precision():
    logit = jnp.array([[200.0], [-200.0]])
    loss, gradient = jax.value_and_grad(multitask_loss)(
        logit, jnp.array([[0.0], [1.0]]), jnp.ones((2, 1)), ("binary",)
    )
    assert float(loss) == 200.0 and np.asarray(gradient).ravel().tolist() == [0.5, -0.5]
    half = jnp.asarray(example()[0], jnp.bfloat16)
    label, weight = map(jnp.asarray, example()[1:])
    loss, gradient = jax.value_and_grad(multitask_loss)(half, label, weight, KINDS)
    assert loss.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    assert float(loss) == float(multitask_loss(half.astype(jnp.float32), label, weight, KINDS))


def test_kinds_are_checked():
    x = jnp.zeros((2, 2))
    for kinds in (("binary",), ("binary", "ordinal")):
        with pytest.raises(
            ValueError,
            match=r"kinds=.* must hold one of \('binary', 'regression'\) for each of the 2 columns",
        ):
            multitask_loss(x, x, x, kinds)
