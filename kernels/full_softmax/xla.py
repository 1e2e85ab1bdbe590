"""The softmax over all items in plain JAX, chunk by chunk: on any device."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from kernels import softmax_rows
from kernels.full_softmax.spec import FullSpec
from kernels.sampled_softmax.xla import product, product_backward
from kernels.softmax_rows import ChunkGradients, Gradients, PerRow, Rows, Table


def unsupported(spec: FullSpec) -> None:
    """Nothing: any call is taken."""


def gradients(
    q_TD: Rows,
    e_ID: Table,
    weight_T: PerRow,
    positive_T: Int[Array, " T"],
    num_items: Int[Array, ""] | None = None,
    *,
    chunk_rows: int | None,
) -> Gradients:
    """See `full_softmax`."""
    table_ID = e_ID[1:].astype(q_TD.dtype)  # padding is no item
    item_1I = jnp.arange(len(table_ID), dtype=jnp.int32)[None, :]

    def chunk(
        q_CD: Rows, weight_C: PerRow, positive_C: Int[Array, " C"], de_ID: Table
    ) -> ChunkGradients:
        number_C = jnp.where(weight_C > 0, positive_C.astype(jnp.int32) - 1, 0)
        logit_CI = product(q_CD, table_ID.T)
        if num_items is not None:
            logit_CI = jnp.where(item_1I < num_items, logit_CI, -jnp.inf)
        top_C = jnp.max(logit_CI, axis=1)
        share_CI = jnp.exp(logit_CI - top_C[:, None])
        sum_C = jnp.sum(share_CI, axis=1)
        row_C = jnp.arange(len(number_C), dtype=jnp.int32)
        score_C = logit_CI.at[row_C, number_C].get(mode="promise_in_bounds")
        own_CI = item_1I == number_C[:, None]
        slope_CI = share_CI * (weight_C / sum_C)[:, None] - jnp.where(
            own_CI, weight_C[:, None], 0.0
        )
        dq_CD, de_ID = product_backward(q_CD, table_ID, slope_CI, de_ID)
        return top_C + jnp.log(sum_C) - score_C, dq_CD, de_ID

    chunk_rows = chunk_rows or softmax_rows.default_chunk_rows(len(e_ID))
    found = softmax_rows.by_chunks(chunk, q_TD, weight_T, positive_T, table_ID, chunk_rows)
    return found._replace(de_ID=jnp.pad(found.de_ID, ((1, 0), (0, 0))))
