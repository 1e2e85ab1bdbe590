"""Masks of the layers of a stack.

What each layer is given, how far a row reaches, and what is computed once.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels import device
from kernels.hstu_attention import AttentionSpec, make_plan, prepare_plan
from kernels.mask import AttentionMask, layer_masks
from tests.nn.small_encoder import CONFIG, LENGTH, ROWS, SEQUENCES, batch, encoder, inputs
from ultra_hstu.config import Config, DataConfig, ModelConfig
from ultra_hstu.nn import hstu
from ultra_hstu.nn.hstu import HSTU


def test_masks_of_layers():
    plain = dataclasses.replace(CONFIG, layers=3)
    assert layer_masks(vars(plain), 3) == (AttentionMask(),) * 3
    one = dataclasses.replace(plain, window=(4,), full_rows=(2,), prefix=(1,))
    assert layer_masks(vars(one), 3) == (AttentionMask(4, 2, 1),) * 3
    each = dataclasses.replace(plain, window=(4, -1, 0), full_rows=(2,))
    assert layer_masks(vars(each), 3) == (
        AttentionMask(4, 2),
        AttentionMask(None, 2),
        AttentionMask(0, 2),
    )


def test_masks_that_do_not_fit():
    with pytest.raises(
        ValueError,
        match=r"model.window=\(1, 2, 3\) must hold one value, or one for each of 2 layers",
    ):
        encoder(layers=2, window=(1, 2, 3))


def test_window_larger_than_the_sequences():
    """Plain causal attention, bit for bit."""
    sequences, count = batch(), int(batch().offsets[-1])
    wide, causal = (
        encoder(window=(1000,), full_rows=(1000,))(inputs(), sequences),
        encoder()(inputs(), sequences),
    )
    np.testing.assert_array_equal(wide[:count], causal[:count])
    assert np.any(np.asarray(encoder(window=(1,))(inputs(), sequences)[:count] != causal[:count]))


@pytest.mark.parametrize("full_rows", [0, 2])
def test_reach_by_gradients(full_rows):
    """Two layers of windows 2 and 3: a row depends on 5 earlier ones, a full row on all."""
    built = encoder(window=(2, 3), full_rows=(full_rows,))
    graph, params = nnx.split(built, nnx.Param)
    sequences = batch([(0, 16, 0)], rows=16)
    w_D = jnp.arange(1.0, 9.0)
    one_row = lambda x, t: jnp.sum(nnx.merge(graph, params)(x, sequences)[t] * w_D)  # noqa: E731
    depends = np.any(
        np.asarray(
            jax.jit(jax.vmap(jax.grad(one_row), in_axes=(None, 0)))(inputs(rows=16), jnp.arange(16))
        )
        != 0,
        axis=2,
    )
    row, key = np.mgrid[:16, :16]
    np.testing.assert_array_equal(
        depends, (key <= row) & ((row - key <= 5) | (row >= 16 - full_rows))
    )


@pytest.mark.parametrize(
    ("truncate", "plans"), [({}, 2), ({"truncate_after": 2, "truncate_length": 4}, 4)]
)
def test_one_plan_for_each_mask(monkeypatch, truncate, plans):
    """Four layers of two masks: two plans, and two more for the rows that a truncation leaves."""
    made = []
    monkeypatch.setattr(
        hstu,
        "make_plan",
        lambda mask, *args, longest: (
            made.append((mask, args[1])) or make_plan(mask, *args, longest=longest)
        ),
    )
    encoder(layers=4, window=(3, -1, 3, -1), **truncate)(inputs(), batch())
    assert len(made) == len(set(made)) == plans


def test_alpha():
    """None is 1 / sqrt(K)."""
    sequences = batch()
    given, default, other = (
        encoder(alpha=alpha)(inputs(), sequences) for alpha in (0.5, None, 0.25)
    )
    np.testing.assert_array_equal(given, default)
    assert np.any(np.asarray(given != other))


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (
            {"attention": "softmax", "window": (4,)},
            {},
            r"model.window=\(4,\) does nothing under model.attention='softmax'",
        ),
        ({"alpha": 0.5}, {}, "model.alpha=0.5 does nothing under model.preset='research'"),
        (
            {"kind": "sasrec", "projection": "fp8"},
            {},
            "model.projection='fp8' does nothing under model.kind='sasrec': use 'hstu'",
        ),
        (
            {"kind": "sasrec", "truncate_after": 1, "truncate_length": 8},
            {},
            "model.truncate_after=1 does nothing under",
        ),
        (
            {"full_rows": (3,)},
            {"layout": "padded"},
            "model.full_rows=.* whose newest rows are padding",
        ),
    ],
)
def test_options_without_effect(model, data, message):
    with pytest.raises(ValueError, match=message):
        Config(model=ModelConfig(**model), data=DataConfig(**data)).validate()


def test_depth_other_than_that_of_the_configuration():
    assert len(HSTU.from_config(CONFIG, LENGTH, layers=5, rngs=nnx.Rngs(0)).layers) == 5
    windows = dataclasses.replace(CONFIG, window=(1, 2))
    with pytest.raises(ValueError, match="one for each of 5 layers"):
        HSTU.from_config(windows, LENGTH, layers=5, rngs=nnx.Rngs(0))


def test_targets_and_contextual_tokens_with_every_implementation():
    """The blockwise implementation agrees with the definition on a mask of all options."""
    options = {
        "window": (2, -1),
        "full_rows": (3, 0),
        "prefix": (2, 0),
        "truncate_after": 1,
        "truncate_length": 4,
    }
    graph, params = nnx.split(encoder(**options), nnx.Param)
    sequences, count = batch(SEQUENCES), int(batch(SEQUENCES).offsets[-1])
    other = nnx.merge(graph, params)
    other.implementation = "xla"
    out = nnx.merge(graph, params)(inputs(rows=ROWS), sequences)
    np.testing.assert_allclose(
        other(inputs(rows=ROWS), sequences)[:count], out[:count], rtol=1e-4, atol=1e-5
    )


def test_lists_of_work_are_made_with_the_plan(monkeypatch):
    """For `mosaic`, where it can run such calls; other plans stay as they are."""
    sequences = batch()
    plan = make_plan(AttentionMask(window=3), sequences.offsets, ROWS)
    spec = AttentionSpec("bfloat16", heads=2, k_width=64, v_width=64)
    assert prepare_plan(plan, spec) is prepare_plan(plan, spec, "mosaic") is plan, "on a CPU"
    monkeypatch.setattr(device, "current", lambda: device.Device("gpu", "a GPU", (9, 0)))
    assert prepare_plan(plan, spec).stored_keys == prepare_plan(plan, spec, "mosaic").stored_keys
    assert len(prepare_plan(plan, spec).stored) > len(plan.stored)
    for name, other in (
        ("xla", spec),
        ("mosaic", spec._replace(dtype="float32")),
        ("mosaic", spec._replace(biased=True)),
    ):
        assert prepare_plan(plan, other, name) is plan
