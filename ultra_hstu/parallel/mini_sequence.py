"""Mini-sequences (arXiv 2407.15892): a token-wise function over chunks of rows, so that its intermediate values exist for one chunk at a time.

Attention mixes rows and stays whole; projections, heads and gates do not. The losses in `ultra_hstu.losses` have chunks of their own.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

LOW_PRECISION = (jnp.bfloat16, jnp.float16)


def chunked(fn: Callable[..., Any], x_TD: Shaped[Array, "T ..."], *more_T: Any, chunk_rows: int | None) -> Any:
    """`fn(x_TD, *more_T)`, worked off `chunk_rows` rows at a time; the backward pass recomputes a chunk from its input rows.

    Values and gradients are those of the plain call up to the order of sums. Rows behind the last whole chunk are one shorter chunk of their own:
    none is padded, dropped or counted twice. Weights that `fn` closes over get the sum of their chunks' gradients, added up in float32 even where the
    weights are bfloat16 or float16. A T that is a multiple of `chunk_rows` saves a copy of the result.

    Args:
      fn: (rows of x, rows of more...) -> a pytree of arrays, each with one row a row of x. Every row must depend on its own inputs alone: random bits
        drawn inside would be the same in every chunk, so pass them in (`more_T`) or draw them outside.
      x_TD, more_T: arrays (or pytrees of them) of T rows.
      chunk_rows: rows of a chunk; None, or at least T, calls `fn` as it is.

    Raises:
      ValueError: if `chunk_rows` is below 1 or no integer, arguments differ in their number of rows, or `fn` does not keep that number.
    """
    if chunk_rows is not None and (isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int) or chunk_rows < 1):
        raise ValueError(f"{chunk_rows=} must be an integer of at least 1, or None for all rows at once")
    rows = x_TD.shape[0]
    inputs = (x_TD, *more_T)
    if any(leaf.shape[:1] != (rows,) for leaf in jax.tree.leaves(inputs)):
        raise ValueError(
            f"arguments of a chunked function need the same number of rows, got {[leaf.shape for leaf in jax.tree.leaves(inputs)]}"
        )
    if chunk_rows is None or chunk_rows >= rows:
        return fn(*inputs)

    whole, tail = divmod(rows, chunk_rows)
    run = _with_weights_in_float32(fn, jax.tree.map(lambda leaf: leaf[:chunk_rows], inputs))
    chunks = jax.tree.map(lambda leaf: leaf[: whole * chunk_rows].reshape(whole, chunk_rows, *leaf.shape[1:]), inputs)
    y = jax.lax.map(jax.checkpoint(lambda chunk: run(*chunk), prevent_cse=False), chunks)
    if any(leaf.shape[:2] != (whole, chunk_rows) for leaf in jax.tree.leaves(y)):
        shapes = [leaf.shape[1:] for leaf in jax.tree.leaves(y)]
        raise ValueError(f"a chunked function must return a row for each of its {chunk_rows} rows, got shapes {shapes}")
    y = jax.tree.map(lambda leaf: leaf.reshape(whole * chunk_rows, *leaf.shape[2:]), y)
    if not tail:
        return y
    last = jax.checkpoint(fn)(*jax.tree.map(lambda leaf: leaf[whole * chunk_rows :], inputs))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), y, last)


def _with_weights_in_float32(fn: Callable[..., Any], example: tuple[Any, ...]) -> Callable[..., Any]:
    """`fn` with the low-precision arrays that it closes over taken from float32 copies: a loop adds up gradients in the dtype of what it closes over."""
    pure, weights = jax.closure_convert(fn, *example)
    copies = [weight.astype(jnp.float32) if weight.dtype in LOW_PRECISION else weight for weight in weights]
    return lambda *inputs: pure(*inputs, *(copy.astype(weight.dtype) for copy, weight in zip(copies, weights, strict=True)))
