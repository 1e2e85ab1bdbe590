"""Which rows of the flat buffer each context shard holds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from kernels.jagged import Counts, Lengths
from kernels.mask import AttentionMask
from kernels.typing import STATIC, Leaf, PerRow, Scalar


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
    """T rows over C shards, T / C each, in ascending order within a shard; made by one of

    - `contiguous`: slices. They are balanced for semi-local masks, whose work is the same for
      nearly all rows, and `halo` needs them.
    - `striped`: blocks of `block` rows dealt out in turns, 0, 1, .., C-1, C-1, .., 1, 0: an early
      block for every late one. It needs no lengths.
    - `balanced`: blocks dealt out by their work, the heaviest first: for full causal masks over any
      lengths.

    Since a shard's rows ascend, an interval of the buffer is an interval of every shard: `index`
    gives its ends. The owners of blocks may be traced, so that one compiled step serves all layouts
    of a size.
    """

    num_rows: int = dataclasses.field(metadata=STATIC)
    shards: int = dataclasses.field(metadata=STATIC)
    block: int = dataclasses.field(metadata=STATIC)
    owner: Leaf[Int[Array | np.ndarray, " blocks"]]  # shard of each block

    @staticmethod
    def contiguous(num_rows: int, shards: int) -> "Layout":
        """Raises ValueError where T is not divisible by the shards."""
        if num_rows % shards:
            raise ValueError(
                f"T={num_rows} rows cannot be divided among {shards} context shards: "
                f"make T a multiple of {shards}"
            )
        return Layout(num_rows, shards, num_rows // shards, np.arange(shards, dtype=np.int32))

    @staticmethod
    def striped(num_rows: int, shards: int, block: int = 128) -> "Layout":
        """Raises ValueError where T is not a multiple of 2 * C * block."""
        _require_turns(num_rows, 2 * shards, block, f"2 * {shards}")
        turn = np.concatenate([np.arange(shards), np.arange(shards)[::-1]]).astype(np.int32)
        return Layout(num_rows, shards, block, np.tile(turn, num_rows // (2 * shards * block)))

    @staticmethod
    def balanced(
        lengths: Lengths,
        mask: AttentionMask,
        num_rows: int,
        shards: int,
        block: int = 128,
        num_targets: Counts = None,
        num_contextual: Counts = None,
    ) -> "Layout":
        """Blocks dealt out on the host, by the lengths of a batch.

        `block` should be a multiple of the kernels' tiles (128 rows). Raises ValueError where T is
        not a multiple of C * block.
        """
        _require_turns(num_rows, shards, block, f"{shards}")
        pairs_T = mask.row_pairs(lengths, num_rows, num_targets, num_contextual)
        pairs = pairs_T.reshape(-1, block).sum(1)
        load, left = np.zeros(shards, np.int64), np.full(shards, num_rows // (shards * block))
        owner = np.zeros(len(pairs), np.int32)
        for number in np.argsort(-pairs, kind="stable"):
            owner[number] = shard = np.argmin(np.where(left > 0, load, np.iinfo(np.int64).max))
            load[shard] += pairs[number]
            left[shard] -= 1
        return Layout(num_rows, shards, block, owner)

    def check(self) -> None:
        """Raises ValueError where shards do not hold T / C rows each, in the order of `index`.

        A traced `owner` is not looked at.
        """
        blocks = self.num_rows // max(self.block, 1)
        if self.shards < 1 or blocks % self.shards or blocks * self.block != self.num_rows:
            raise ValueError(
                f"a layout of num_rows={self.num_rows} in blocks of block={self.block} cannot be "
                f"divided among shards={self.shards}: choose a block that divides T / shards"
            )
        if isinstance(self.owner, jax.core.Tracer):
            return
        owner = np.asarray(self.owner)
        known = owner.dtype.kind in "iu" and np.isin(owner, np.arange(self.shards)).all()
        if owner.shape != (blocks,) or not known:
            raise ValueError(
                f"owner={owner.tolist()} must be the number of a shard, 0 to {self.shards - 1}, "
                f"for each of {blocks} blocks"
            )
        held = np.bincount(owner, minlength=self.shards)
        if (held != blocks // self.shards).any():
            raise ValueError(
                f"owner gives the shards {held.tolist()} blocks of {self.block} rows, but all "
                f"shards must hold the same number, {blocks // self.shards}: Layout.balanced "
                "and Layout.striped deal them out so"
            )
        if self.is_contiguous and (np.diff(owner) < 0).any():
            raise ValueError(
                f"owner={owner.tolist()} deals out one block a shard in another order than the "
                "shards': take smaller blocks, or Layout.contiguous"
            )

    @property
    def is_contiguous(self) -> bool:
        return self.block == self.rows_per_shard

    @property
    def rows_per_shard(self) -> int:
        return self.num_rows // self.shards

    def rows(self, shard: int | Scalar) -> Int[Array, " t"]:
        """The rows of a shard (its number may be traced), ascending, int32[T / C]."""
        inside = jnp.arange(self.block, dtype=jnp.int32)
        own = jnp.asarray(self.owner) == shard
        blocks = jnp.nonzero(own, size=self.rows_per_shard // self.block)[0].astype(jnp.int32)
        return (blocks[:, None] * self.block + inside[None, :]).reshape(-1)

    def index(self, row: int | Int[Array, "*n"], shard: int | Scalar) -> Int[Array, "*n"]:
        """How many rows of a shard come before `row` of the buffer (0..T).

        This is where `row` is, or would be, in the shard.
        """
        mine = jnp.pad((jnp.asarray(self.owner) == shard).astype(jnp.int32), (0, 1))
        before = jnp.cumsum(mine) - mine
        block = row // self.block
        return before[block] * self.block + mine[block] * (row % self.block)

    def permutation(self) -> PerRow:
        """`x[permutation]` of a buffer in order is the buffer as the shards hold it, in turn."""
        return jax.vmap(self.rows)(jnp.arange(self.shards, dtype=jnp.int32)).reshape(-1)


def _require_turns(num_rows: int, blocks: int, block: int, words: str) -> None:
    if block < 1 or num_rows % (blocks * block):
        raise ValueError(
            f"T={num_rows} rows are not a multiple of {words} context shards * {block=}: "
            "choose another T or block"
        )
