"""Which rows of the flat buffer each context shard holds."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


@dataclasses.dataclass(frozen=True)
class Layout:
    """T rows over C shards, T / C each, in ascending order within a shard.

    `block` None: contiguous slices, balanced for semi-local masks, whose work is the same for all rows. `block` S: blocks of S rows are dealt out
    in turns, 0, 1, .., C-1, C-1, .., 1, 0, 0, 1, ..: each shard has an early block for every late one, and neighbours in a sequence cost nearly
    the same, so full causal masks are balanced whatever the lengths. S should be a multiple of the kernels' tiles (128 rows).

    Since a shard's rows ascend, an interval of the buffer is an interval of every shard: `rank` gives its ends.
    """

    num_rows: int
    shards: int
    block: int | None = None

    def __post_init__(self) -> None:
        if self.num_rows % self.shards:
            raise ValueError(f"T={self.num_rows} rows cannot be divided among {self.shards} context shards: make T a multiple of {self.shards}")
        if self.block is not None and (self.block < 1 or self.num_rows % (2 * self.shards * self.block)):
            raise ValueError(
                f"T={self.num_rows} rows are not a multiple of 2 * {self.shards} context shards * block={self.block}: choose a block that divides T / "
                f"{2 * self.shards}, or block=None for contiguous slices"
            )

    @property
    def rows_per_shard(self) -> int:
        return self.num_rows // self.shards

    def rows(self, shard: Any) -> Int[Array, " t"]:
        """The rows of a shard (its number may be traced), ascending, int32[T / C]."""
        local = jnp.arange(self.rows_per_shard, dtype=jnp.int32)
        if self.block is None:
            return shard * self.rows_per_shard + local
        turn, inside = local // (2 * self.block), local % (2 * self.block)
        early = inside < self.block
        block = jnp.where(early, shard, 2 * self.shards - 1 - shard)
        return turn * (2 * self.shards * self.block) + block * self.block + jnp.where(early, inside, inside - self.block)

    def rank(self, row: Any, shard: Any) -> Any:
        """How many rows of a shard come before `row` of the buffer: where `row` is, or would be, in the shard."""
        if self.block is None:
            return jnp.clip(row - shard * self.rows_per_shard, 0, self.rows_per_shard)
        turn, inside = row // (2 * self.shards * self.block), row % (2 * self.shards * self.block)
        early = jnp.clip(inside - shard * self.block, 0, self.block)
        late = jnp.clip(inside - (2 * self.shards - 1 - shard) * self.block, 0, self.block)
        return turn * (2 * self.block) + early + late

    def permutation(self) -> Int[np.ndarray, " T"]:
        """`x[permutation]` of a buffer in its natural order is the buffer as the shards hold it, one after another."""
        if self.block is None:
            return np.arange(self.num_rows, dtype=np.int32)
        blocks = np.arange(self.num_rows, dtype=np.int32).reshape(-1, 2 * self.shards, self.block)
        pairs = [(shard, 2 * self.shards - 1 - shard) for shard in range(self.shards)]
        return np.concatenate([blocks[:, list(pair)].reshape(-1) for pair in pairs])
