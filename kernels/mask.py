"""The one definition of who attends to whom: a row sees two intervals of keys at most, plus itself.

`AttentionMask` names the rules; `intervals` turns them into flat coordinates, and kernels see
nothing else. The same rules transposed (`RowIntervals`: which rows see a key) give a kernel's
backward its bounds. Whoever must know more of a mask asks it (`windowed`, `in_one_piece`,
`wider_rows`, `locality`) and does not read its options again.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from kernels.jagged import Counts, Lengths, Offsets, Rows
from kernels.typing import PerRow

Ints = Int[Array | np.ndarray, " T"]


class KeyIntervals(NamedTuple):
    """Keys of each row, half-open, in flat coordinates, int32[T] each.

    The diagonal is in neither interval: every real row adds it. Slot 1 holds the near interval,
    slot 0 a detached one (a prefix, a contextual sink). Contextual rows use both, for keys before
    and after. Empty intervals are (0, 0), on padding rows both.
    """

    lo0: PerRow
    hi0: PerRow
    lo1: PerRow
    hi1: PerRow

    def dense(self, num_real: int | Int[Array, ""] | np.integer) -> Bool[Array, "T T"]:
        """The mask as a matrix, with the diagonal of the first `num_real` rows: for references."""
        rows = self.lo0.shape[0]
        key_1T = jnp.arange(rows, dtype=jnp.int32)[None, :]
        seen = inside(key_1T, (bound[:, None] for bound in self))
        row_T1 = jnp.arange(rows, dtype=jnp.int32)[:, None]
        return seen | ((row_T1 == key_1T) & (row_T1 < jnp.asarray(num_real)))

    @classmethod
    def from_dense(cls, mask_TT: Bool[Array | np.ndarray, "..."]) -> "KeyIntervals":
        """Intervals of any boolean matrix, on the host; its diagonal is ignored.

        Raises:
          ValueError: no square matrix, or a row that needs more than two intervals.
        """
        mask = np.array(mask_TT, bool)
        if mask.ndim != 2 or mask.shape[0] != mask.shape[1]:
            raise ValueError(f"a mask is a square matrix, got shape {mask.shape}")
        np.fill_diagonal(mask, False)
        out = np.zeros((4, mask.shape[0]), np.int32)
        for row, (lo, hi) in enumerate(runs(mask)):
            if len(lo) > 2:
                raise ValueError(
                    f"row {row} attends to {len(lo)} intervals of keys besides itself; "
                    "the kernels take two at most"
                )
            slots = [0, 1] if len(lo) == 2 else [1]
            for slot, start, stop in zip(slots, lo, hi, strict=False):
                out[2 * slot : 2 * slot + 2, row] = start, stop
        return cls(*(jnp.asarray(x) for x in out))


def inside(key: Int[Array, "..."], ends: Iterable[Int[Array, "..."]]) -> Bool[Array, "..."]:
    """Whether keys lie in one of two intervals, by the four ends of `KeyIntervals`."""
    lo0, hi0, lo1, hi1 = ends
    return ((key >= lo0) & (key < hi0)) | ((key >= lo1) & (key < hi1))


def runs(mask: Bool[np.ndarray, "rows columns"]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each row of a matrix, where its runs of True begin and end."""
    for edge in np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1):
        yield np.flatnonzero(edge == 1), np.flatnonzero(edge == -1)


class RowIntervals(NamedTuple):
    """`KeyIntervals` transposed: the rows that see each key, int32[T] each; empty ones are (0, 0).

    The diagonal is not included. `ctx`: contextual rows in front of the key. `near`: rows from
    key + 1 on, without a gap. `tail`: full rows and targets further on.
    """

    ctx_lo: PerRow
    ctx_hi: PerRow
    near_lo: PerRow
    near_hi: PerRow
    tail_lo: PerRow
    tail_hi: PerRow


class Locality(NamedTuple):
    """How a mask with a window divides the rows of a buffer, for keys that lie on several shards.

    A *local* row sees the `reach` history rows before it and *copied* keys, those that its sequence
    begins with. All other rows see keys anywhere in their sequence; they are few.

    Attributes:
      first, last: the local rows of the row's sequence are rows first..last-1 of the buffer.
      is_far: real rows that are not local: contextual tokens, full rows, targets.
      is_copied: keys that local rows may see from farther than `reach`.
      reach: rows.
      most_far, most_copied: how many of them a sequence has at most.
    """

    first: PerRow
    last: PerRow
    is_far: Bool[Array, " T"]
    is_copied: Bool[Array, " T"]
    reach: int
    most_far: int
    most_copied: int


@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Who attends to whom inside a sequence of c contextual tokens, h history tokens and m targets.

    Every row sees itself. A contextual row sees all contextual and history tokens. A history row
    sees earlier tokens, a target sees contextual and history tokens, never another target. Both are
    limited as follows; i is the history index of the row (h for a target).

    A contextual sink and a prefix both begin at the sequence's start, so they are one interval and
    the window is the other: no combination of these options needs a third.
    `KeyIntervals.from_dense` takes masks of other origin and rejects what does not fit.

    Attributes:
      window: None is plain causal; w sees the w newest earlier history tokens (`i - j <= w`).
      full_rows: the newest `full_rows` history rows, and then every target, see everything earlier
        in spite of the window.
      prefix: the oldest `prefix` tokens of the sequence, contextual ones counted, are seen by all
        later rows; then a target sees all history.
      context_sink: contextual tokens are seen by all later rows; else only where i + 1 <= window
        (they share one position before the history).
    """

    window: int | None = None
    full_rows: int = 0
    prefix: int = 0
    context_sink: bool = True

    def __post_init__(self) -> None:
        for name in ("window", "full_rows", "prefix"):
            value = getattr(self, name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int) or value < 0
            ):
                allowed = "None or an integer >= 0" if name == "window" else "an integer >= 0"
                raise ValueError(f"AttentionMask.{name} must be {allowed}, got {value!r}")

    @property
    def windowed(self) -> bool:
        """Whether there are rows that do not see everything earlier."""
        return self.window is not None

    @property
    def in_one_piece(self) -> bool:
        """Whether the rows that see a key are one interval, of sequences that are history alone."""
        return self.window is None or self.full_rows == self.prefix == 0

    @property
    def wider_rows(self) -> int:
        """How many of the newest history rows see more than they will once newer rows follow."""
        return 0 if self.window is None else self.full_rows

    def intervals(
        self,
        offsets: Offsets,
        num_rows: int,
        num_targets: Counts = None,
        num_contextual: Counts = None,
    ) -> KeyIntervals:
        """Keys of every row of a buffer of `num_rows` rows.

        Args:
          offsets: int32[B+1], may be traced.
          num_targets, num_contextual: int32[B] or None (none of them). Where they exceed a
            sequence's length the result is clamped, not checked; `hstu_attention` checks what is
            concrete.
        """
        return self.keys_of(Rows.of(offsets, num_rows, num_targets, num_contextual))

    def keys_of(self, rows: Rows) -> KeyIntervals:
        """Keys of given rows; positions behind a sequence count as targets."""
        return KeyIntervals(*map(jnp.asarray, _intervals(jnp, self, rows)))

    def rows_of(self, keys: Rows) -> RowIntervals:
        """`keys_of` transposed: the rows that see the keys which these rows are."""
        return RowIntervals(*map(jnp.asarray, _row_intervals(self, keys)))

    def locality(self, rows: Rows, max_targets: int, max_contextual: int) -> Locality:
        """What is local in all rows of a buffer.

        Args:
          max_targets, max_contextual: most of them in a sequence.

        Raises:
          ValueError: a mask without a window: no row is local.
        """
        if self.window is None:
            raise ValueError(f"{self} has no window: all its rows see keys from anywhere")
        last = jnp.maximum(rows.end - self.full_rows, rows.contextual)
        copied = jnp.minimum(jnp.maximum(rows.contextual, self.prefix), last)
        return Locality(
            first=rows.start + rows.contextual,
            last=rows.start + last,
            is_far=rows.real & ((rows.position < rows.contextual) | (rows.position >= last)),
            is_copied=rows.real & (rows.position < copied),
            reach=self.window,
            most_far=self.full_rows + max_targets + max_contextual,
            most_copied=max(self.prefix, max_contextual),
        )

    def dense(
        self,
        offsets: Offsets,
        num_rows: int,
        num_targets: Counts = None,
        num_contextual: Counts = None,
    ) -> Bool[Array, "T T"]:
        """The mask as a matrix, diagonal included; rows and columns of padding are False.

        Memory is O(T^2): for references and tests.
        """
        keys = self.intervals(offsets, num_rows, num_targets, num_contextual)
        return keys.dense(jnp.asarray(offsets)[-1])

    def row_pairs(
        self,
        lengths: Lengths,
        num_rows: int,
        *counts: Counts,
    ) -> Int[np.ndarray, " T"]:
        """How many keys each row of a buffer sees, itself included, on the host; 0 on padding."""
        offsets = np.pad(np.cumsum(np.asarray(lengths, np.int64)), (1, 0))
        rows = Rows.of(offsets, num_rows, *counts, xp=np)
        lo0, hi0, lo1, hi1 = _intervals(np, self, rows)
        return np.asarray((hi0 - lo0) + (hi1 - lo1) + rows.real)

    def num_pairs(
        self,
        lengths: Lengths,
        num_targets: Counts = None,
        num_contextual: Counts = None,
    ) -> int:
        """Allowed (row, key) pairs of sequences of these `lengths`: the unit of FLOP counts.

        The number is exact and computed on the host.
        """
        total = int(np.sum(np.asarray(lengths, np.int64)))
        return int(self.row_pairs(lengths, total, num_targets, num_contextual).sum())


def layer_masks(options: Mapping[str, Any], layers: int | None = None) -> tuple[AttentionMask, ...]:
    """The mask of every layer.

    Args:
      options: holds, by the names of the fields of `AttentionMask`, one value for all layers, one a
        layer, or none; -1 stands for None. Other names are passed over.
      layers: None: as many as values are given.

    Raises:
      ValueError: another number of values.
    """
    fields = [field.name for field in dataclasses.fields(AttentionMask) if field.name in options]
    given = {name: options[name] for name in fields if options[name]}
    layers = max([1, *map(len, given.values())]) if layers is None else layers
    for name, values in given.items():
        if len(values) not in (1, layers):
            raise ValueError(
                f"model.{name}={values} must hold one value, or one for each of {layers} layers"
            )

    def value(name: str, number: int) -> Any:
        chosen = given[name][number % len(given[name])]
        return None if chosen == -1 else chosen

    return tuple(
        AttentionMask(**{name: value(name, number) for name in given}) for number in range(layers)
    )


def _tidy(
    xp: ModuleType, rows: Rows, real: Bool[Array | np.ndarray, " T"], *ranges: tuple[Ints, Ints]
) -> list[Ints]:
    """Ranges of positions in flat coordinates; empty ones and those of padding become (0, 0)."""
    out = []
    for lo, hi in ranges:
        some = real & (hi > lo)
        out += [xp.where(some, rows.start + lo, 0), xp.where(some, rows.start + hi, 0)]
    return out


def _intervals(xp: ModuleType, mask: AttentionMask, rows: Rows) -> list[Ints]:
    p, c, h, end = rows.position, rows.contextual, rows.history, rows.end
    contextual, target = p < c, p >= end
    # History rows stop before themselves, targets at the end of the history.
    upper = xp.minimum(p, end)
    index = upper - c
    zero = xp.zeros_like(p)
    if mask.window is None:
        near, sink = zero, zero
    else:
        near = c + xp.maximum(index - mask.window, 0)
        sees_context = index + 1 <= mask.window
        if mask.prefix:
            near = xp.where(target, c, near)
        sink = xp.where(sees_context | mask.context_sink, c, 0)
        sink = xp.minimum(xp.maximum(sink, mask.prefix), upper)
        merged = near <= sink
        if mask.full_rows:
            merged |= index >= h - mask.full_rows
        near, sink = xp.where(merged, 0, near), xp.where(merged, 0, sink)
    lo0, hi0 = zero, xp.where(contextual, p, sink)
    lo1, hi1 = xp.where(contextual, p + 1, near), xp.where(contextual, end, upper)
    return _tidy(xp, rows, rows.real, (lo0, hi0), (lo1, hi1))


def _row_intervals(mask: AttentionMask, keys: Rows) -> list[Ints]:
    k, c, h, end = keys.position, keys.contextual, keys.history, keys.end
    n = end + keys.targets
    real = keys.real & (k < end)  # nobody but itself sees a target
    ctx = (jnp.zeros_like(k), jnp.minimum(k, c))
    if mask.window is None:
        near, tail = n, n
    else:
        w = mask.window
        contextual = k < c
        # The first history row that the window has left behind.
        reach = jnp.where(contextual, c + w, k + w + 1)
        seen_by_targets = jnp.where(contextual, h + 1 <= w, (k >= end - w) | (mask.prefix > 0))
        always = (k < mask.prefix) | (contextual & mask.context_sink)
        # Between a contextual key and the history stand contextual rows, which see it.
        limited = jnp.where(contextual, jnp.maximum(reach, c), reach)
        near = jnp.where(always, n, jnp.minimum(limited, end))
        tail = jnp.where(seen_by_targets, end, n)
        if mask.full_rows:
            tail = c + jnp.maximum(h - mask.full_rows, 0)
        tail = jnp.maximum(tail, near)
    return _tidy(jnp, keys, real, ctx, (k + 1, near), (tail, n))
