"""What every implementation of `norm_linear` and `gated_linear` must do.

A test file subclasses `LinearContract`. Tolerance: the error against float32 `reference` is at most
twice that of a plain version in the precision of the call, plus round-off: each step rounded to the
low precision, and products of values that were rounded to e4m3 by rows and columns.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch
from kernels.fp8 import quantize
from kernels.gated_linear import gated_linear
from kernels.norm_linear import norm_linear
from tests.kernels.attention_contract import ROUND_OFF, largest_error

EPS = 1e-6
# The forms of the two presets: (affine norms and a bias before attention, joined, rate)
FORMS = {"production": (True, True, 0.0), "research": (False, False, 0.3)}
PRECISIONS = [("same", "same"), ("fp8", "same"), ("fp8", "fp8")]  # of product and gradient


def rounded(x, axis):
    values, scale = jax.lax.optimization_barrier(quantize(x, axis))  # or XLA rounds nothing
    return (values.astype(jnp.float32) * scale).astype(x.dtype)


@jax.custom_vjp
def rounding(x, w):
    """x and w as the product of fp8 sees them; gradients pass."""
    return rounded(x, 1), rounded(w, 0)


rounding.defvjp(lambda x, w: (rounding(x, w), None), lambda _, g: g)


class Inputs:
    """Random inputs of one call of either op, with gradients of the results."""

    def __init__(self, rows, width, widths, dtype, form):
        affine, self.joined, self.rate = FORMS[form]
        self.dtype, self.widths, inner = dtype, widths, widths[0]
        rng = np.random.default_rng(0)

        def draw(*shape, dtype=dtype):
            return jnp.asarray(rng.standard_normal(shape, np.float32)).astype(dtype)

        def norm(size):
            weight, bias = draw(size, dtype="float32"), draw(size, dtype="float32")
            return (1 + 0.1 * weight, 0.1 * bias) if affine else None

        def matrix(*shape):
            return draw(*shape, dtype="float32") / np.sqrt(shape[0])

        columns = inner * (3 if self.joined else 1)
        self.rows = {
            "x": draw(rows, width),
            "beside": draw(rows, width),
            "g": [draw(rows, each) for each in widths],
            "u": draw(rows, inner),
            "a": draw(rows, inner),
        }
        self.parameters = {
            "norm": norm(width),
            "w": matrix(width, sum(widths)),
            "bias": draw(sum(widths), dtype="float32") if affine else None,
            "gate norm": norm(inner),
            "output": matrix(columns, width),
            "output bias": None if affine else draw(width, dtype="float32"),
        }
        keep = rng.random((rows, columns)) >= self.rate
        self.keep = jnp.asarray(keep) if self.rate else None

    def results(self, project, finish, dtype=None):
        """Values and gradients by name, of `project(x, norm, w, bias)` and `finish(u, a, ...)`."""

        def both(rows, p):
            first, pull = jax.vjp(project, rows["x"], p["norm"], p["w"], p["bias"])
            of_first = pull((rows["g"], rows["beside"]))
            last, pull = jax.vjp(
                finish, rows["u"], rows["a"], p["gate norm"], p["output"], p["output bias"],
                rows["x"],
            )  # fmt: skip
            return {
                "parts": jnp.concatenate(first[0], axis=1),
                "same x": first[1],
                **dict(zip(("dx", "d norm", "d w", "d bias"), of_first, strict=True)),
                "y": last,
                **dict(
                    zip(("du", "da", "d gate norm", "d output", "d output bias", "d residual"),
                        pull(rows["beside"]), strict=True)
                ),
            }  # fmt: skip

        rows = jax.tree.map(lambda x: x.astype(dtype or self.dtype), self.rows)
        found = jax.jit(both)(rows, self.parameters)
        return {
            name + jax.tree_util.keystr(path): leaf
            for name, value in found.items()
            for path, leaf in jax.tree_util.tree_leaves_with_path(value)
        }

    def of(self, implementation, precision, gradient, dtype=None):
        options = dict(
            eps=EPS, precision=precision, gradient=gradient, implementation=implementation
        )

        def project(x, norm, w, bias):
            return norm_linear(x, norm, w, bias, widths=self.widths, **options)

        def finish(u, a, norm, w, bias, residual):
            gate = dict(joined=self.joined, rate=self.rate)
            return gated_linear(u, a, norm, w, bias, residual, self.keep, **gate, **options)

        return self.results(project, finish, dtype)

    def plain(self, precision):
        """The yardstick: every step in the dtype of the inputs."""

        def normed(x, norm):
            centred = x - jnp.mean(x, axis=1, keepdims=True)
            y = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=1, keepdims=True) + EPS)
            return y if norm is None else y * norm[0].astype(x.dtype) + norm[1].astype(x.dtype)

        def product(x, w, bias):
            w = w.astype(x.dtype)
            x, w = rounding(x, w) if precision == "fp8" else (x, w)
            return x @ w if bias is None else x @ w + bias.astype(x.dtype)

        def project(x, norm, w, bias):
            y = product(normed(x, norm), w, bias)
            return jnp.split(y, np.cumsum(self.widths)[:-1].tolist(), axis=1), x

        def finish(u, a, norm, w, bias, residual):
            opened = jax.nn.silu(u)
            z = opened * normed(a, norm)
            z = jnp.concatenate([opened, a, z], axis=1) if self.joined else z
            z = z if self.keep is None else jnp.where(self.keep, z / (1 - self.rate), 0)
            return residual + product(z, w, bias)

        with jax.numpy_rank_promotion("allow"):
            return self.results(project, finish)


class LinearContract:
    """Subclasses set these."""

    implementation: str
    dtypes = ("float32", "bfloat16")
    precisions = PRECISIONS
    shapes = ((33, 24, (8, 8, 16, 16)),)  # rows, width, widths

    def taken(self):
        """Those of both ops that run the implementation, by name."""
        return {("norm_linear", self.implementation), ("gated_linear", self.implementation)}

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("precision", PRECISIONS, ids="-".join)
    def test_values_and_gradients(self, precision, form):
        for dtype in self.dtypes:
            for shape in self.shapes:
                case = Inputs(*shape, dtype, form)
                if precision not in self.precisions:
                    with pytest.raises(NotImplementedError, match="not in fp8|use 'triton'"):
                        case.of(self.implementation, *precision)
                    continue
                with dispatch.record() as choices:
                    got = case.of(self.implementation, *precision)
                assert {(one.op, one.implementation) for one in choices} == self.taken()
                self._compare(case, got, precision)

    def _compare(self, case, got, precision):
        want, plain = case.of("reference", "same", "same", "float32"), case.plain(precision[0])
        small = 2.0**-4 if precision[1] == "fp8" else 0.0  # gradients of e4m3 factors
        for name, value in got.items():
            expected = "float32" if "norm" in name or "d w" in name or "bias" in name else None
            expected = "float32" if "output" in name else expected
            assert value.dtype == (expected or case.dtype), name
            error, allowed = (largest_error(x[name], want[name]) for x in (got, plain))
            slack = small * name.startswith("d") + 2 * ROUND_OFF[case.dtype]
            assert error <= 2 * allowed + slack, (name, error, allowed)
