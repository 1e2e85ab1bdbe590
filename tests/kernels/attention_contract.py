"""What every implementation of `hstu_attention` must do.

A test file subclasses `AttentionContract` and declares what its kernel takes. Tolerance: the error
against float32 `reference` is at most twice that of a plain dense computation in the low precision,
plus round-off.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch
from kernels.hstu_attention import RelativeBias, hstu_attention, make_plan
from kernels.jagged import Rows
from kernels.mask import AttentionMask

GRADIENTS = ("q", "k", "v", "position_table", "time_table")
ROUND_OFF = {"float32": 2e-6, "bfloat16": 1e-3, "float16": 2e-4}  # of an array's largest entry

# name: (lengths, rows of padding behind them)
BATCHES = {
    "mixed": ((0, 1, 7, 97, 113, 0, 25), 13),
    "one sequence fills T": ((256,), 0),
    "one long": ((1025,), 7),
    "one row each": ((1,) * 37, 0),
    "all padding": ((0, 0, 0), 64),
}
CAUSAL = AttentionMask()
MASKS = {
    "causal": CAUSAL,
    "window": AttentionMask(window=5),
    "window 0": AttentionMask(window=0),
    "full rows": AttentionMask(window=9, full_rows=6),
    "prefix": AttentionMask(window=9, prefix=6),
    "all": AttentionMask(window=40, full_rows=9, prefix=5, context_sink=False),
}


class Case:
    """Random inputs on a batch; NaN in every padding row."""

    def __init__(self, lengths, padding, heads, k_width, v_width, dtype, bias=None, seed=0):
        self.key = (tuple(lengths), padding, heads, k_width, v_width, dtype, bias, seed)
        rng = np.random.default_rng(seed)
        self.lengths = np.asarray(lengths, np.int32)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32)
        self.real, self.rows = int(self.offsets[-1]), int(self.offsets[-1]) + padding
        self.num_targets = np.minimum(self.lengths // 4, 9).astype(np.int32)
        self.num_contextual = np.minimum(self.lengths // 5, 3).astype(np.int32)
        draw = functools.partial(rng.standard_normal, dtype=np.float32)
        shapes = [(self.rows, heads, w) for w in (k_width, k_width, v_width, v_width)]
        self.q, self.k, self.v, self.g = (jnp.asarray(draw(s)).astype(dtype) for s in shapes)
        self.q, self.k, self.v = (x.at[self.real :].set(jnp.nan) for x in (self.q, self.k, self.v))
        longest = int(self.lengths.max())
        kinds = {
            None: (),
            "position": ("position",),
            "time": ("time",),
            "both": ("position", "time"),
        }[bias]
        self.position_table = jnp.asarray(draw(2 * longest + 1)) if "position" in kinds else None
        self.time_table = jnp.asarray(draw(129)) if "time" in kinds else None
        times = np.minimum(np.cumsum(np.exp(rng.uniform(0, 14, self.rows + 1))), 2**31 - 1).astype(
            np.int32
        )
        self.timestamps, self.query_timestamps = jnp.asarray(times[:-1]), jnp.asarray(times[1:])

    def inputs(self):
        return {name: getattr(self, name) for name in GRADIENTS if getattr(self, name) is not None}

    def row_scale(self):
        scale = np.random.default_rng(1).uniform(0.01, 1, self.rows)
        scale[self.real :] = np.nan
        return jnp.asarray(scale, jnp.float32)

    def run(self, inputs, *, mask=CAUSAL, counts=True, scale=1 / 64, **options):
        bias = None
        if "position_table" in inputs or "time_table" in inputs:
            bias = RelativeBias(
                inputs.get("position_table"),
                inputs.get("time_table"),
                self.timestamps,
                self.query_timestamps,
            )
        return hstu_attention(
            *(inputs[name] for name in "qkv"),
            self.offsets,
            mask=mask,
            num_targets=self.num_targets if counts else None,
            num_contextual=self.num_contextual if counts else None,
            alpha=0.3,
            scale=scale,
            bias=bias,
            **options,
        )

    def out_and_gradients(self, inputs, **options):
        def weighted(inputs):
            out = self.run(inputs, **options)
            # the cotangent of padding rows is 0, as in any loss; the rows themselves hold NaN
            real = (jnp.arange(self.rows) < self.real)[:, None, None]
            return jnp.sum(
                jnp.where(real, out.astype(jnp.float32) * self.g.astype(jnp.float32), 0.0)
            ), out

        gradients, out = jax.jit(jax.grad(weighted, has_aux=True))(inputs)
        return {"out": out, **{f"d {name}": x for name, x in gradients.items()}}


@functools.cache
def expected(key, mask, dtype, rescale, counts=True):
    """(float32 reference, yardstick) of a case, computed once for all implementations.

    The CPU does it: it compiles faster.
    """
    with jax.default_device(jax.devices("cpu")[0]):
        case = Case(*key)
        inputs = case.inputs()
        wide = {name: x.astype(jnp.float32) for name, x in inputs.items()}
        scale = case.row_scale() if rescale else 1 / 64
        return case.out_and_gradients(
            wide, mask=mask, counts=counts, scale=scale, implementation="reference"
        ), plain(case, inputs, mask, dtype, scale, counts)


def plain(case, inputs, mask, dtype, scale=1 / 64, counts=True):
    """Dense attention written out, every product in `dtype`: the yardstick for low precision."""
    named = (case.num_targets, case.num_contextual) if counts else ()
    dense_TT = np.asarray(mask.dense(case.offsets, case.rows, *named))
    real = (jnp.arange(case.rows) < case.real)[:, None, None]
    scale_T11 = jnp.where(
        real, jnp.broadcast_to(jnp.asarray(scale, jnp.float32), (case.rows,))[:, None, None], 0
    )

    def weighted(inputs):
        q, k, v = (jnp.where(real, inputs[n].astype(dtype), 0) for n in "qkv")
        score = (0.3 * jnp.einsum("qhd,khd->hqk", q, k)).astype(jnp.float32)
        if "position_table" in inputs or "time_table" in inputs:
            bias = RelativeBias(
                inputs.get("position_table"),
                inputs.get("time_table"),
                case.timestamps,
                case.query_timestamps,
            )
            score += bias.dense(case.rows)[None]
        weight = jnp.where(dense_TT[None], jax.nn.silu(score), 0).astype(dtype)
        out = (jnp.einsum("hqk,khd->qhd", weight, v) * scale_T11).astype(dtype)
        return jnp.sum(
            jnp.where(real, out.astype(jnp.float32) * case.g.astype(jnp.float32), 0.0)
        ), out

    gradients, out = jax.jit(jax.grad(weighted, has_aux=True))(inputs)
    return {"out": out, **{f"d {name}": x for name, x in gradients.items()}}


def largest_error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.abs(got - want).max(initial=0.0) / max(np.abs(want).max(initial=0.0), 1e-30)


class AttentionContract:
    """Subclasses set these; what is not supported must raise NotImplementedError."""

    implementation: str
    dtypes = ("float32", "bfloat16", "float16")
    widths = ((2, 8, 8), (1, 25, 50))  # (heads, K, V)
    supports_bias = True
    longest: int | None = None  # rows of a sequence, at most
    repeatable = True  # the same bits on every run: of the output,
    # and of the gradients; False where sums are by atomic additions, as the implementation says
    repeatable_gradients = True

    @property
    def dtype(self):
        return self.dtypes[0]

    def case(self, batch="mixed", dtype=None, widths=None, bias=None):
        if bias is not None and not self.supports_bias:
            bias = None
        return Case(*BATCHES[batch], *(widths or self.widths[0]), dtype or self.dtype, bias)

    def compare(self, case, mask, dtype, rescale=False, counts=True):
        inputs, scale = case.inputs(), case.row_scale() if rescale else 1 / 64
        want, yardstick = expected(case.key, mask, dtype, rescale, counts)
        got = case.out_and_gradients(
            inputs, mask=mask, counts=counts, scale=scale, implementation=self.implementation
        )
        assert set(got) == set(want)
        for name, x in got.items():
            want_dtype = inputs[name[2:]].dtype if name.startswith("d ") else case.q.dtype
            assert x.dtype == want_dtype, name
            assert np.isfinite(np.asarray(x, np.float32)).all(), (
                f"{name}: NaN of padding came through"
            )
            if x.ndim == 3:
                assert not np.asarray(x[case.real :], np.float32).any(), (
                    f"{name}: padding rows are not 0"
                )
            error, allowed = (
                largest_error(x, want[name]),
                2 * largest_error(yardstick[name], want[name]) + ROUND_OFF[dtype],
            )
            assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"

    @pytest.mark.parametrize("mask", MASKS)
    def test_masks(self, mask):
        self.compare(self.case(bias="both"), MASKS[mask], self.dtype)

    @pytest.mark.parametrize("batch", [b for b in BATCHES if b != "mixed"])
    def test_batches(self, batch):
        case = self.case(batch)
        if self.longest is None or case.lengths.max() <= self.longest:
            self.compare(case, MASKS["full rows"], self.dtype)
            return
        with pytest.raises(NotImplementedError, match="longest"):
            case.run(case.inputs(), implementation=self.implementation)

    def test_dtypes(self):
        for dtype in self.dtypes:
            self.compare(self.case(dtype=dtype, bias="both"), MASKS["causal"], dtype)

    def test_widths(self):
        for widths in self.widths:
            self.compare(self.case(widths=widths), MASKS["all"], self.dtype)

    def test_scale_per_row(self):
        self.compare(self.case(), MASKS["prefix"], self.dtype, rescale=True)

    @pytest.mark.parametrize("bias", ["position", "time"])
    def test_one_bias_table(self, bias):
        case = self.case(bias=bias)
        if self.supports_bias:
            self.compare(case, MASKS["window"], self.dtype)
            return
        case = Case(*BATCHES["mixed"], *self.widths[0], self.dtype, bias)
        with pytest.raises(NotImplementedError, match="bias"):
            case.run(case.inputs(), implementation=self.implementation)

    def test_same_bits_on_a_second_run(self):
        case = self.case(bias="both")
        run = functools.partial(
            case.out_and_gradients,
            case.inputs(),
            mask=MASKS["full rows"],
            implementation=self.implementation,
        )
        first, second = run(), run()
        for name in first:
            if not (self.repeatable_gradients if name.startswith("d ") else self.repeatable):
                assert largest_error(first[name], second[name]) < 10 * ROUND_OFF[self.dtype], name
                continue
            np.testing.assert_array_equal(
                np.asarray(first[name], np.float32),
                np.asarray(second[name], np.float32),
                err_msg=name,
            )

    def test_padding_changes_nothing(self):
        case = self.case(bias="both")
        inputs = case.inputs()
        zeroed = {n: x.at[case.real :].set(0) if n in "qkv" else x for n, x in inputs.items()}
        options = {"mask": MASKS["all"], "implementation": self.implementation}
        with_nan, without = (
            case.out_and_gradients(inputs, **options),
            case.out_and_gradients(zeroed, **options),
        )
        for name in with_nan:
            if self.repeatable and self.repeatable_gradients:
                np.testing.assert_array_equal(
                    np.asarray(with_nan[name], np.float32),
                    np.asarray(without[name], np.float32),
                    err_msg=name,
                )
            else:
                assert largest_error(with_nan[name], without[name]) < 1e-5, name

    def test_a_plan_gives_the_same_result_and_offsets_may_be_traced(self):
        case = self.case()
        inputs, mask = case.inputs(), MASKS["full rows"]
        want = case.run(inputs, mask=mask, implementation=self.implementation)

        @jax.jit
        def planned(offsets, num_targets, num_contextual, inputs):
            longest = int(case.lengths.max())
            plan = make_plan(mask, offsets, case.rows, num_targets, num_contextual, longest)
            options = {"mask": mask, "plan": plan, "implementation": self.implementation}
            return hstu_attention(
                inputs["q"], inputs["k"], inputs["v"], offsets, alpha=0.3, scale=1 / 64, **options
            )

        got = planned(case.offsets, case.num_targets, case.num_contextual, inputs)
        assert largest_error(got, want) <= ROUND_OFF[self.dtype]

    def test_the_named_implementation_runs(self):
        case = self.case()
        with dispatch.record() as choices:
            case.run(case.inputs(), implementation=self.implementation)
        assert choices == [("hstu_attention", self.implementation)]


def keys_at(mask, start, position, contextual, history):
    """Keys of rows given one by one, each at a position of a sequence that begins with key `start`.

    The sequence has so many contextual and history tokens; behind them a row is a target.
    """
    zero = jnp.zeros_like(start)
    return mask.keys_of(Rows(zero == 0, zero, start, position, contextual, history, zero))
