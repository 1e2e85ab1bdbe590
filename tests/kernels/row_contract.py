"""What every implementation of `layer_norm` and `gate` must do.

A test file subclasses `RowContract`. Tolerance: the error against float32 `reference` is at most
twice that of a plain version that rounds every step to the low precision, plus round-off.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch
from kernels.gate import gate
from kernels.layer_norm import layer_norm, norm_and_residual
from tests.kernels.attention_contract import ROUND_OFF, largest_error

EPS = 1e-6
# (affine, joined, rate): the forms of the two presets, and the others
FORMS = [(True, True, 0.0), (False, False, 0.0), (True, True, 0.3), (False, False, 0.3)]


class Rows:
    """Random inputs of one call of either op, with gradients of the results."""

    def __init__(self, rows, width, dtype, form, seed=0):
        self.rows, self.width, self.dtype = rows, width, dtype
        self.affine, self.joined, self.rate = form
        rng = np.random.default_rng(seed)

        def draw(*shape, dtype=dtype):
            return jnp.asarray(rng.standard_normal(shape, np.float32)).astype(dtype)

        size = np.exp(rng.standard_normal((rows, 1)))  # rows of different size and middle
        self.x = (draw(rows, width) * size + size).astype(dtype)
        self.u, self.g, self.beside = (draw(rows, width) for _ in range(3))
        columns = width * (3 if self.joined else 1)
        self.g_gate = draw(rows, columns)
        self.keep = jnp.asarray(rng.random((rows, columns)) >= self.rate) if self.rate else None
        self.parameters = ()
        if self.affine:
            weight, bias = draw(width, dtype="float32"), draw(width, dtype="float32")
            self.parameters = (1 + 0.1 * weight, 0.1 * bias)

    def norm(self, run, dtype=None):
        """Values and gradients of `run(x, *parameters) -> (y, x)`."""
        arrays = [x.astype(dtype or self.dtype) for x in (self.x, self.g, self.beside)]

        def both(x, g, beside, *parameters):
            (y, same), pull = jax.vjp(run, x, *parameters)
            return [y, same, *pull((g, beside))]

        return jax.jit(both)(*arrays, *self.parameters)

    def gate(self, run, dtype=None):
        """Values and gradients of `run(u, a, *parameters)`."""
        arrays = [x.astype(dtype or self.dtype) for x in (self.u, self.x, self.g_gate)]

        def both(u, a, g, *parameters):
            y, pull = jax.vjp(run, u, a, *parameters)
            return [y, *pull(g)]

        return jax.jit(both)(*arrays, *self.parameters)

    def results(self, implementation, dtype=None):
        """Of both ops, by name."""

        def run_norm(x, *parameters):
            return norm_and_residual(x, *parameters, eps=EPS, implementation=implementation)

        def run_gate(u, a, *parameters):
            weight, bias = parameters or (None, None)
            options = dict(eps=EPS, joined=self.joined, rate=self.rate)
            return gate(u, a, weight, bias, self.keep, **options, implementation=implementation)

        return self._named(self.norm(run_norm, dtype), self.gate(run_gate, dtype))

    def plain(self):
        """The yardstick: every step in the dtype of the inputs."""

        def normed(x, weight=None, bias=None):
            centred = x - jnp.mean(x, axis=1, keepdims=True)
            y = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=1, keepdims=True) + EPS)
            return y if weight is None else y * weight.astype(x.dtype) + bias.astype(x.dtype)

        def run_gate(u, a, *parameters):
            opened = jax.nn.silu(u)
            y = opened * normed(a, *parameters)
            y = jnp.concatenate([opened, a, y], axis=1) if self.joined else y
            return y if self.keep is None else jnp.where(self.keep, y / (1 - self.rate), 0)

        with jax.numpy_rank_promotion("allow"):
            norm = self.norm(lambda x, *parameters: (normed(x, *parameters), x))
            return self._named(norm, self.gate(run_gate))

    def _named(self, norm, gated):
        of_norm = ("y", "x", "dx", "d weight", "d bias")
        of_gate = ("z", "du", "da", "d weight of the gate", "d bias of the gate")
        return dict(zip(of_norm, norm, strict=False)) | dict(zip(of_gate, gated, strict=False))


class RowContract:
    """Subclasses set these."""

    implementation: str
    dtypes = ("float32", "bfloat16")
    widths = (50,)
    rows = 133

    @pytest.mark.parametrize("form", FORMS, ids=str)
    def test_values_and_gradients(self, form):
        for dtype, width in itertools.product(self.dtypes, self.widths):
            case = Rows(self.rows, width, dtype, form)
            with dispatch.record() as choices:
                got = case.results(self.implementation)
            assert {choice.implementation for choice in choices} == {self.implementation}
            want, plain = case.results("reference", "float32"), case.plain()
            for name, value in got.items():
                expected = "float32" if "weight" in name or "bias" in name else dtype
                assert value.dtype == expected, name
                error, allowed = (largest_error(x[name], want[name]) for x in (got, plain))
                assert error <= 2 * allowed + 2 * ROUND_OFF[dtype], (name, error, allowed)

    def test_a_row_of_nan_stays_alone(self):
        """Rows of padding may hold anything: no other row changes, nor its gradients."""
        case = Rows(9, 24, "float32", FORMS[0])
        clean = case.results(self.implementation)
        case.x, case.u = (x.at[4].set(jnp.nan) for x in (case.x, case.u))
        dirty = case.results(self.implementation)
        others = np.arange(9) != 4
        for name in ("y", "dx", "z", "du", "da"):
            assert np.isnan(dirty[name][4]).any(), name
            np.testing.assert_array_equal(dirty[name][others], clean[name][others], name)

    @pytest.mark.parametrize("form", FORMS[:2], ids=str)
    def test_no_rows(self, form):
        case = Rows(0, 24, "bfloat16", form)
        got = case.results(self.implementation)
        for name, want in case.results("reference").items():
            assert (got[name].shape, got[name].dtype) == (want.shape, want.dtype), name
            assert not np.asarray(got[name], np.float32).any(), name

    def test_same_bits_on_a_second_run(self):
        case = Rows(self.rows, self.widths[-1], "bfloat16", FORMS[2])
        first, second = (case.results(self.implementation) for _ in range(2))
        for name, value in first.items():
            np.testing.assert_array_equal(value, second[name], name)

    def test_rows_of_more_axes(self):
        x = Rows(12, 24, "float32", FORMS[0]).x
        flat, deep = (
            layer_norm(one, eps=EPS, implementation=self.implementation)
            for one in (x, x.reshape(3, 4, 24))
        )
        np.testing.assert_array_equal(deep.reshape(12, 24), flat)
