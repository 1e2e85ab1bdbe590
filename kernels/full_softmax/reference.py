"""The softmax over all items as one dense computation in float32: the definition of correct.

Memory is O(T I): for small inputs only.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.full_softmax.spec import FullSpec
from kernels.softmax_rows import Gradients, PerRow, Rows, Table


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
    """See `full_softmax`; all rows are one chunk, whatever `chunk_rows` says."""
    counts_T = weight_T > 0
    number_T1 = jnp.where(counts_T, positive_T - 1, 0)[:, None]

    def total(q_TD: Rows, e_ID: Table) -> tuple[Float[Array, ""], PerRow]:
        score_TI = jnp.matmul(q_TD, e_ID[1:].T, precision="highest")
        if num_items is not None:
            item_1I = jnp.arange(score_TI.shape[1], dtype=jnp.int32)[None, :]
            score_TI = jnp.where(item_1I < num_items, score_TI, -jnp.inf)
        share_TI = jax.nn.log_softmax(score_TI)
        loss_T = jnp.where(counts_T, -jnp.take_along_axis(share_TI, number_T1, 1)[:, 0], 0.0)
        return jnp.sum(jnp.where(counts_T, weight_T, 0.0) * loss_T), loss_T

    q32_TD = jnp.where(counts_T[:, None], q_TD.astype(jnp.float32), 0.0)
    slopes, loss_T = jax.grad(total, argnums=(0, 1), has_aux=True)(q32_TD, e_ID)
    return Gradients(loss_T, slopes[0].astype(q_TD.dtype), slopes[1])
