"""A batch of which every device of a group has read users of its own: `parallel.batches`.

A device reads the users whose middle row lies in its slice of the buffer. So it reads about T / C
rows, and sends what sticks out of the slice: no user more than half of its rows. Every size follows
from the longest user and is static; over blocks of rows (`Layout.striped`) most rows move.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32, Shaped

from kernels.jagged import Offsets, lengths_to_offsets, offsets_to_lengths
from kernels.typing import Scalar
from ultra_hstu.parallel.mesh import CONTEXT
from ultra_hstu.parallel.reshard import gather_then_slice, needed_capacity, to_shared
from ultra_hstu.parallel.shards import LocalRows, Shards

Collective = Literal["all_to_all", "all_gather"]
HostLengths = Int[np.ndarray, "... B R"]  # rows of the users of groups' batches in each buffer
HostColumns = dict[str, Int[np.ndarray, "..."]]


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Static: the sizes of an exchange, one a buffer of a batch.

    Attributes:
      rows: T, which the group shares.
      read: that a device has room for where it reads its users.
      capacity: that a device may send to one other.
      by: all_to_all; all_gather sends all rows to all.
      limit: of the capacity, where a run sets one; then `check` says which batches fit.
    """

    shards: Shards
    rows: tuple[int, ...]
    read: tuple[int, ...]
    capacity: tuple[int, ...]
    by: Collective = "all_to_all"
    limit: int | None = None

    @staticmethod
    def of(
        shards: Shards,
        rows: tuple[int, ...],
        longest: tuple[int, ...],
        *,
        by: Collective = "all_to_all",
        limit: int | None = None,
    ) -> "Exchange":
        """Sizes that no batch of users exceeds.

        Args:
          longest: rows of a user in each buffer, at most.

        Raises:
          ValueError: rows that cannot be divided among the devices of a group.
        """
        layouts = [shards.layout(num_rows) for num_rows in rows]
        # Of all buffers together, by which users are divided.
        out = sum(longest) // 2
        most = sum(layout.rows_per_shard for layout in layouts) + 2 * out
        read = tuple(min(num_rows, most) for num_rows in rows)
        capacity = [
            min(layout.rows_per_shard, size) for layout, size in zip(layouts, read, strict=True)
        ]
        if len(layouts) == 1:  # a device's users lie around its slice
            (layout,) = layouts
            owner_T = np.repeat(np.asarray(layout.owner), layout.block)
            first_C = np.arange(shards.context) * layout.rows_per_shard
            sent_CC = [
                np.bincount(
                    owner_T[max(first - out, 0) : first + layout.rows_per_shard + out],
                    minlength=shards.context,
                )
                for first in first_C
            ]
            capacity = [int(np.max(sent_CC, initial=0, where=~np.eye(shards.context, dtype=bool)))]
        if limit is not None:
            capacity = [min(size, limit) for size in capacity]
        return Exchange(shards, rows, read, tuple(capacity), by, limit)

    def readers(self, length_BR: HostLengths) -> Int[np.ndarray, "... B"]:
        """The device of a group that reads each user of its batch. On the host."""
        length_B = length_BR.sum(-1)
        middle_B = np.cumsum(length_B, -1) - length_B + np.maximum(length_B - 1, 0) // 2
        reader_B = middle_B // (sum(self.rows) // self.shards.context)
        return np.minimum(reader_B, self.shards.context - 1)  # of empty places, perhaps the last

    def divided(self, columns: HostColumns, length_SGBR: HostLengths) -> HostColumns:
        """What each device reads of the columns of S steps and G groups, [S, G * C * B].

        Examples that others read are zeros. Events that a batch names for itself (`event`), which
        its histories count, are whole.
        """
        device_C1 = np.arange(self.shards.context)[:, None]
        own_SGCB = self.readers(length_SGBR)[:, :, None] == device_C1
        steps, groups = own_SGCB.shape[:2]
        found = {}
        for name, column in columns.items():
            column_SGCB = column.reshape(steps, groups, 1, -1).repeat(self.shards.context, axis=2)
            if name.partition("/")[0] != "event":
                column_SGCB *= own_SGCB
            found[name] = column_SGCB.reshape(steps, -1)
        return found

    def check(self, length_SGBR: HostLengths) -> None:
        """Looks at all batches of an epoch, where a `limit` is given. On the host.

        Raises:
          ValueError: a batch whose exchange needs more, with the number that would do.
        """
        if self.limit is None:
            return
        length_XBR = length_SGBR.reshape(-1, *length_SGBR.shape[2:])
        own_XCB = self.readers(length_XBR)[:, None] == np.arange(self.shards.context)[:, None]
        total_XCR = own_XCB.astype(np.int64) @ length_XBR
        needed = max(
            needed_capacity(total_C, self.shards.layout(num_rows))
            for r, num_rows in enumerate(self.rows)
            for total_C in total_XCR[:, :, r]
        )
        if needed > self.limit:
            raise ValueError(
                f"parallel.exchange_rows={self.limit} rows from one device to another, but batches "
                f"of this epoch need {needed}: raise it, or leave it out for what all can need"
            )


class SharedRows(NamedTuple):
    """A buffer of a group's batch, from those that its devices have read.

    Attributes:
      rows: `LocalRows` in the place of each array.
      offsets: of all the group's sequences.
      start: the first row of those that this device has read.
      fits: whether all rows have come. If not, floats are NaN.
    """

    rows: tuple[Array, ...]
    offsets: Int32[Array, " B1"]
    start: Scalar
    fits: Bool[Array, ""]


def share(
    rows: tuple[Shaped[Array, "L ..."], ...], own: Offsets, exchange: Exchange, number: int = 0
) -> SharedRows:
    """Puts a buffer together, inside `shard_map`.

    Args:
      rows: int32 or float32, all columns move together.
      own: offsets of the group's B sequences, of which those that others read are empty.
      number: of the buffer.
    """
    layout = exchange.shards.layout(exchange.rows[number])
    columns = [_bits(x).reshape(x.shape[0], -1) for x in rows]
    value_LX, total_1 = jnp.concatenate(columns, axis=1), jnp.asarray(own)[-1:]
    if exchange.by == "all_gather":
        shared = gather_then_slice(value_LX, total_1, layout)
    else:
        shared = to_shared(value_LX, total_1, layout, exchange.capacity[number])
    fits = shared.fits & (jax.lax.pmax(total_1[0], CONTEXT) <= value_LX.shape[0])
    ends = np.cumsum([column.shape[1] for column in columns])[:-1].tolist()
    found = []
    for part_tX, x in zip(jnp.split(shared.values, ends, axis=1), rows, strict=True):
        part_t = part_tX.reshape(len(part_tX), *x.shape[1:])
        if jnp.issubdtype(x.dtype, jnp.floating):
            part_t = jax.lax.bitcast_convert_type(part_t, jnp.float32)
            part_t = jnp.where(fits, part_t, jnp.nan)
        found.append(LocalRows(part_t, layout.num_rows))
    return SharedRows(
        tuple(found),  # type: ignore[arg-type]  # they take the places of arrays
        jnp.asarray(lengths_to_offsets(together(offsets_to_lengths(own)))),
        shared.offsets[jax.lax.axis_index(CONTEXT)],
        fits,
    )


def together[Tree](x: Tree) -> Tree:
    """What the devices of a group have parts of, zeros elsewhere (a pytree), whole on each."""
    return jax.lax.psum(x, CONTEXT)


def before_this(count: Scalar) -> Scalar:
    """The sum of the counts of the devices before this one in its group."""
    count_C = jax.lax.all_gather(count, CONTEXT)
    return (jnp.cumsum(count_C, dtype=jnp.int32) - count_C)[jax.lax.axis_index(CONTEXT)]


def _bits(x: Shaped[Array, "..."]) -> Int32[Array, "..."]:
    return jax.lax.bitcast_convert_type(x, jnp.int32)
