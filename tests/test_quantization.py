"""INT4 and INT8 tables: bytes, errors, packing by hand, and the ranks of a model with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests.small_run import small_config
from ultra_hstu import quantization, tasks
from ultra_hstu.quantization import Int4Table, quantize_int4, quantize_int8

VALUES = st.floats(-3e4, 3e4, width=32, allow_subnormal=False)  # XLA takes subnormal float32 for 0


def table(rows=50, width=16, seed=0):
    return np.random.default_rng(seed).normal(0, 0.02, (rows, width)).astype(np.float32)


def test_int4_by_hand():
    """One row of steps of 0.5 from -1: codes 0..15, column x beside column x + 2 in a byte."""
    made = quantize_int4(np.array([[-1.0, 6.5, 0.0, 1.0]], np.float32))
    assert (made.offset_I.tolist(), made.scale_I.tolist()) == ([-1.0], [0.5])
    assert made.code_IX.tolist() == [[0 | 2 << 4, 15 | 4 << 4]]
    assert made.rows(jnp.array([0])).tolist() == [[-1.0, 6.5, 0.0, 1.0]]


def test_half_the_bytes_of_int8():
    four, eight = quantize_int4(table()), quantize_int8(table())
    assert four.nbytes == 50 * (16 // 2 + 4) and eight.nbytes == 2 * four.nbytes
    assert four.shape == eight.shape == (50, 16)
    assert quantization.take(four, np.array([3, 3, 7])).nbytes == 3 * 12


@settings(max_examples=60)
@given(arrays.arrays(np.float32, (3, 6), elements=VALUES))
def test_errors_stay_below_half_a_step(values):
    for quantize, steps, side in (
        (quantize_int4, 15, np.float16),
        (quantize_int8, 255, np.float32),
    ):
        back = np.asarray(quantize(values).dense())
        spacing = np.abs(np.spacing(values.min(axis=1).astype(side))).astype(
            np.float64
        )  # the offset is rounded down by less than this
        span = values.max(axis=1) - values.min(axis=1) + spacing
        # Scale in float16: 2^-11 of it, or 3e-8 where it has no more digits, in each of the steps.
        bound = (
            span / steps / 2
            + np.maximum(span * np.finfo(side).eps, 3e-8 * steps)
            + 1e-6 * np.abs(values).max(axis=1)
        )
        assert (np.abs(back - values) <= bound[:, None]).all()


@settings(max_examples=60)
@given(VALUES)
def test_rows_of_one_value(value):
    row = np.full((1, 6), value, np.float32)
    back = np.asarray(quantize_int4(row).dense())
    assert (np.abs(back - row) <= max(2.0**-21 * abs(value), 3.1e-8)).all()
    half = row.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(quantize_int4(half).dense(), half)
    np.testing.assert_array_equal(quantize_int8(row).dense(), row)


def test_zero_rows_stay_zero():
    values = table()
    values[0] = 0
    for quantize in (quantize_int4, quantize_int8):
        assert not np.asarray(quantize(values).rows(jnp.array([0]))).any()


def test_rows_of_ids_under_jit_and_of_a_request():
    """Packed bytes are gathered, on either side; what comes out is the same."""
    made = quantize_int4(table())
    ids = np.array([[4, 0], [49, 4]])
    dense = np.asarray(made.dense())
    fetch = jax.jit(lambda made, ids: made.rows(ids))
    np.testing.assert_array_equal(fetch(made, ids), dense[ids])
    request = jax.device_put(quantization.take(made, ids.ravel()))
    np.testing.assert_array_equal(fetch(request, np.arange(4)), dense[ids.ravel()])
    assert made.rows(jnp.array(7)).shape == (16,)
    gathered = jax.make_jaxpr(lambda made, ids: made.rows(ids))(made, ids)
    # Of arrays that depend on the table's size there are the packed bytes only.
    assert {
        str(v.aval.dtype)
        for v in gathered.jaxpr.invars
        if v.aval.shape[:1] == (50,) and len(v.aval.shape) == 2
    } == {"uint8"}
    assert not [v for eqn in gathered.jaxpr.eqns for v in eqn.outvars if v.aval.shape[:1] == (50,)]


def test_ids_of_a_request_are_checked():
    with pytest.raises(ValueError, match=r"ids -1\.\.3 must be in 0\.\.49"):
        quantization.take(quantize_int4(table()), np.array([3, -1]))


def test_odd_width_names_the_remedy():
    with pytest.raises(
        ValueError, match="the width is 7: use an even model.width, such as 8, or INT8"
    ):
        quantize_int4(table(width=7))
    assert quantize_int8(table(width=7)).shape == (50, 7)


@pytest.mark.parametrize("quantize", [quantize_int4, quantize_int8])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_refused(quantize, bad):
    values = table()
    values[11, 3] = bad
    with pytest.raises(
        ValueError, match=f"row 11 of the table holds {bad}: an INT. table takes finite values"
    ):
        quantize(values)


def test_values_beyond_float16_are_refused():
    values = table()
    values[2, 0] = -70000.0
    with pytest.raises(
        ValueError,
        match="row 2 of the table holds -70000.0: an INT4 table takes finite values up to 32752",
    ):
        quantize_int4(values)
    assert np.asarray(quantize_int8(values).dense())[2, 0] == -70000.0


def test_int8_scales_leave_room_for_the_code():
    """`scale * code` is exact in float32, so that a row has the same bits fused or not."""
    made = quantize_int8(table(width=7))
    product = made.scale_I.astype(np.float64)[:, None] * np.arange(256)
    np.testing.assert_array_equal(product.astype(np.float32), product)
    np.testing.assert_array_equal(jax.jit(lambda made: made.dense())(made), made.dense())


def test_unknown_kind():
    with pytest.raises(ValueError, match="tables='int2' must be one of float32, int8, int4"):
        quantization.quantize(table(), "int2")


def test_a_model_is_evaluated_on_the_rows_that_its_table_gives_back(tmp_path):
    task = tasks.load(small_config(tmp_path))
    params = task.recipe.init(3).params
    evaluator = task.evaluator("test")
    served = {
        kind: quantization.unpacked(quantization.packed(params, kind))
        for kind in quantization.KINDS
    }
    given_table = quantization.item_table(params)
    np.testing.assert_array_equal(quantization.item_table(served["float32"]), given_table)
    error = {
        kind: np.abs(quantization.item_table(served[kind]) - given_table).max()
        for kind in ("int8", "int4")
    }
    assert 0 < error["int8"] < error["int4"] < 0.01
    changed = {
        kind: np.mean(evaluator.predict(served[kind]) != evaluator.predict(params))
        for kind in quantization.KINDS
    }
    assert changed["float32"] == 0 < changed["int8"] < changed["int4"]
    others = [jax.tree.leaves(params), jax.tree.leaves(served["int4"])]
    assert (
        sum(one is not other for one, other in zip(*others, strict=True)) == 1
    )  # nothing but the table


def test_pytree():
    made = quantize_int4(table())
    leaves, tree = jax.tree.flatten(made)
    assert (
        isinstance(jax.tree.unflatten(tree, leaves), Int4Table)
        and sum(leaf.nbytes for leaf in leaves) == made.nbytes
    )
