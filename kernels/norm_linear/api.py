"""A norm and the projection behind it: the public function, its checks, its implementations."""

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kernels import dispatch
from kernels.fp8 import Gradient, Precision


class LinearSpec(NamedTuple):
    """What implementations decide by.

    Attributes:
      rows, width: of x.
      widths: of the results.
    """

    dtype: DTypeLike
    rows: int
    width: int
    widths: tuple[int, ...]
    precision: Precision
    gradient: Gradient


# `mosaic` multiplies in e4m3, `triton` in the dtype of x.
_OP = dispatch.Op[LinearSpec](
    "norm_linear",
    modules={
        "mosaic": "kernels.norm_linear.mosaic.linear",
        "triton": "kernels.norm_linear.triton.linear",
        "xla": "kernels.norm_linear.xla",
        "reference": "kernels.norm_linear.reference",
    },
    order={"gpu": ("mosaic", "triton", "xla")},
)


def implementations() -> dict[str, str]:
    """Names of the implementations, with their modules."""
    return dict(_OP.modules)


class NormLinear(NamedTuple):
    """What of a call is static.

    Attributes:
      eps: of the norm.
    """

    eps: float
    widths: tuple[int, ...]
    precision: Precision
    gradient: Gradient


Parts = tuple[list[Array], Array]  # the results, and x


def norm_linear(
    x_TD: Float[Array, "T D"],
    norm: tuple[Float[Array, " D"], Float[Array, " D"]] | None,
    w_DX: Float[Array, "D X"],
    bias_X: Float[Array, " X"] | None = None,
    *,
    widths: tuple[int, ...],
    eps: float,
    precision: Precision = "same",
    gradient: Gradient = "same",
    implementation: str | Sequence[str] | None = None,
) -> tuple[list[Float[Array, "T _"]], Float[Array, "T D"]]:
    """`LN(x) @ w + bias`, cut by columns into `widths`; and x, for a residual.

    Differentiable in x, norm, w and bias. The backward adds both gradients of x while it makes one
    of them. Sums are in float32; results have the dtype of x.

    Args:
      norm: weight and bias of the norm; None: it has neither.
      w_DX: rounded to the dtype of x.
      eps: added to the variance.
      precision, gradient: as in `kernels.fp8.linear`.
      implementation: a name, which never falls back; a sequence, tried in order; None, the order of
        the platform.

    Raises:
      ValueError: inputs that no implementation could take.
      NotImplementedError: the named implementation cannot take these inputs, or none can; with the
        reasons.
    """
    if not jnp.issubdtype(x_TD.dtype, jnp.floating):
        raise ValueError(f"x has dtype {x_TD.dtype}; norm_linear takes floating point")
    if sum(widths) != w_DX.shape[1] or min(widths, default=0) < 1:
        raise ValueError(f"{widths=} must be positive and add up to the {w_DX.shape[1]} columns")

    def run(module: ModuleType) -> Parts:
        static = NormLinear(eps, widths, precision, gradient)
        return module.norm_linear(x_TD, norm, w_DX, bias_X, static)

    rows, width = x_TD.shape
    spec = LinearSpec(x_TD.dtype, rows, width, widths, precision, gradient)
    return _OP.call(implementation, spec, run)
