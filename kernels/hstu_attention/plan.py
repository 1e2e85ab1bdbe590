"""A batch's plan: who sees whom, and what follows from that, made once and shared by all layers."""

import abc
import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from kernels.jagged import Counts, Rows
from kernels.mask import AttentionMask, KeyIntervals, RowIntervals, runs
from kernels.tiles import TileBounds, tile_bounds
from kernels.typing import Leaf, Scalar, Scale

Arrays = Array | tuple[Array, ...]


class AttentionSpec(NamedTuple):
    """What is known of attention calls before their arrays are: kernels are chosen and sized by it.

    Attributes:
      dtype: of q, k and v.
      heads, k_width, v_width: H, K and V.
      biased: whether the calls have a relative bias.
      deterministic: as in `hstu_attention`.
      longest: rows of the longest sequence that there may be, where the plan knows (`make_plan`).
    """

    dtype: DTypeLike
    heads: int
    k_width: int
    v_width: int
    biased: bool = False
    deterministic: bool = False
    longest: int | None = None


class Derived[V: Arrays](abc.ABC):
    """A key for arrays that follow from a plan. Subclasses are frozen dataclasses."""

    @abc.abstractmethod
    def make(self, plan: "AttentionPlan") -> V:
        """Computes the arrays."""


@dataclasses.dataclass(frozen=True)
class TileSizes(Derived[TileBounds]):
    """The bounds of tiles of `block_q` rows and of `block_k` keys. Making them is O(T) work."""

    block_q: int
    block_k: int

    def make(self, plan: "AttentionPlan") -> TileBounds:
        num_real = plan.num_real if plan.own_keys else 0
        return tile_bounds(
            plan.keys, plan.rows, num_real, self.block_q, self.block_k, plan.first_row
        )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "rows", "num_real", "offsets", "stored"],
    meta_fields=["mask", "sequences", "plain", "longest", "first_row", "own_keys", "stored_keys"],
)
@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """A pytree that kernels read. `make_plan` and `plan_of_intervals` make it.

    Attributes:
      keys: which keys each row sees.
      rows: which rows see each key.
      num_real: rows in use; the rest is padding.
      mask: the rules that keys and rows came from; kernels choose sizes by it.
      sequences: B, empty ones included.
      plain: no targets and no contextual tokens were named.
      offsets: int32[B+1] of the sequences, where there are any.
      longest: rows of the longest sequence that there may be; None where nobody promised.
      first_row: the first row that sees anything; before it there are only keys (see `partial`).
      own_keys: whether the rows are keys, too.
      stored, stored_keys: what `find` need not make again.
    """

    keys: Leaf[KeyIntervals]
    rows: Leaf[RowIntervals]
    num_real: Leaf[Scalar]
    mask: AttentionMask
    sequences: int
    plain: bool
    offsets: Leaf[Int[Array, " B1"] | None] = None
    longest: int | None = None
    first_row: int = 0
    own_keys: bool = True
    stored: Leaf[tuple[Arrays, ...]] = ()
    stored_keys: tuple[Derived, ...] = ()

    @property
    def num_rows(self) -> int:
        return self.keys.lo0.shape[0]

    @property
    def joined(self) -> "AttentionPlan":
        """The plan for kernels that want as many keys as rows.

        Rows of zeros take the places before `first_row`.
        """
        return dataclasses.replace(self, first_row=0, own_keys=True, stored=(), stored_keys=())

    @property
    def num_keys(self) -> int:
        return self.num_rows if self.own_keys else self.first_row

    @property
    def rows_in_one_piece(self) -> bool:
        """Whether the rows that see a key are sure to be one interval, for every key."""
        return self.plain and self.mask.in_one_piece

    def find[V: Arrays](self, key: Derived[V]) -> V:
        """What `key` stands for: stored, else made here."""
        if key in self.stored_keys:
            return cast(V, self.stored[self.stored_keys.index(key)])
        return key.make(self)

    def storing[V: Arrays](self, keys: Sequence[Derived[V]], made: Sequence[V]) -> "AttentionPlan":
        """The plan with these arrays stored, so that every later call finds them."""
        new = {
            key: arrays
            for key, arrays in zip(keys, made, strict=True)
            if key not in self.stored_keys
        }
        return dataclasses.replace(
            self,
            stored=(*self.stored, *new.values()),
            stored_keys=(*self.stored_keys, *new),
        )

    def for_rows(self, row_P: Int[Array, " P"]) -> "AttentionPlan":
        """The plan of a buffer whose other queries are zeros, and their outputs not read.

        So a relative bias, whose positions are those of the buffer, is taken for some rows. Other
        rows see themselves alone; tiles without a row of these are left out.

        Args:
          row_P: any order; numbers of T and more are none.
        """
        wanted_T = jnp.zeros(self.num_rows, bool).at[row_P].set(True, mode="drop")
        sorted_P = jnp.sort(row_P)

        def shrunk(lo: Array, hi: Array) -> tuple[Array, Array]:
            first, stop = (
                jnp.searchsorted(sorted_P, end, method="scan_unrolled") for end in (lo, hi)
            )
            some = stop > first
            last = sorted_P[jnp.maximum(stop - 1, 0)]
            begin = sorted_P[jnp.minimum(first, len(row_P) - 1)]
            return jnp.where(some, begin, 0), jnp.where(some, last + 1, 0)

        pairs = zip(self.rows[::2], self.rows[1::2], strict=True)
        return dataclasses.replace(
            self,
            keys=KeyIntervals(*(jnp.where(wanted_T, end, 0) for end in self.keys)),
            rows=RowIntervals(
                *(end.astype(jnp.int32) for lo, hi in pairs for end in shrunk(lo, hi))
            ),
            stored=(),
            stored_keys=(),
            plain=False,
        )

    def row_scales(self, scale: Scale, rows: int) -> Float[Array, " rows"]:
        """The factor of each of `rows` rows; 0 in padding, where the caller's may be NaN."""
        given = self.num_rows - self.first_row
        scale_T = jnp.pad(jnp.broadcast_to(scale, (given,)), (0, rows - given))
        row_T = jnp.arange(rows, dtype=jnp.int32)
        return jnp.where(row_T < self.num_real - self.first_row, scale_T, 0.0)

    def tile_bounds(self, block_q: int, block_k: int) -> TileBounds:
        """Bounds for these tile sizes."""
        return self.find(TileSizes(block_q, block_k))


def make_plan(
    mask: AttentionMask,
    offsets: ArrayLike,
    num_rows: int,
    num_targets: ArrayLike | Counts = None,
    num_contextual: ArrayLike | Counts = None,
    longest: int | None = None,
) -> AttentionPlan:
    """The plan of a batch. Works under `jit` with traced offsets.

    Args:
      mask: the rules.
      offsets: int32[B+1].
      num_rows: T, the capacity of the buffer.
      num_targets, num_contextual: int32[B] or None.
      longest: a promise that no sequence has more rows, which kernels of short sequences ask for
        (the implementation `short`). Checked where offsets are concrete; results are undefined
        where a traced batch breaks it. None: nothing is known.

    Raises:
      ValueError: a sequence is longer than `longest`.
    """
    if longest is not None and not isinstance(offsets, jax.core.Tracer):
        lengths = np.diff(np.asarray(offsets))
        if (lengths > longest).any():
            raise ValueError(
                f"sequence {lengths.argmax()} has {lengths.max()} rows, more than longest = "
                f"{longest}; raise longest or cut the sequence"
            )
    offsets = jnp.asarray(offsets, jnp.int32)
    counts = (None if x is None else jnp.asarray(x) for x in (num_targets, num_contextual))
    where = Rows.of(offsets, num_rows, *counts)
    return AttentionPlan(
        keys=mask.keys_of(where),
        rows=mask.rows_of(where),
        num_real=offsets[-1],
        mask=mask,
        sequences=offsets.shape[0] - 1,
        plain=num_targets is None and num_contextual is None,
        offsets=offsets,
        longest=longest,
    )


def plan_of_intervals(
    keys: KeyIntervals,
    rows: RowIntervals | None = None,
    num_real: int | Scalar | None = None,
) -> AttentionPlan:
    """The plan of a mask of your own, which no `AttentionMask` describes.

    Pass it to `hstu_attention`, with the default `mask`:

        keys = KeyIntervals.from_dense(allowed_TT)
        hstu_attention(q, k, v, offsets, plan=plan_of_intervals(keys), alpha=..., scale=...)

    Args:
      keys: for each row two disjoint intervals of keys, which leave out the row itself; every real
        row sees itself. `KeyIntervals.from_dense` makes them from a matrix.
      rows: the same transposed, for batches that are traced. None derives them from `keys` on the
        host, in O(T^2) memory, and checks both.
      num_real: rows in use; the rest is padding. None: all.

    Raises:
      ValueError: intervals that overlap, hold their own row or touch padding; or a key whose rows
        are no intervals as `RowIntervals` has them. The message names the first row or key.
    """
    num_real = keys.lo0.shape[0] if num_real is None else num_real
    if rows is None:
        rows = _transposed(keys, int(num_real))
    return AttentionPlan(
        keys=keys,
        rows=rows,
        num_real=jnp.asarray(num_real, jnp.int32),
        mask=AttentionMask(),
        sequences=1,
        plain=False,
    )


def _transposed(keys: KeyIntervals, num_real: int) -> RowIntervals:
    seen_TT = np.asarray(keys.dense(0))  # without the diagonal
    row_T = np.arange(len(seen_TT))
    lo0, hi0, lo1, hi1 = (np.asarray(x) for x in keys)
    overlap_T = np.maximum(hi0 - lo0, 0) + np.maximum(hi1 - lo1, 0) > seen_TT.sum(1)
    padding_T = np.where(row_T < num_real, seen_TT[:, num_real:].any(1), seen_TT.any(1))
    for wrong_T, problem in (
        (overlap_T, "are not disjoint intervals inside the buffer"),
        (seen_TT.diagonal(), "hold the row itself, which sees itself anyhow; leave it out"),
        (padding_T, f"touch padding, which begins at row {num_real}"),
    ):
        if wrong_T.any():
            raise ValueError(f"the intervals of row {wrong_T.argmax()} {problem}")
    out = np.zeros((6, len(seen_TT)), np.int32)
    for key, (starts, ends) in enumerate(runs(seen_TT.T)):
        for lo, hi in zip(starts, ends, strict=True):
            slot = 0 if lo < key else 2 if lo == key + 1 else 4
            if out[slot + 1, key]:
                raise ValueError(
                    f"key {key} is seen by {len(starts)} intervals of rows that begin at "
                    f"{starts.tolist()}; the kernels take one before the key, one right behind "
                    "it, and one later on"
                )
            out[slot : slot + 2, key] = lo, hi
    return RowIntervals(*(jnp.asarray(x) for x in out))
