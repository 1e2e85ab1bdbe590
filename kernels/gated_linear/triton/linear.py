"""The implementation `triton` of `gated_linear`, for GPUs from sm80 on.

The gate is a Triton kernel; the product, with the residual in its epilogue, is cuBLAS's.
"""

from jaxtyping import Array

from kernels import rowwise
from kernels.fp8 import linear
from kernels.gate.triton import gate
from kernels.gated_linear.api import GatedLinear, GatedRows
from kernels.norm_linear.api import LinearSpec
from kernels.rowwise import RowSpec


def unsupported(spec: LinearSpec) -> str | None:
    """Why these calls cannot run on the current device, or None."""
    if spec.precision != "same":
        return (
            f"triton multiplies in the dtype of u, not in {spec.precision}; use 'mosaic' or 'xla'"
        )
    return rowwise.refusal(RowSpec(spec.dtype, spec.width))


def gated_linear(
    x: GatedRows, w: Array, bias: Array | None, residual: Array, static: GatedLinear
) -> Array:
    """See `gated_linear`."""
    z = gate.gate(x.u_TY, x.a_TY, x.norm, x.keep_TZ, static.gate)
    return linear(z, w, bias, residual_TY=residual)
