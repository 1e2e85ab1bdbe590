"""Item tables for serving, in 4 or 8 bits: on the device, or in host memory, from where the rows of
a request leave packed and are unpacked on the device.

A row is quantised by itself: `value = offset + scale * code`, where the codes 0 .. 2^bits - 1 span
the row from its smallest to its largest value. INT4 puts two codes in a byte, with scale and offset
in float16. INT8 has one code a byte, with scale and offset in float32. A row of width D takes
D / 2 + 4 and D + 8 bytes, so INT4 is half of INT8 (the layout of FBGEMM's inference tables;
ULTRA-HSTU, arXiv 2602.16986, serves from INT4 tables and does not publish its layout).

A scale has at most 16 significant bits, so that `scale * code` is exact in float32: a row comes
back with the same bits whether or not a compiler fuses the product with the sum.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.tree_util import KeyPath
from jaxtyping import Array, Float, Int, UInt8

from kernels.typing import Leaf

KINDS = ("float32", "int8", "int4")  # of a table on the device
HostKind = Literal["float32", "bfloat16", "int8", "int4"]
HOST_KINDS: tuple[HostKind, ...] = get_args(HostKind)


@dataclasses.dataclass(frozen=True)
class _RowwiseTable:
    """A table of I rows, of X bytes each beside scale and offset."""

    code_IX: Leaf[UInt8[Array | np.ndarray, "I X"]]
    scale_I: Leaf[Float[Array | np.ndarray, " I"]]
    offset_I: Leaf[Float[Array | np.ndarray, " I"]]

    BITS: ClassVar[int]
    SIDE: ClassVar[type[np.floating]]  # dtype of scale and offset

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def shape(self) -> tuple[int, int]:
        return self.code_IX.shape[0], self.code_IX.shape[1] * 8 // self.BITS

    def rows(self, ids: Int[Array, "*n"]) -> Float[Array, "*n D"]:
        """float32 rows, dequantised after the gather of packed bytes; ids outside 0..I-1 read the
        nearest row."""
        code = self._unpack(jnp.take(self.code_IX, ids, axis=0, mode="clip")).astype(jnp.float32)
        scale, offset = (
            jnp.take(side, ids, mode="clip").astype(jnp.float32)[..., None]
            for side in (self.scale_I, self.offset_I)
        )
        return offset + scale * code

    def dense(self) -> Float[Array, "I D"]:
        """All rows, float32."""
        return self.rows(jnp.arange(self.shape[0]))

    def _unpack(self, code: UInt8[Array, "*n X"]) -> UInt8[Array, "*n D"]:
        return code


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int4Table(_RowwiseTable):
    """Byte x of a row holds column x in its low half and column x + D / 2 in its high half, so that
    unpacking is a concatenation."""

    BITS, SIDE = 4, np.float16

    def _unpack(self, code: UInt8[Array, "*n X"]) -> UInt8[Array, "*n D"]:
        return jnp.concatenate([code & 15, code >> 4], axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Table(_RowwiseTable):
    BITS, SIDE = 8, np.float32


def quantize_int4(table_ID: Float[Array | np.ndarray, "I D"]) -> Int4Table:
    """The table in 4 bits. An error is at most half a step, (largest - smallest) / 30 of its row,
    plus the rounding of scale and offset to float16.

    Rows of one value are exact where float16 has the value (0, for one), and elsewhere off by at
    most 2^-21 of it, or 3e-8.

    Raises:
      ValueError: an odd width, a row with NaN or infinity, or values beyond float16 (65504).
    """
    if table_ID.shape[1] % 2:
        width = table_ID.shape[1]
        raise ValueError(
            f"an INT4 table packs two columns a byte, and the width is {width}: "
            f"use an even model.width, such as {width + 1}, or INT8"
        )
    code_ID, scale_I, offset_I = _quantize(np.asarray(table_ID), Int4Table)
    low, high = np.split(code_ID, 2, axis=1)
    return Int4Table(low | high << 4, scale_I, offset_I)


def quantize_int8(table_ID: Float[Array | np.ndarray, "I D"]) -> Int8Table:
    """The table in 8 bits; errors at most (largest - smallest) / 510 of a row, up to float32
    rounding. Raises ValueError as `quantize_int4`, for any width."""
    return Int8Table(*_quantize(np.asarray(table_ID), Int8Table))


def _quantize(
    table_ID: Float[np.ndarray, "I D"], kind: type[_RowwiseTable]
) -> tuple[UInt8[np.ndarray, "I D"], Float[np.ndarray, " I"], Float[np.ndarray, " I"]]:
    table_ID = table_ID.astype(np.float32)
    limit = np.finfo(kind.SIDE).max / 2  # of values, so that a range of two of them has no overflow
    broken = np.flatnonzero(~(np.abs(table_ID) <= limit).all(axis=1))
    if len(broken):
        bad = table_ID[broken[0]]
        worst = (
            bad[~np.isfinite(bad)][0] if not np.isfinite(bad).all() else bad[np.abs(bad).argmax()]
        )
        raise ValueError(
            f"row {broken[0]} of the table holds {worst}: an INT{kind.BITS} table takes finite "
            f"values up to {limit:g} ({len(broken)} rows do not)"
        )
    least_I, top = table_ID.min(axis=1), 2**kind.BITS - 1
    offset_I = least_I.astype(kind.SIDE)
    offset_I = np.where(
        offset_I > least_I, np.nextafter(offset_I, kind.SIDE(-np.inf)), offset_I
    )  # rounded down: no code is below 0
    # Codes are chosen for scale and offset as they are stored, so that their rounding costs next to
    # nothing.
    above_ID = table_ID - offset_I.astype(np.float32)[:, None]
    # A row of one value needs one step only: of what the offset leaves of it, so that it comes back
    # nearly exact.
    steps_I = np.where(table_ID.max(axis=1) > least_I, top, 1)
    scale_I = (above_ID.max(axis=1) / steps_I).astype(kind.SIDE)
    if kind.SIDE is np.float32:
        scale_I = (scale_I.view(np.uint32) & np.uint32(0xFFFFFF00)).view(np.float32)
    step_I1 = scale_I.astype(np.float32)[:, None]
    code_ID = np.divide(above_ID, step_I1, out=np.zeros_like(above_ID), where=step_I1 > 0)
    return np.clip(np.rint(code_ID), 0, top).astype(np.uint8), scale_I, offset_I


ItemTable = Float[Array, "_ _"] | Float[np.ndarray, "_ _"] | Int4Table | Int8Table
Quantizer = Callable[[Float[Array | np.ndarray, "I D"]], Int4Table | Int8Table]
QUANTIZE: dict[str, Quantizer] = {"int8": quantize_int8, "int4": quantize_int4}


def quantize(table_ID: Float[Array | np.ndarray, "I D"], kind: str) -> ItemTable:
    """The table as one of KINDS. Raises ValueError for another."""
    if kind not in KINDS:
        raise ValueError(f"tables={kind!r} must be one of {', '.join(KINDS)}")
    return QUANTIZE[kind](table_ID) if kind in QUANTIZE else np.asarray(table_ID)


def host_table(table_ID: Float[Array | np.ndarray, "I D"], kind: HostKind) -> ItemTable:
    """The table in host memory as one of HOST_KINDS: `take` gathers the rows of a request.

    Raises:
      ValueError: another kind, and what `quantize_int4` and `quantize_int8` refuse.
    """
    if kind not in HOST_KINDS:
        raise ValueError(f"host_table={kind!r} must be one of {', '.join(HOST_KINDS)}")
    if kind == "bfloat16":
        return np.asarray(table_ID).astype(ml_dtypes.bfloat16)
    return jax.tree.map(np.asarray, quantize(np.asarray(table_ID), kind))


def take(table: ItemTable, ids: Int[np.ndarray, " n"]) -> ItemTable:
    """The packed rows of some ids, on the host: what travels to the device for a request.

    Raises:
      ValueError: ids that are no rows of the table.
    """
    rows = table.shape[0]
    if ids.size and not (0 <= ids.min() and ids.max() < rows):
        raise ValueError(
            f"ids {ids.min()}..{ids.max()} must be in 0..{rows - 1}, the rows of the table"
        )
    return jax.tree.map(lambda leaf: np.asarray(leaf)[ids], table)


def row_bytes(table: ItemTable) -> int:
    """Bytes of a row that travel."""
    return sum(leaf.nbytes // len(leaf) for leaf in jax.tree.leaves(table))


def packed[P](params: P, kind: str) -> P:
    """Parameters with their item tables as tables of this kind: fewer bytes on their way to the
    device and on it. `unpacked` is for the device."""
    if kind == "float32":
        return params
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: quantize(leaf, kind) if _is_table(path) else leaf, params
    )


def unpacked[P](params: P) -> P:
    """`packed` parameters as the model takes them, float32 rows for every table; works under
    jit."""
    return jax.tree.map(
        lambda leaf: leaf.dense() if _is_packed(leaf) else leaf, params, is_leaf=_is_packed
    )


def item_table[P](params: P) -> Float[np.ndarray, "I D"]:
    """The item table among the parameters of a model."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return next(np.asarray(leaf) for path, leaf in leaves if _is_table(path))


def served_table[P](params: P) -> ItemTable:
    """The item table among `packed` parameters, as it is stored."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_packed)
    return next(leaf for path, leaf in leaves if _is_table(path))


def with_item_table[P](params: P, table: ItemTable) -> P:
    """(`packed`) parameters with another item table."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: table if _is_table(path) else leaf, params, is_leaf=_is_packed
    )


def rows(table: ItemTable, ids: Int[Array, "*n"]) -> Float[Array, "*n D"]:
    """float32 rows of a table of any kind, by ids in 0 .. I - 1; nothing of the size of the table
    is made."""
    if isinstance(table, _RowwiseTable):
        return table.rows(ids)
    return jnp.take(jnp.asarray(table), ids, axis=0, mode="clip")


def dense(table: ItemTable) -> Float[Array, "I D"]:
    """All rows of a table of any kind, float32."""
    return table.dense() if isinstance(table, _RowwiseTable) else jnp.asarray(table, jnp.float32)


def _is_packed[T](leaf: T) -> bool:
    return isinstance(leaf, _RowwiseTable)


def _is_table(path: KeyPath) -> bool:
    return any(getattr(part, "key", None) == "item_table" for part in path)
