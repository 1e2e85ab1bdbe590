"""The softmax over all items in plain JAX, chunk by chunk: on any device."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from kernels import softmax_rows
from kernels.full_softmax.spec import FullSpec
from kernels.sampled_softmax.xla import product, product_backward
from kernels.softmax_rows import Gradients, PerRow, Rows, Table


def unsupported(spec: FullSpec) -> None:
    """Nothing: any call is taken."""


def gradients(
    q_TD: Rows,
    e_ID: Table,
    weight_T: PerRow,
    positive_T: Int[Array, " T"],
    *,
    chunk_rows: int | None,
) -> Gradients:
    """See `full_softmax`."""
    table_ID = e_ID.astype(q_TD.dtype)

    def chunk(
        q_CD: Rows, weight_C: PerRow, positive_C: Int[Array, " C"], de_ID: Table
    ) -> tuple[PerRow, Rows, Table]:
        positive_C = jnp.where(weight_C > 0, positive_C, 1)
        logit_CI = product(q_CD, table_ID.T).at[:, 0].set(-jnp.inf)  # padding is no item
        # Each exponential once: the loss and the gradient come from the same.
        top_C = jnp.max(logit_CI, axis=1)
        share_CI = jnp.exp(logit_CI - top_C[:, None])
        sum_C = jnp.sum(share_CI, axis=1)
        row_C = jnp.arange(len(positive_C), dtype=jnp.int32)
        loss_C = (
            top_C + jnp.log(sum_C) - logit_CI.at[row_C, positive_C].get(mode="promise_in_bounds")
        )
        slope_CI = (
            (share_CI * (weight_C / sum_C)[:, None])
            .at[row_C, positive_C]
            .add(-weight_C, mode="promise_in_bounds")
        )
        return loss_C, *product_backward(q_CD, table_ID, slope_CI, de_ID)

    chunk_rows = chunk_rows or softmax_rows.default_chunk_rows(len(e_ID))
    return softmax_rows.by_chunks(chunk, q_TD, weight_T, positive_T, e_ID, chunk_rows)
