"""What every implementation of `sampled_softmax` and of `full_softmax` must do.

A test file subclasses the contracts. Tolerance: the error against the float32 `reference` is at
most twice that of a plain dense computation in the low precision, plus round-off.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch
from kernels.full_softmax import full_softmax
from kernels.sampled_softmax import Negatives, sampled_softmax

ROUND_OFF = {"float32": 3e-6, "bfloat16": 2e-3}  # of an array's largest entry
NAMES = ("loss", "loss_T", "d q", "d e", "d weight")

# rows, items, width, negatives
SIZES = {
    "small": (37, 23, 6, 9),
    "one row": (1, 7, 16, 3),
    "one item": (13, 1, 8, 2),
    "tiles and a tail": (161, 200, 50, 33),
    "wide": (70, 130, 128, 20),
}


class Rows:
    """Random rows, of weight 0 now and then and behind the others; there ids are wild, q is NaN.

    Ids of the catalogue's items, with repetitions, collisions among them.
    """

    def __init__(self, rows, items, width, negatives, dtype, seed=0):
        rng = np.random.default_rng(seed)
        weight = rng.uniform(0.5, 2.0, rows) * (rng.random(rows) > 0.2)
        weight *= np.arange(rows) < max(1, 0.8 * rows)
        weight[0] = 1.0
        counts = weight > 0
        q = rng.normal(size=(rows, width)) * 3 / np.sqrt(width)
        positive = rng.integers(1, items + 1, rows)
        negative = rng.integers(1, items + 1, (rows, negatives))
        self.weight = jnp.asarray(weight, jnp.float32)
        self.q = jnp.asarray(np.where(counts[:, None], q, np.nan), jnp.float32).astype(dtype)
        self.e = jnp.asarray(rng.normal(size=(items + 1, width)), jnp.float32)
        self.positive = jnp.asarray(np.where(counts, positive, 10**6), jnp.int32)
        self.negative = jnp.asarray(np.where(counts[:, None], negative, -(10**6)), jnp.int32)
        self.shift = jnp.asarray(rng.normal(size=items + 1), jnp.float32)

    def values(self, loss):
        """What `loss(q, e, weight)` gives, and the gradients of 3 times it."""

        def three_times(*args):
            total, loss_T = loss(*args)
            return 3 * total, loss_T

        run = jax.jit(jax.value_and_grad(three_times, argnums=(0, 1, 2), has_aux=True))
        with jax.default_matmul_precision("highest"):
            (total, loss_T), gradients = run(self.q, self.e, self.weight)
        return dict(zip(NAMES, (total, loss_T, *gradients), strict=True))


def plain(score_TX, weight_T, hidden_TX=None):
    """Cross entropy of column 0; in the dtype of the scores but for the logarithm."""
    if hidden_TX is not None:
        score_TX = jnp.where(hidden_TX, -jnp.inf, score_TX)
    loss_T = -jax.nn.log_softmax(score_TX.astype(jnp.float32))[:, 0]
    loss_T = jnp.where(weight_T > 0, loss_T, 0.0)
    return jnp.sum(weight_T * loss_T), loss_T


def plain_of(rows, ids, q_TD, e_ID, weight_T, shift_I=None):
    """Scores of whole arrays in the dtype of q: what a low precision costs."""
    q_TD = jnp.where((weight_T > 0)[:, None], q_TD, jnp.zeros((), q_TD.dtype))
    score_TX = jnp.einsum("td,txd->tx", q_TD, e_ID.astype(q_TD.dtype)[ids])
    negative_TX = jnp.arange(ids.shape[1])[None, :] > 0
    if shift_I is not None:
        score_TX = score_TX - jnp.where(negative_TX, shift_I[ids], 0.0)
    return plain(score_TX, weight_T, negative_TX & (ids == ids[:, :1]))


def compare(got, want, low, dtype):
    for name in NAMES:
        x, y, z = (np.asarray(values[name], np.float64) for values in (got, want, low))
        size = np.abs(y).max(initial=0.0) or 1.0
        allowed = 2 * np.abs(z - y).max(initial=0.0) + ROUND_OFF[dtype] * size
        error = np.abs(x - y).max(initial=0.0)
        assert error <= allowed, f"{name}: {error / size:.2e} of {size:.2e}, {allowed / size:.2e}"


class Contract:
    """Subclasses set `implementation`."""

    implementation = ""
    op = ""

    @pytest.fixture(params=("float32", "bfloat16"))
    def dtype(self, request):
        return request.param

    def check(self, rows, dtype, **options):
        with dispatch.record() as choices:
            got = rows.values(self.loss(rows, implementation=self.implementation, **options))
        assert choices == [(self.op, self.implementation)]
        want = rows.values(self.loss(rows, implementation="reference", **options))
        low = rows.values(functools.partial(self.plain, rows, **options))
        compare(got, want, low, dtype)
        assert {name: x.dtype.name for name, x in got.items()} == {
            **dict.fromkeys(NAMES, "float32"),
            "d q": dtype,
        }
        padding = np.asarray(rows.weight) == 0
        for name in ("loss_T", "d q", "d weight"):
            assert not np.any(np.asarray(got[name], np.float32)[padding]), name
        assert not np.any(np.asarray(got["d e"])[0])  # padding is no item

    @pytest.mark.parametrize("size", SIZES)
    def test_values_and_gradients(self, size, dtype):
        self.check(Rows(*SIZES[size], dtype), dtype)

    def test_chunks(self, dtype):
        """Of any size, and none but the last short."""
        for chunk_rows in (7, 1000):
            self.check(Rows(*SIZES["small"], dtype), dtype, chunk_rows=chunk_rows)

    def test_no_row_counts(self, dtype):
        rows = Rows(*SIZES["small"], dtype)
        rows.weight *= 0
        rows.q = jnp.full_like(rows.q, jnp.nan)
        got = rows.values(self.loss(rows, implementation=self.implementation))
        assert not any(np.any(np.asarray(x, np.float32)) for x in got.values())

    def test_no_rows(self, dtype):
        rows = Rows(*SIZES["small"], dtype)
        for name in ("q", "weight", "positive", "negative"):
            setattr(rows, name, getattr(rows, name)[:0])
        got = rows.values(self.loss(rows, implementation=self.implementation))
        assert got["loss"] == 0 and got["d q"].shape == (0, 6) and not np.any(got["d e"])

    def test_the_same_bits_on_a_second_run(self, dtype):
        rows = Rows(*SIZES["tiles and a tail"], dtype)
        loss = self.loss(rows, implementation=self.implementation)
        first, second = rows.values(loss), rows.values(loss)
        for name in NAMES:
            np.testing.assert_array_equal(
                np.asarray(first[name], np.float32), np.asarray(second[name], np.float32), name
            )

    @pytest.mark.parametrize("sign", [1, -1])
    def test_extreme_scores(self, sign, dtype):
        """The positive has nearly all, or nearly none, of the softmax: nothing overflows."""
        rows = extreme(sign, dtype)
        got = rows.values(self.loss(rows, implementation=self.implementation))
        want = rows.values(self.loss(rows, implementation="reference"))
        for name in NAMES:
            np.testing.assert_allclose(
                np.asarray(got[name], np.float32),
                np.asarray(want[name], np.float32),
                rtol=1e-5,
                atol=1e-5,
                err_msg=name,
            )


def extreme(sign, dtype):
    """Scores of 80 or -80 of the positive, 0 of the others; all of it exact in bfloat16."""
    rows = Rows(8, 5, 16, 4, dtype)
    rows.weight = jnp.ones(8)
    rows.e = jnp.eye(6, 16) * 8
    rows.positive = jnp.arange(8, dtype=jnp.int32) % 5 + 1
    rows.negative = jnp.stack([(rows.positive + i) % 5 + 1 for i in range(4)], axis=1)
    rows.q = (sign * rows.e[rows.positive] * 10 / 8).astype(dtype)
    return rows


class SampledContract(Contract):
    op = "sampled_softmax"

    def loss(self, rows, *, shift=False, together=1, **options):
        def run(q_TD, e_ID, weight_T):
            return sampled_softmax(
                q_TD,
                e_ID,
                rows.positive,
                weight_T,
                Negatives(
                    rows.negative,
                    rows.negative.shape[1],
                    lambda negative_CR, _: negative_CR,
                    rows_per_draw=together,
                ),
                shift_I=rows.shift if shift else None,
                **options,
            )

        return run

    def plain(self, rows, q_TD, e_ID, weight_T, *, shift=False, together=1, chunk_rows=None):
        negative_TR = jnp.repeat(rows.negative[::together], together, axis=0)[: len(q_TD)]
        ids = jnp.concatenate([rows.positive[:, None], negative_TR], axis=1)
        ids = jnp.clip(ids, 0, len(e_ID) - 1)
        return plain_of(rows, ids, q_TD, e_ID, weight_T, rows.shift if shift else None)

    def test_shifted_negatives(self, dtype):
        self.check(Rows(*SIZES["tiles and a tail"], dtype), dtype, shift=True, chunk_rows=64)

    @pytest.mark.parametrize("ids", ["all equal", "all different", "all collide"])
    def test_repetitions(self, ids, dtype):
        rows = Rows(16, 200, 8, 12, dtype)
        rows.weight = jnp.ones(16)
        rows.q = jnp.where(jnp.isnan(rows.q), 0.5, rows.q)
        rows.positive = jnp.full(16, 7, jnp.int32)
        rows.negative = {
            "all equal": jnp.full((16, 12), 9, jnp.int32),
            "all different": jnp.arange(8, 8 + 192, dtype=jnp.int32).reshape(16, 12),
            "all collide": jnp.full((16, 12), 7, jnp.int32),
        }[ids]
        self.check(rows, dtype)


class FullContract(Contract):
    op = "full_softmax"

    def loss(self, rows, **options):
        return lambda q_TD, e_ID, weight_T: full_softmax(
            q_TD, e_ID, rows.positive, weight_T, **options
        )

    def plain(self, rows, q_TD, e_ID, weight_T, *, chunk_rows=None):
        positive_T = jnp.clip(rows.positive, 1, len(e_ID) - 1)
        others = jnp.broadcast_to(jnp.arange(1, len(e_ID)), (len(q_TD), len(e_ID) - 1))
        ids = jnp.concatenate([positive_T[:, None], others], axis=1)
        return plain_of(rows, ids, q_TD, e_ID, weight_T)
