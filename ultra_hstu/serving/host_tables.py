"""An item table that stays in host memory: a request's rows are gathered there, packed, and only they travel to the device, which unpacks them.

A table of INT4 rows moves half the bytes of INT8 and a quarter of bfloat16 (ULTRA-HSTU, arXiv 2602.16986, serves so; its layout is not published, ours is
that of `ultra_hstu.quantization`). On the device the table of a request is small: row 0, which is padding, and one row for each item that it names.
"""

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Int32

from ultra_hstu import quantization
from ultra_hstu.serving.capacity import LEAST_ROWS, capacity, padded

Kind = Literal["float32", "bfloat16", "int8", "int4"]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclasses.dataclass(frozen=True, eq=False)
class HostTable:
    """Item rows in host memory: an array [I + 1, D] of float32 or bfloat16, or one of `quantization`'s tables with NumPy leaves."""

    packed: Any

    @staticmethod
    def of(table_ID: Float[Any, "I D"], kind: Any) -> "HostTable":
        """Raises ValueError for a kind that is none, and for what `quantization` refuses."""
        if kind not in KINDS:
            raise ValueError(
                f"item_table={kind!r} must be 'device', or one of {', '.join(KINDS)} in host memory"
            )
        if kind == "bfloat16":
            return HostTable(np.asarray(table_ID).astype(ml_dtypes.bfloat16))
        return HostTable(
            jax.tree.map(np.asarray, quantization.quantize(np.asarray(table_ID), kind))
        )

    @property
    def row_bytes(self) -> int:
        """Bytes of a row that travel."""
        return sum(leaf.nbytes // len(leaf) for leaf in jax.tree.leaves(self.packed))

    def request(self, *ids: np.ndarray) -> tuple[Any, list[Int32[np.ndarray, " n"]]]:
        """The packed rows of the items that a request names, each once, at the size of their class; and the ids as numbers of these rows, from 1."""
        item_R, number_T = np.unique(np.concatenate(ids), return_inverse=True)
        rows = jax.tree.map(
            lambda leaf: padded(leaf[item_R], capacity(len(item_R), LEAST_ROWS)), self.packed
        )
        parts = np.split(
            number_T.reshape(-1).astype(np.int32) + 1, np.cumsum([len(part) for part in ids])[:-1]
        )
        return rows, parts


def unpacked(rows: Any) -> Float[Array, "R D"]:
    """The item table of a request, float32, row 0 zeros: on the device."""
    dense_RD = (
        jnp.asarray(rows, jnp.float32) if isinstance(rows, np.ndarray | jax.Array) else rows.dense()
    )
    return jnp.concatenate([jnp.zeros((1, dense_RD.shape[1])), dense_RD])
