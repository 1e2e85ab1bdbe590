"""Keys and values of one layer as a cache holds them: in the model's dtype, or in fewer bits.

In 8 bits every row of a head has a scale of its own, by its largest magnitude, so that a row costs
K + 4 bytes a head: `int8` rounds to 255 even steps, `fp8` to e4m3, whose steps grow with the value.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8, Shaped

from kernels import fp8
from kernels.typing import Leaf

CacheDtype = Literal["same", "bfloat16", "int8", "fp8"]
KINDS: tuple[CacheDtype, ...] = get_args(CacheDtype)

_LARGEST_INT8 = 127.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValues:
    """Scales are None where there are none."""

    k_SHK: Leaf[Shaped[Array, "S H K"]]
    v_SHV: Leaf[Shaped[Array, "S H V"]]
    k_scale_SH1: Leaf[Float[Array, "S H 1"] | None] = None
    v_scale_SH1: Leaf[Float[Array, "S H 1"] | None] = None

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def unpacked(self, dtype: DTypeLike) -> tuple[Float[Array, "S H K"], Float[Array, "S H V"]]:
        """Keys and values in a dtype to compute with."""
        return (
            _dense(self.k_SHK, self.k_scale_SH1, dtype),
            _dense(self.v_SHV, self.v_scale_SH1, dtype),
        )


def require_kind(kind: str) -> None:
    """Raises ValueError for a dtype of the cache that is none of KINDS."""
    if kind not in KINDS:
        raise ValueError(f"{kind=} must be one of {', '.join(KINDS)}")


def pack(k_SHK: Float[Array, "S H K"], v_SHV: Float[Array, "S H V"], kind: CacheDtype) -> KeyValues:
    """Keys and values as one of KINDS; "same" keeps them as they are. ValueError for another."""
    require_kind(kind)
    if kind == "same":
        return KeyValues(k_SHK, v_SHV)
    if kind == "bfloat16":
        return KeyValues(k_SHK.astype(jnp.bfloat16), v_SHV.astype(jnp.bfloat16))
    quantize = _int8 if kind == "int8" else lambda x: fp8.quantize(x, axis=-1)
    (k, k_scale), (v, v_scale) = quantize(k_SHK), quantize(v_SHV)
    return KeyValues(k, v, k_scale, v_scale)


def _int8(x_SHK: Float[Array, "S H K"]) -> tuple[Int8[Array, "S H K"], Float[Array, "S H 1"]]:
    x_SHK = x_SHK.astype(jnp.float32)
    largest_SH1 = jnp.max(jnp.abs(x_SHK), axis=-1, keepdims=True)
    scale_SH1 = jnp.maximum(largest_SH1, fp8.SMALLEST) / _LARGEST_INT8
    return jnp.round(x_SHK / scale_SH1).astype(jnp.int8), scale_SH1


def _dense(
    x: Shaped[Array, "S H W"], scale: Float[Array, "S H 1"] | None, dtype: DTypeLike
) -> Float[Array, "S H W"]:
    return x.astype(dtype) if scale is None else (x.astype(jnp.float32) * scale).astype(dtype)
