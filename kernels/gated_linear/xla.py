"""The implementation `xla` of `gated_linear`: plain jnp, which JAX differentiates."""

from jaxtyping import Array

from kernels.fp8 import linear
from kernels.gate import xla as gate
from kernels.gated_linear.api import GatedLinear, GatedRows
from kernels.norm_linear.api import LinearSpec


def unsupported(spec: LinearSpec) -> None:
    """Nothing: any call is taken."""


def gated_linear(
    x: GatedRows, w: Array, bias: Array | None, residual: Array, static: GatedLinear
) -> Array:
    """See `gated_linear`."""
    z = gate.gate(x.u_TY, x.a_TY, x.norm, x.keep_TZ, static.gate)
    options = {"precision": static.precision, "gradient": static.gradient}
    return linear(z, w, bias, residual_TY=residual, **options)
