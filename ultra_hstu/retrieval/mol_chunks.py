"""Softmax losses of a mixture of logits, sampled or full, in chunks of rows and of items.

As in `kernels.softmax_rows`, the gradients are made together with the losses, each pair's weights
for a chunk at one time: what is kept has the size of the gradients of the parts of rows and items.
No array has L numbers for every row and negative, or for every row and item.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt32

from kernels.sampled_softmax import Negatives
from kernels.sampled_softmax.spec import COLLISION_LOGIT
from kernels.softmax_rows import PerItem, PerRow, default_chunk_rows
from ultra_hstu.retrieval.mol import (
    Dropped,
    ItemPart,
    Net,
    UserPart,
    fast,
    mixed,
)

CHUNK_ITEMS = 1024  # of a full softmax, whose pairs with a chunk of rows exist at one time


class Given(NamedTuple):
    """What a loss is differentiated in."""

    rows: UserPart  # of all T rows
    items: ItemPart
    cross: Net
    positive_T: PerRow  # the score of the positive


class Rest(NamedTuple):
    """What else rows and items have.

    Attributes:
      share_T: weight of each row, as a share of all.
      id_T: of the positive, 0 where the weight is 0.
      word_T: as of `Dropped`.
      number_I: of each item, as of `Dropped`.
      drawn: what negatives are drawn from: of each row, and shared; None: all items are negatives.
      shift_I: what a negative's logit is lowered by.
      num_items: the whole catalogue, where the table has room for more.
    """

    share_T: PerRow
    id_T: Int[Array, " T"]
    word_T: UInt32[Array, " T"]
    number_I: Int[Array, " I"]
    drawn: PyTree
    shift_I: PerItem | None
    num_items: Int[Array, ""] | None


@dataclasses.dataclass(frozen=True)
class Chunks:
    """How a loss is computed.

    Attributes:
      dtype: of the factors of products.
      rate: of the weights that are dropped.
      draw: as of `Negatives`; None: all items are negatives.
      negatives: of a row.
      rows_per_draw: so many successive rows share their negatives.
      rows, items: of a chunk, at most; None: what suits the device.
    """

    dtype: DTypeLike
    rate: float
    draw: Callable[[PyTree, PyTree], Int[Array, "C R"]] | None = None
    negatives: int = 0
    rows_per_draw: int = 1
    rows: int | None = None
    items: int = CHUNK_ITEMS


def softmax_loss(
    given: Given,
    share_T: PerRow,
    id_T: Int[Array, " T"],
    word_T: UInt32[Array, " T"],
    number_I: Int[Array, " I"],
    negatives: Negatives | None,
    *,
    dtype: DTypeLike,
    rate: float,
    shift_I: PerItem | None = None,
    num_items: Int[Array, ""] | None = None,
    chunk_rows: int | None = None,
    chunk_items: int = CHUNK_ITEMS,
) -> Float[Array, ""]:
    """`sum_t share_t * -log softmax([s_positive, s_negatives])_0`, as `loss.softmax_loss` has it.

    Differentiable in `given`, once. Arguments as of `Rest`, and of `loss.softmax_loss`.
    """
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"{chunk_rows=} must be at least 1, or None for what suits the device")
    chunks = Chunks(dtype, rate, rows=chunk_rows, items=chunk_items)
    drawn = None
    if negatives is not None:
        drawn = negatives.rows, negatives.shared
        chunks = dataclasses.replace(
            chunks,
            draw=negatives.draw,
            negatives=negatives.count,
            rows_per_draw=negatives.rows_per_draw,
        )
    rest = Rest(share_T, id_T, word_T, number_I, drawn, shift_I, num_items)
    return _loss(chunks, given, rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(chunks: Chunks, given: Given, rest: Rest) -> Float[Array, ""]:
    return _forward(chunks, given, rest)[0]


def _forward(chunks: Chunks, given: Given, rest: Rest) -> tuple[Float[Array, ""], Given]:
    """The loss and its gradients, chunk by chunk of rows; those of padding at the end are left."""
    rows = len(given.positive_T)
    gate_width, logits = given.cross.output_HL.shape
    pairs = chunks.negatives if chunks.draw else min(chunks.items, len(given.items.gate_IL))
    size = chunks.rows or default_chunk_rows(pairs * (2 * gate_width + 4 * logits))
    size = max(1, min(size, rows) // chunks.rows_per_draw) * chunks.rows_per_draw
    number = -(-rows // size)
    # Keys cannot be filled up with zeros; the last row stands for those behind it.
    row_N = jnp.minimum(jnp.arange(number * size, dtype=jnp.int32), rows - 1)
    real_N = jnp.arange(number * size) < rows
    of_rows = None if rest.drawn is None else rest.drawn[0]
    columns = (given.rows, given.positive_T, rest.id_T, rest.word_T, of_rows)
    columns = jax.tree.map(lambda leaf: leaf[row_N], columns)
    share_N = jnp.where(real_N, rest.share_T[row_N], 0.0)
    end = jnp.max(jnp.where(share_N > 0, 1 + jnp.arange(number * size), 0))
    of_chunk = _sampled if chunks.draw else _full

    def step(
        i: Int[Array, ""], carry: tuple[Float[Array, ""], Given]
    ) -> tuple[Float[Array, ""], Given]:
        loss, grads = carry
        take = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=i * size, slice_size=size
        )
        rows_C, positive_C, id_C, word_C, drawn_C = jax.tree.map(take, columns)
        chunk = Rest(take(share_N), id_C, word_C, rest.number_I, drawn_C, *rest[5:])
        shared = None if rest.drawn is None else rest.drawn[1]
        of_c = Given(rows_C, given.items, given.cross, positive_C)
        loss_c, found = of_chunk(chunks, of_c, chunk, shared, grads)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * size, axis=0)
        return loss + loss_c, Given(
            jax.tree.map(put, grads.rows, found.rows),
            found.items,
            found.cross,
            put(grads.positive_T, found.positive_T),
        )

    zeros = Given(columns[0], given.items, given.cross, columns[1])
    zeros = jax.tree.map(jnp.zeros_like, zeros)
    loss, grads = jax.lax.fori_loop(0, -(-end // size), step, (jnp.zeros(()), zeros))
    grads = grads._replace(
        rows=jax.tree.map(lambda leaf: leaf[:rows], grads.rows), positive_T=grads.positive_T[:rows]
    )
    return loss, grads


def _backward(chunks: Chunks, grads: Given, g: Float[Array, ""]) -> tuple[Given, None]:
    return jax.tree.map(lambda leaf: g * leaf, grads), None


_loss.defvjp(_forward, _backward)

Found = tuple[Float[Array, ""], Given]  # loss of a chunk; gradients: of its rows, of all items


def _sampled(chunks: Chunks, given: Given, rest: Rest, shared: PyTree, grads: Given) -> Found:
    """A chunk of G groups of rows, each with negatives of its own."""
    assert chunks.draw is not None
    together, rows = chunks.rows_per_draw, len(given.positive_T)
    first = jax.tree.map(lambda leaf: leaf[::together], rest.drawn)
    id_GR = jnp.clip(chunks.draw(first, shared), 0, len(given.items.gate_IL) - 1)
    collides_CR = jnp.repeat(id_GR, together, axis=0) == rest.id_T[:, None]
    shift_CR: Array | float = 0.0
    if rest.shift_I is not None:
        shift_CR = jnp.repeat(rest.shift_I[id_GR], together, axis=0)

    def loss(
        rows_C: UserPart, items_GR: ItemPart, cross: Net, positive_C: PerRow
    ) -> Float[Array, ""]:
        user_GCPW, gate_GCL = (
            x.reshape(-1, together, *x.shape[1:]) for x in (rows_C.component_UPW, rows_C.gate_UL)
        )
        logit = products("gcpw,grqw->gcrpq", user_GCPW, items_GR.component_IQW, chunks.dtype)
        dropped = Dropped(
            rest.word_T.reshape(-1, together, 1), rest.number_I[id_GR][:, None], chunks.rate
        )
        score, _ = mixed(
            logit,
            gate_GCL[:, :, None],
            items_GR.gate_IL[:, None],
            cross,
            fast(chunks.dtype),
            dropped,
        )
        score_CR = jnp.where(collides_CR, COLLISION_LOGIT, score.reshape(rows, -1) - shift_CR)
        score_CX = jnp.concatenate([positive_C[:, None], score_CR], axis=1)
        return jnp.sum(rest.share_T * (jax.nn.logsumexp(score_CX, axis=1) - positive_C))

    items_GR = jax.tree.map(lambda leaf: leaf[id_GR], given.items)
    value, (d_rows, d_items, d_cross, d_positive) = jax.value_and_grad(loss, (0, 1, 2, 3))(
        given.rows, items_GR, given.cross, given.positive_T
    )
    items = jax.tree.map(
        lambda sum_, d: sum_.at[id_GR].add(d, mode="promise_in_bounds"), grads.items, d_items
    )
    return value, Given(d_rows, items, _sum(grads.cross, d_cross), d_positive)


def _full(chunks: Chunks, given: Given, rest: Rest, shared: PyTree, grads: Given) -> Found:
    """A chunk of rows with all items, in chunks: once for the sum, once for its gradients."""
    entries = len(given.items.gate_IL)
    size = min(chunks.items, entries)
    most = entries - 1 if rest.num_items is None else rest.num_items

    def scores(
        items_K: ItemPart, rows_C: UserPart, cross: Net, number_K: Array, allowed_CK: Array
    ) -> Float[Array, "C K"]:
        logit = products("cpw,kqw->ckpq", rows_C.component_UPW, items_K.component_IQW, chunks.dtype)
        dropped = Dropped(rest.word_T[:, None], number_K[None], chunks.rate)
        score_CK, _ = mixed(
            logit,
            rows_C.gate_UL[:, None],
            items_K.gate_IL[None],
            cross,
            fast(chunks.dtype),
            dropped,
        )
        return jnp.where(allowed_CK, score_CK, -jnp.inf)

    def piece(i: Int[Array, ""]) -> tuple[Int[Array, ""], ItemPart, Array, Bool[Array, "C K"]]:
        first = jnp.minimum(i * size, entries - size)  # the last one may overlap the one before
        take = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=size)
        id_K = first + jnp.arange(size, dtype=jnp.int32)
        item_K = (id_K >= jnp.maximum(i * size, 1)) & (id_K <= most)
        allowed_CK = item_K[None] & (id_K[None] != rest.id_T[:, None])
        return first, jax.tree.map(take, given.items), take(rest.number_I), allowed_CK

    def add(i: Int[Array, ""], carry: tuple[PerRow, PerRow]) -> tuple[PerRow, PerRow]:
        top_C, sum_C = carry
        _, items_K, number_K, allowed_CK = piece(i)
        score_CK = scores(items_K, given.rows, given.cross, number_K, allowed_CK)
        new_C = jnp.maximum(top_C, jnp.max(score_CK, axis=1))
        sum_C = sum_C * jnp.exp(top_C - new_C) + jnp.sum(jnp.exp(score_CK - new_C[:, None]), axis=1)
        return new_C, sum_C

    pieces = -(-entries // size)
    start = (given.positive_T, jnp.ones_like(given.positive_T))
    top_C, sum_C = jax.lax.fori_loop(0, pieces, add, start)
    all_C = top_C + jnp.log(sum_C)
    loss = jnp.sum(rest.share_T * (all_C - given.positive_T))
    d_positive = rest.share_T * (jnp.exp(given.positive_T - all_C) - 1)

    def differentiate(i: Int[Array, ""], carry: PyTree) -> PyTree:
        d_rows, d_items, d_cross = carry
        first, items_K, number_K, allowed_CK = piece(i)
        score_CK, pull = jax.vjp(
            lambda items_K, rows_C, cross: scores(items_K, rows_C, cross, number_K, allowed_CK),
            items_K,
            given.rows,
            given.cross,
        )
        new_items, new_rows, new_cross = pull(
            rest.share_T[:, None] * jnp.exp(score_CK - all_C[:, None])
        )

        def put(sum_: Array, d: Array) -> Array:
            before = jax.lax.dynamic_slice_in_dim(sum_, first, size)
            return jax.lax.dynamic_update_slice_in_dim(sum_, before + d, first, axis=0)

        return (
            _sum(d_rows, new_rows),
            jax.tree.map(put, d_items, new_items),
            _sum(d_cross, new_cross),
        )

    zeros = jax.tree.map(jnp.zeros_like, given.rows)
    d_rows, d_items, d_cross = jax.lax.fori_loop(
        0, pieces, differentiate, (zeros, grads.items, grads.cross)
    )
    return loss, Given(d_rows, d_items, d_cross, d_positive)


def products(form: str, x: Array, y: Array, dtype: DTypeLike) -> Array:
    """Products of components by an einsum whose last two axes count them, as one axis."""
    logit = jnp.einsum(
        form,
        x.astype(dtype),
        y.astype(dtype),
        preferred_element_type=jnp.float32,
    )
    return logit.reshape(*logit.shape[:-2], -1)


def _sum(x: PyTree, y: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, x, y)
