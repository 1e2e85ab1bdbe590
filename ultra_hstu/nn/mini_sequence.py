"""Mini-sequences (arXiv 2407.15892): a token-wise function over chunks of rows.

Its intermediate values then exist for one chunk at a time. Attention mixes rows and stays whole;
projections, heads and gates do not. The losses of retrieval have chunks of their own.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Shaped

from kernels.typing import Scalar
from kernels.zeros import zeros_after

TokenWise = Callable[..., PyTree]  # (rows of x, rows of more...) -> arrays of as many rows
Number = int | Scalar


def chunked(
    fn: TokenWise, x_TD: Shaped[Array, "T ..."], *more_T: PyTree, chunk_rows: int | None
) -> PyTree:
    """`fn(x_TD, *more_T)`, computed for `chunk_rows` rows at a time.

    The backward pass recomputes a chunk from its input rows. Values and gradients are those of the
    plain call up to the order of sums. Rows behind the last whole chunk are one shorter chunk of
    their own: none is padded, dropped or counted twice. Weights that `fn` closes over get the sum
    of their chunks' gradients, added up in float32 even where the weights are bfloat16 or float16.
    A T that is a multiple of `chunk_rows` saves a copy of the result.

    Args:
      fn: every row must depend on its own inputs alone. Random bits drawn inside would be the same
        in every chunk, so pass them in (`more_T`) or draw them outside.
      x_TD, more_T: arrays (or pytrees of them) of T rows.
      chunk_rows: rows of a chunk; None, or at least T, calls `fn` as it is.

    Raises:
      ValueError: if `chunk_rows` is below 1 or no integer, arguments differ in their number of
        rows, or `fn` does not keep that number.
    """
    if chunk_rows is not None and (
        isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int) or chunk_rows < 1
    ):
        raise ValueError(
            f"{chunk_rows=} must be an integer of at least 1, or None for all rows at once"
        )
    rows = x_TD.shape[0]
    inputs = (x_TD, *more_T)
    shapes = [leaf.shape for leaf in jax.tree.leaves(inputs)]
    if any(shape[:1] != (rows,) for shape in shapes):
        raise ValueError(
            f"arguments of a chunked function need the same number of rows, got {shapes}"
        )
    if chunk_rows is None or chunk_rows >= rows:
        return fn(*inputs)

    whole, tail = divmod(rows, chunk_rows)
    pure, weights = jax.closure_convert(fn, *_chunk(inputs, 0, chunk_rows))
    y = _loop(pure, chunk_rows, whole, *_parted(inputs), weights)
    if not tail:
        return y
    last = jax.checkpoint(fn)(*jax.tree.map(lambda leaf: leaf[whole * chunk_rows :], inputs))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), y, last)


def _parted(inputs: PyTree) -> tuple[PyTree, PyTree]:
    """The leaves that have gradients, and the others; None in place of what is in the other."""

    def those(smooth: bool) -> PyTree:
        return jax.tree.map(
            lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.inexact) == smooth else None, inputs
        )

    return those(True), those(False)


def _joined(smooth: PyTree, others: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x, y: y if x is None else x, smooth, others, is_leaf=lambda leaf: leaf is None
    )


def _chunk(values: PyTree, number: Number, chunk_rows: int) -> PyTree:
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, number * chunk_rows, chunk_rows), values
    )


def _write(buffers: PyTree, values: PyTree, number: Number) -> PyTree:
    """Chunk `number` of the buffers; not in place in Python, but in the compiled loop."""
    return jax.tree.map(
        lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, number * y.shape[0], 0),
        buffers,
        values,
    )


# A loop of our own instead of jax.lax.map: XLA would set up the result buffers of all loops of a
# model at the start of the program, see zeros_after.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _loop(
    pure: TokenWise,
    chunk_rows: int,
    whole: int,
    smooth: PyTree,
    others: PyTree,
    weights: list[Array],
) -> PyTree:
    """The whole chunks of all rows."""
    inputs = _joined(smooth, others)

    def of_chunk(number: Number) -> PyTree:
        return pure(*_chunk(inputs, number, chunk_rows), *weights)

    shapes = jax.eval_shape(lambda: of_chunk(0))
    if any(leaf.shape[:1] != (chunk_rows,) for leaf in jax.tree.leaves(shapes)):
        shapes = [leaf.shape for leaf in jax.tree.leaves(shapes)]
        raise ValueError(
            f"a chunked function must return a row for each of its {chunk_rows} rows, "
            f"got shapes {shapes}"
        )
    buffers = jax.tree.map(
        lambda leaf: zeros_after(inputs[0], (whole * chunk_rows, *leaf.shape[1:]), leaf.dtype),
        shapes,
    )
    return jax.lax.fori_loop(0, whole, lambda i, y: _write(y, of_chunk(i), i), buffers)


def _loop_fwd(
    pure: TokenWise, chunk_rows: int, whole: int, *saved: PyTree
) -> tuple[PyTree, tuple[PyTree, ...]]:
    return _loop(pure, chunk_rows, whole, *saved), saved


def _loop_bwd(
    pure: TokenWise, chunk_rows: int, whole: int, saved: tuple[PyTree, ...], g: PyTree
) -> tuple[PyTree, None, list[Array]]:
    smooth, others, weights = saved
    after = jax.tree.leaves(g)[0]

    def step(i: Array, sums: PyTree) -> PyTree:
        d_x, d_w = sums
        part, rest = _chunk((smooth, others), i, chunk_rows)
        _, pull = jax.vjp(lambda x, weights: pure(*_joined(x, rest), *weights), part, weights)
        part_x, part_w = pull(_chunk(g, i, chunk_rows))
        d_w = [a + b.astype(jnp.float32) for a, b in zip(d_w, part_w, strict=True)]
        return _write(d_x, part_x, i), d_w

    zeros = jax.tree.map(lambda leaf: zeros_after(after, leaf.shape, leaf.dtype), smooth)
    zero_sums = [zeros_after(after, weight.shape) for weight in weights]
    d_x, d_w = jax.lax.fori_loop(0, whole, step, (zeros, zero_sums))
    return d_x, None, [x.astype(weight.dtype) for x, weight in zip(d_w, weights, strict=True)]


_loop.defvjp(_loop_fwd, _loop_bwd)
