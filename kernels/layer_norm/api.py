"""Layer normalisation of rows: the public functions, their checks, their implementations."""

from collections.abc import Sequence
from types import ModuleType

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import dispatch
from kernels.rowwise import RowSpec, affine_of

_OP = dispatch.Op[RowSpec](
    "layer_norm",
    modules={
        "triton": "kernels.layer_norm.triton.norm",
        "xla": "kernels.layer_norm.xla",
        "reference": "kernels.layer_norm.reference",
    },
    order={"gpu": ("triton", "xla")},
)


def implementations() -> dict[str, str]:
    """Names of the implementations, with their modules."""
    return dict(_OP.modules)


def layer_norm(
    x: Float[Array, "*rows D"],
    weight: Float[Array, " D"] | None = None,
    bias: Float[Array, " D"] | None = None,
    *,
    eps: float,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "*rows D"]:
    """`(x - mean) / sqrt(biased variance + eps) * weight + bias`, over the last axis.

    Differentiable in all three. Sums are in float32; the result has the dtype of x.

    Args:
      weight, bias: both or none.
      implementation: a name, which never falls back; a sequence, tried in order; None, the order of
        the platform.

    Raises:
      ValueError: inputs that no implementation could take.
      NotImplementedError: the named implementation cannot take these inputs, or none can; with the
        reasons.
    """
    return _run(x, weight, bias, eps, implementation, False)[0]


def norm_and_residual(
    x_TD: Float[Array, "T D"],
    weight_D: Float[Array, " D"] | None = None,
    bias_D: Float[Array, " D"] | None = None,
    *,
    eps: float,
    implementation: str | Sequence[str] | None = None,
) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
    """`layer_norm` of x, and x, which a residual is added to.

    The backward then adds both gradients of x while it makes one of them.
    """
    return _run(x_TD, weight_D, bias_D, eps, implementation, True)


def _run(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    implementation: str | Sequence[str] | None,
    residual: bool,
) -> tuple[Array, Array]:
    affine = affine_of("layer_norm", weight, bias)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x has dtype {x.dtype}; layer_norm takes floating point")

    def run(module: ModuleType) -> tuple[Array, Array]:
        return module.norm(x, affine, eps=eps, residual=residual)

    return _OP.call(implementation, RowSpec(x.dtype, x.shape[-1]), run)
