"""The gate of an HSTU layer: the public function, its checks, its implementations."""

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels import dispatch
from kernels.rowwise import RowSpec, affine_of

_OP = dispatch.Op[RowSpec](
    "gate",
    modules={
        "triton": "kernels.gate.triton.gate",
        "xla": "kernels.gate.xla",
        "reference": "kernels.gate.reference",
    },
    order={"gpu": ("triton", "xla")},
)


def implementations() -> dict[str, str]:
    """Names of the implementations, with their modules."""
    return dict(_OP.modules)


class Gate(NamedTuple):
    """What of a gate is static.

    Attributes:
      eps: of the norm.
      joined: whether silu(u) and a stand in front of their product.
      rate: of entries that dropout zeroes, where there is a mask of those that it keeps.
    """

    eps: float
    joined: bool
    rate: float


def gate(
    u_TY: Float[Array, "T Y"],
    a_TY: Float[Array, "T Y"],
    weight_Y: Float[Array, " Y"] | None = None,
    bias_Y: Float[Array, " Y"] | None = None,
    keep_TZ: Bool[Array, "T Z"] | None = None,
    *,
    eps: float,
    joined: bool,
    rate: float = 0.0,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "T Z"]:
    """`dropout(silu(u) * LN(a))`, or `dropout(concat[silu(u), a, silu(u) * LN(a)])` if `joined`.

    Differentiable in u, a, weight and bias. Sums are in float32; the result has the dtype of u.

    Args:
      u_TY, a_TY: the gate before its SiLU, and the attention output, of one dtype.
      weight_Y, bias_Y: of the norm; both or none.
      keep_TZ: which entries dropout keeps; Z is 3 Y if `joined`, else Y. None: all.
      rate: kept entries are divided by 1 - rate.
      implementation: as in `layer_norm`.

    Raises:
      ValueError: inputs that no implementation could take.
      NotImplementedError: the named implementation cannot take these inputs, or none can; with the
        reasons.
    """
    affine = affine_of("gate", weight_Y, bias_Y)
    check(u_TY, a_TY, keep_TZ, joined=joined, rate=rate)

    def run(module: ModuleType) -> Array:
        return module.gate(u_TY, a_TY, affine, keep_TZ, Gate(eps, joined, rate))

    return _OP.call(implementation, RowSpec(u_TY.dtype, u_TY.shape[1]), run)


def check(u_TY: Array, a_TY: Array, keep_TZ: Array | None, *, joined: bool, rate: float) -> None:
    """ValueError where no implementation of a gate could take them."""
    rows, columns = u_TY.shape[0], u_TY.shape[1] * (3 if joined else 1)
    if a_TY.shape != u_TY.shape or a_TY.dtype != u_TY.dtype:
        raise ValueError(
            f"u {u_TY.dtype}{list(u_TY.shape)} and a {a_TY.dtype}{list(a_TY.shape)} must have one "
            "shape [T, Y] and one dtype"
        )
    if not jnp.issubdtype(u_TY.dtype, jnp.floating):
        raise ValueError(f"u has dtype {u_TY.dtype}; a gate takes floating point")
    if keep_TZ is not None and keep_TZ.shape != (rows, columns):
        raise ValueError(
            f"the mask of dropout must be [{rows}, {columns}] as the result, got {keep_TZ.shape}"
        )
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"{rate=} must be in [0, 1)")
