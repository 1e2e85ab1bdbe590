"""The relative bias of HSTU: a table over distances in position plus one over log-time buckets.

Heads share the tables. Source: the published research code of HSTU (arXiv 2402.17152):
`bias[i, j] = position_table[N - 1 + j - i] + time_table[bucket(i, j)]`.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels.typing import Leaf, PerRow, PositionTable, TimeTable

BUCKET_WIDTH = 0.301  # of natural log seconds; the published constant


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RelativeBias:
    """What is added to the scores, inside the SiLU. A pytree. One table at least is given.

    Attributes:
      position_table: entry N - 1 + key position - query position; the ends serve distances beyond.
      time_table: entry `time_buckets(query time - key time)`.
      timestamps: seconds, of each row as a key; needed with `time_table`.
      query_timestamps: seconds, of each row as a query. The published code takes the time of the
        row's NEXT event.

    Seconds are int32 and so are their differences. So all times must lie within 2^31 - 1 seconds
    (68 years) of one another, as Unix times from 1970 to 2038 do; beyond, the difference wraps and
    the bucket is wrong.
    """

    position_table: Leaf[PositionTable | None] = None  # P = 2N - 1
    time_table: Leaf[TimeTable | None] = None
    timestamps: Leaf[PerRow | None] = None
    query_timestamps: Leaf[PerRow | None] = None

    @property
    def times(self) -> tuple[Int[Array, " queries"], Int[Array, " keys"]] | None:
        """Seconds of rows as queries and as keys, where a time table asks for them."""
        if self.time_table is None or self.timestamps is None or self.query_timestamps is None:
            return None
        return self.query_timestamps, self.timestamps

    def dense(self, num_rows: int) -> Float[Array, "T T"]:
        """float32 bias of every (query row, key row), O(T^2): for references and tests.

        It means nothing across sequences.
        """
        rows = jnp.arange(num_rows, dtype=jnp.int32)
        # within a sequence the difference of positions is the difference of rows
        distance = rows[None, :] - rows[:, None]
        gap = None if self.times is None else self.times[0][:, None] - self.times[1][None, :]
        return self.added_to(jnp.zeros((num_rows, num_rows), jnp.float32), distance, gap)

    def added_to(
        self,
        scores: Float[Array, "..."],
        distance: Int[Array, "..."] | None,
        gap: Int[Array, "..."] | None,
    ) -> Float[Array, "..."]:
        """float32 scores of pairs, with their bias.

        Args:
          distance: key position - query position, where there is a table of positions.
          gap: query time - key time in seconds, where there is a table of times.
        """
        if self.position_table is not None and distance is not None:
            scores = scores + position_bias(self.position_table, distance)
        if self.time_table is not None and gap is not None:
            table = self.time_table.astype(jnp.float32)
            scores = scores + table[time_buckets(gap, table.shape[0])]
        return scores


def position_bias(
    position_table: PositionTable, distance: Int[Array, "..."]
) -> Float[Array, "..."]:
    """float32 entries of the table for key position - query position."""
    middle = position_table.shape[0] // 2
    return position_table.astype(jnp.float32)[
        jnp.clip(middle + distance, 0, position_table.shape[0] - 1)
    ]


@functools.cache
def bucket_starts(num_buckets: int) -> np.ndarray:
    """int32: the smallest gap in seconds of bucket 0, 1, ...

    Buckets that no int32 gap reaches have int32's largest value.
    """
    largest = int(np.iinfo(np.int32).max)
    starts = [0]
    for bucket in range(1, num_buckets):
        start = largest
        if bucket * BUCKET_WIDTH < math.log(largest):
            start = math.ceil(math.exp(bucket * BUCKET_WIDTH))
            while start > 1 and math.log(start - 1) / BUCKET_WIDTH >= bucket:
                start -= 1
            while math.log(start) / BUCKET_WIDTH < bucket:
                start += 1
        starts.append(start)
    return np.asarray(starts, np.int32)


def time_buckets(gap: Int[Array, "..."], num_buckets: int) -> Int[Array, "..."]:
    """`min(floor(ln(max(|gap|, 1)) / 0.301), num_buckets - 1)` for gaps in int32 seconds, exact.

    A float32 logarithm alone may round across an edge; it finds the nearest edge, and integers
    decide on which side the gap lies.
    """
    size = jnp.abs(gap)
    nearest = jnp.round(
        jnp.log(jnp.maximum(size, 1).astype(jnp.float32)) * (1 / BUCKET_WIDTH)
    ).astype(jnp.int32)
    nearest = jnp.minimum(nearest, num_buckets - 1)
    start = jnp.asarray(bucket_starts(num_buckets)).at[nearest].get(mode="promise_in_bounds")
    return nearest - (size < start).astype(jnp.int32)
