"""Negative items of a batch: uniform over the catalogue, or drawn from the batch itself.

All are pure functions of keys. The loss draws them chunk by chunk (`drawn_uniformly`,
`drawn_from`), so that no array has the negatives of all rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, Key, Num, UInt

from kernels.sampled_softmax import Negatives
from ultra_hstu.parallel.shards import Shards

RowKeys = Key[Array, "*rows"]  # one for all rows, or one a row
Drawn = Int[Array, "{rows} {count}"]


def uniform_negatives(
    key: RowKeys, rows: int, count: int, num_items: int | Int[Array, ""]
) -> Drawn:
    """`count` ids for each row, uniform over 1..num_items, independent and with replacement."""
    return 1 + _below(key, rows, count, jnp.asarray(num_items, jnp.uint32))


class InBatchPool(NamedTuple):
    """The ids that negatives are drawn from."""

    id_P: Int[Array, " P"]  # the first `size` are drawn from with equal probability
    size: Int[Array, ""]


def in_batch_pool(item_P: Int[Array, " P"]) -> InBatchPool:
    """The pool of a batch's items (usually its targets), padding (0) left out.

    A popular item is drawn as often as it occurs, which the loss should be told
    (`log_frequency`).
    """
    (place_P,) = jnp.nonzero(item_P > 0, size=item_P.shape[0], fill_value=0)
    return InBatchPool(item_P[place_P], jnp.sum(item_P > 0, dtype=jnp.int32))


def log_frequency(count_I: Num[np.ndarray, " I1"]) -> Float32[np.ndarray, " I1"]:
    """The log probability that a draw of `in_batch_negatives` gives an item, over all batches.

    It is the item's share of the training targets and not of the batch: weighted by the latter, the
    negatives of a batch would stand for its own distinct items, instead of for the catalogue. An
    item that is no target counts as if it were one once.

    Args:
      count_I: how often each item is a training target; entry 0 is padding.
    """
    count_I = np.maximum(count_I, 1).astype(np.float64)
    return np.log(count_I / count_I[1:].sum()).astype(np.float32)


def in_batch_negatives(key: RowKeys, pool: InBatchPool, rows: int, count: int) -> Drawn:
    """`count` ids for each row from the pool, independent and with replacement.

    A row's own positive may be among them: the loss removes it.
    """
    return pool.id_P[_below(key, rows, count, jnp.maximum(pool.size, 1).astype(jnp.uint32))]


def drawn_uniformly(
    key_T: Key[Array, " T"],
    count: int,
    num_items: int | Int[Array, ""],
    *,
    rows_per_draw: int = 1,
) -> Negatives:
    """`uniform_negatives` of each row, or of the first of `rows_per_draw`, from its own key."""
    if isinstance(num_items, int):  # part of the program, where division by it is cheap
        return Negatives(
            key_T,
            count,
            lambda key_C, _: uniform_negatives(key_C, key_C.shape[0], count, num_items),
            rows_per_draw=rows_per_draw,
        )
    return Negatives(
        key_T,
        count,
        lambda key_C, items: uniform_negatives(key_C, key_C.shape[0], count, items),
        num_items,
        rows_per_draw,
    )


def drawn_from(
    pool: InBatchPool, key_T: Key[Array, " T"], count: int, *, rows_per_draw: int = 1
) -> Negatives:
    """`in_batch_negatives` of each row, or of the first of `rows_per_draw`, from its own key."""
    return Negatives(
        key_T,
        count,
        lambda key_C, pool: in_batch_negatives(key_C, pool, key_C.shape[0], count),
        pool,
        rows_per_draw,
    )


def check_draws(rows_per_draw: int, rows: int, shards: Shards, groups: int) -> None:
    """Raises ValueError where rows that share a draw on one mesh would not on another.

    Args:
      rows: of the buffer that the `context` devices share.
      groups: parts of a batch that lie in it one behind another, wherever the one before ends.
    """
    if rows_per_draw == 1:
        return
    name = f"loss.rows_per_draw={rows_per_draw}"
    if groups > 1:
        raise ValueError(
            f"{name} needs as many parallel.data as parallel.groups: here {groups} groups share a "
            "buffer, and rows would share a draw with others than where each has its own; or set "
            "loss.rows_per_draw=1"
        )
    if shards.context > 1 and (block := shards.layout(rows).block) % rows_per_draw:
        raise ValueError(
            f"{name} must divide the blocks of {block} rows that parallel.context={shards.context} "
            "devices have, so that every mesh draws the same: use a divisor"
        )


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
