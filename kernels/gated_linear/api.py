"""The gate and the projection behind it: the public function, its checks, its implementations."""

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

from jaxtyping import Array, Bool, Float

from kernels import dispatch
from kernels.fp8 import Gradient, Precision
from kernels.gate.api import Gate, check
from kernels.norm_linear.api import LinearSpec
from kernels.rowwise import Affine

# `mosaic` multiplies in e4m3, `triton` in the dtype of u.
_OP = dispatch.Op[LinearSpec](
    "gated_linear",
    modules={
        "mosaic": "kernels.gated_linear.mosaic.linear",
        "triton": "kernels.gated_linear.triton.linear",
        "xla": "kernels.gated_linear.xla",
        "reference": "kernels.gated_linear.reference",
    },
    order={"gpu": ("mosaic", "triton", "xla")},
)


def implementations() -> dict[str, str]:
    """Names of the implementations, with their modules."""
    return dict(_OP.modules)


class GatedRows(NamedTuple):
    """What is multiplied: see `kernels.gate`.

    Attributes:
      norm: weight and bias of the norm, if it has them.
    """

    u_TY: Float[Array, "T Y"]
    a_TY: Float[Array, "T Y"]
    norm: Affine
    keep_TZ: Bool[Array, "T Z"] | None


class GatedLinear(NamedTuple):
    """What of a call is static."""

    gate: Gate
    precision: Precision
    gradient: Gradient


def gated_linear(
    u_TY: Float[Array, "T Y"],
    a_TY: Float[Array, "T Y"],
    norm: tuple[Float[Array, " Y"], Float[Array, " Y"]] | None,
    w_ZD: Float[Array, "Z D"],
    bias_D: Float[Array, " D"] | None,
    residual_TD: Float[Array, "T D"],
    keep_TZ: Bool[Array, "T Z"] | None = None,
    *,
    eps: float,
    joined: bool,
    rate: float = 0.0,
    precision: Precision = "same",
    gradient: Gradient = "same",
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "T D"]:
    """`residual + gate(u, a) @ w + bias`, in the dtype of u; sums are in float32.

    Differentiable in all floating inputs.

    Args:
      u_TY, a_TY, norm, keep_TZ, eps, joined, rate: as in `kernels.gate.gate`.
      w_ZD: Z is 3 Y if `joined`, else Y. Rounded to the dtype of u.
      precision, gradient: as in `kernels.fp8.linear`.
      implementation: a name, which never falls back; a sequence, tried in order; None, the order of
        the platform.

    Raises:
      ValueError: inputs that no implementation could take.
      NotImplementedError: the named implementation cannot take these inputs, or none can; with the
        reasons.
    """
    check(u_TY, a_TY, keep_TZ, joined=joined, rate=rate)
    columns = u_TY.shape[1] * (3 if joined else 1)
    if w_ZD.shape[0] != columns or residual_TD.dtype != u_TY.dtype:
        raise ValueError(
            f"w {list(w_ZD.shape)} must have {columns} rows, and the residual {residual_TD.dtype} "
            f"the dtype of u, {u_TY.dtype}"
        )

    def run(module: ModuleType) -> Array:
        static = GatedLinear(Gate(eps, joined, rate), precision, gradient)
        gated = GatedRows(u_TY, a_TY, norm, keep_TZ)
        return module.gated_linear(gated, w_ZD, bias_D, residual_TD, static)

    rows, width = u_TY.shape
    spec = LinearSpec(u_TY.dtype, rows, columns, (w_ZD.shape[1],), precision, gradient)
    return _OP.call(implementation, spec, run)
