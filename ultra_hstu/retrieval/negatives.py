"""Negative items of a batch: uniform over the catalogue, or drawn from the batch itself.

All are pure functions of a key.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt

RowKeys = Key[Array, "*rows"]  # one for all rows, or one a row
Drawn = Int[Array, "{rows} {count}"]


def uniform_negatives(key: RowKeys, rows: int, count: int, num_items: int) -> Drawn:
    """`count` ids for each row, uniform over 1..num_items, independent and with replacement."""
    return 1 + _below(key, rows, count, jnp.uint32(num_items))


class InBatchPool(NamedTuple):
    """The ids that negatives are drawn from, and the log probability of each."""

    id_P: Int[Array, " P"]  # the first `size` are drawn from with equal probability
    size: Int[Array, ""]
    # Log of the share of the pool that is this item; -inf for one that cannot be drawn.
    log_q_I: Float[Array, " I1"]


def in_batch_pool(item_P: Int[Array, " P"], num_items: int) -> InBatchPool:
    """The pool of a batch's items (usually its targets), padding (0) left out.

    A popular item is drawn as often as it occurs, which the loss should be told (`log_q_I`).
    """
    count_I = jnp.zeros(num_items + 1, jnp.int32).at[item_P].add(1).at[0].set(0)
    size = jnp.sum(count_I)
    (place_P,) = jnp.nonzero(item_P > 0, size=item_P.shape[0], fill_value=0)
    log_size = jnp.log(jnp.maximum(size, 1).astype(jnp.float32))
    return InBatchPool(item_P[place_P], size, jnp.log(count_I.astype(jnp.float32)) - log_size)


def in_batch_negatives(key: RowKeys, pool: InBatchPool, rows: int, count: int) -> Drawn:
    """`count` ids for each row from the pool, independent and with replacement.

    A row's own positive may be among them: the loss removes it.
    """
    return pool.id_P[_below(key, rows, count, jnp.maximum(pool.size, 1).astype(jnp.uint32))]


def _below(key: RowKeys, rows: int, count: int, bound: UInt[Array, ""]) -> Drawn:
    """Uniform integers 0..bound-1 as the remainder of one 32-bit word.

    The probability of an id is off by at most bound / 2^32 of itself: 1e-6 for MovieLens, 2e-4 for
    700,000 items. `jax.random.randint` spends two words to remove even that, and takes several
    times as long: most of a cheap loss.
    """
    if key.ndim:
        bits_RC = jax.vmap(lambda row_key: jax.random.bits(row_key, (count,), jnp.uint32))(key)
    else:
        bits_RC = jax.random.bits(key, (rows, count), jnp.uint32)
    return (bits_RC % bound).astype(jnp.int32)
