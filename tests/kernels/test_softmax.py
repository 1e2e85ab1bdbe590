"""`xla` of the softmax losses: the contract, shared draws, what no implementation can take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.full_softmax import full_softmax
from kernels.sampled_softmax import Negatives, sampled_softmax, xla
from tests.kernels.softmax_contract import SIZES, FullContract, Rows, SampledContract


class TestFull(FullContract):
    implementation = "xla"


class TestSampled(SampledContract):
    implementation = "xla"

    @pytest.mark.parametrize("path", ["whole table", "one scatter"])
    def test_other_paths(self, path, dtype, monkeypatch):
        """Those of other devices and sizes; another test has the rules that choose."""
        monkeypatch.setattr(xla, "whole_table_is_cheaper", lambda *_: path == "whole table")
        monkeypatch.setattr(xla, "_add_by_columns", xla._add)
        self.check(Rows(*SIZES["tiles and a tail"], dtype), dtype, shift=True, chunk_rows=64)

    @pytest.mark.parametrize("together", [4, 37, 64])
    def test_rows_that_share_a_draw(self, together, dtype):
        for chunk_rows in (1, None):
            rows = Rows(*SIZES["small"], dtype)
            rows.negative = jnp.clip(rows.negative, 1)
            self.check(rows, dtype, together=together, chunk_rows=chunk_rows, shift=True)


def test_negatives_are_drawn_in_chunks():
    """The draws are those of all rows at once, and no array has them."""
    rows = Rows(64, 50, 8, 16, "float32")
    key_T = jax.random.split(jax.random.key(1), 64)

    def drawn(key_C, offset):
        return jax.vmap(lambda key: jax.random.randint(key, (16,), 1, 50))(key_C) + offset

    def loss(negatives):
        return lambda q, e: sampled_softmax(
            q, e, rows.positive, rows.weight, negatives, chunk_rows=8
        )[0]

    lazy, whole = Negatives(key_T, 16, drawn, jnp.int32(1)), Negatives.of(drawn(key_T, 1))
    for got, want in zip(
        *(jax.grad(loss(negatives), (0, 1))(rows.q, rows.e) for negatives in (lazy, whole)),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)
    assert "64,16" not in str(jax.make_jaxpr(jax.grad(loss(lazy)))(rows.q, rows.e))
    assert "64,16" in str(jax.make_jaxpr(jax.grad(loss(whole)))(rows.q, rows.e))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(q=jnp.zeros((37, 6), jnp.float16)), "q is float16.*float32 and bfloat16"),
        (dict(q=jnp.zeros((37, 5))), r"q \(37, 5\) and e \(24, 6\)"),
        (dict(e=jnp.zeros((24, 6), jnp.bfloat16)), "e and weight must be float32, got bfloat16"),
        (dict(options=dict(chunk_rows=0)), "chunk_rows=0 must be at least 1"),
        (dict(options=dict(implementation="mosaic")), "no implementation is called 'mosaic'"),
        (dict(options=dict(implementation=())), "empty sequence"),
        (dict(negative=jnp.zeros((37, 0), jnp.int32)), "count=0"),
    ],
)
def test_bad_input(bad, message):
    rows = Rows(*SIZES["small"], "float32")
    options = bad.pop("options", {})
    for name, value in bad.items():
        setattr(rows, name, value)
    with pytest.raises(ValueError, match=message):
        sampled_softmax(rows.q, rows.e, rows.positive, rows.weight, rows.negative, **options)
    if "negative" not in bad:
        with pytest.raises(ValueError, match=message):
            full_softmax(rows.q, rows.e, rows.positive, rows.weight, **options)


def test_a_refusal_names_the_reason_and_the_order_moves_on():
    rows = Rows(*SIZES["small"], "float32")
    all_items = (rows.q, rows.e, rows.positive, rows.weight)
    calls = ((sampled_softmax, (*all_items, rows.negative)), (full_softmax, all_items))
    for op, inputs in calls:
        with pytest.raises(NotImplementedError, match="NVIDIA GPU.*implementation='xla'"):
            op(*inputs, implementation="triton")
        found = op(*inputs, implementation=("triton", "xla"))[0]
        assert found == op(*inputs, implementation="xla")[0]
