"""What a mask means for one batch: key intervals and tile bounds, computed once and shared by all layers."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kernels.jagged import Rows
from kernels.mask import AttentionMask, KeyIntervals
from kernels.tiles import TileBounds, tile_bounds


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "rows", "num_real", "stored"],
    meta_fields=["mask", "sequences", "plain", "first_row", "own_keys"],
)
@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """A pytree; `make_plan` makes it, kernels read it.

    Attributes:
      keys: which keys each row sees (`KeyIntervals`).
      rows: which rows see each key (`RowIntervals`).
      num_real: int32 scalar, rows in use; the rest is padding.
      stored: tile bounds computed beforehand, by "block_q x block_k".
      mask: the rules all this came from.
      sequences: B, empty ones included.
      plain: no targets and no contextual tokens were named.
      first_row: place of the first row that sees anything; before it there are only keys (see `partial`).
      own_keys: whether the rows are keys, too.
    """

    keys: Any
    rows: Any
    num_real: Any
    stored: Any
    mask: AttentionMask
    sequences: int
    plain: bool
    first_row: int = 0
    own_keys: bool = True

    @property
    def intervals(self) -> KeyIntervals:
        return self.keys

    @property
    def num_rows(self) -> int:
        return self.keys.lo0.shape[0]

    @property
    def joined(self) -> "AttentionPlan":
        """The plan for kernels that want rows of zeros in the places before `first_row`, and as many keys as rows."""
        return dataclasses.replace(self, first_row=0, own_keys=True, stored={})

    @property
    def num_keys(self) -> int:
        return self.num_rows if self.own_keys else self.first_row

    @property
    def rows_in_one_piece(self) -> bool:
        """Whether the rows that see a key are sure to be one interval, for every key."""
        return self.plain and self.mask.in_one_piece

    def tile_bounds(self, block_q: int, block_k: int) -> TileBounds:
        """Bounds for these tile sizes: the stored ones, else computed here, O(T) work."""
        found = self.stored.get(f"{block_q}x{block_k}")
        return (
            tile_bounds(
                self.keys,
                self.rows,
                self.num_real if self.own_keys else 0,
                block_q,
                block_k,
                self.first_row,
            )
            if found is None
            else found
        )


def make_plan(
    mask: AttentionMask,
    offsets: Any,
    num_rows: int,
    num_targets: Any = None,
    num_contextual: Any = None,
    *,
    tiles: Sequence[tuple[int, int]] = (),
) -> AttentionPlan:
    """The plan of a batch. Works under `jit` with traced offsets.

    Args:
      mask: the rules.
      offsets: int32[B+1].
      num_rows: T, the capacity of the buffer.
      num_targets, num_contextual: int32[B] or None.
      tiles: (block_q, block_k) sizes whose bounds are computed now; others are computed where they are asked for.
    """
    offsets = jnp.asarray(offsets, jnp.int32)
    where = Rows.of(offsets, num_rows, num_targets, num_contextual)
    keys, rows = mask.keys_of(where), mask.rows_of(where)
    stored = {f"{bq}x{bk}": tile_bounds(keys, rows, offsets[-1], bq, bk) for bq, bk in tiles}
    plain = num_targets is None and num_contextual is None
    return AttentionPlan(keys, rows, offsets[-1], stored, mask, offsets.shape[0] - 1, plain)
