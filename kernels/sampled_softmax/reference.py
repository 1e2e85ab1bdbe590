"""The sampled softmax as one dense computation in float32: the definition of correct.

Memory is O(T R D): for small inputs only.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from kernels.sampled_softmax.spec import COLLISION_LOGIT, IdsOf, SampledSpec
from kernels.softmax_rows import Gradients, PerItem, PerRow, Rows, Table


def unsupported(spec: SampledSpec) -> None:
    """Nothing: any call is taken."""


def gradients(
    q_TD: Rows,
    e_ID: Table,
    weight_T: PerRow,
    rest: PyTree,
    ids_of: IdsOf,
    shift_I: PerItem | None,
    *,
    spec: SampledSpec,
    chunk_rows: int | None,
) -> Gradients:
    """See `sampled_softmax`; all rows are one chunk, whatever `chunk_rows` says."""
    counts_T = weight_T > 0
    positive_T, negative_GR = ids_of(rest)
    negative_TR = jnp.repeat(negative_GR, spec.rows_per_draw, axis=0)
    id_TX = jnp.concatenate([positive_T[:, None], negative_TR], axis=1)
    negative_TX = jnp.arange(id_TX.shape[1])[None, :] > 0

    def total(q_TD: Rows, e_ID: Table) -> tuple[Float[Array, ""], PerRow]:
        score_TX = jnp.einsum("td,txd->tx", q_TD, e_ID[id_TX], precision="highest")
        if shift_I is not None:
            score_TX -= jnp.where(negative_TX, shift_I[id_TX], 0.0)
        score_TX = jnp.where(
            negative_TX & (id_TX == id_TX[:, :1]), jnp.float32(COLLISION_LOGIT), score_TX
        )
        loss_T = jnp.where(counts_T, -jax.nn.log_softmax(score_TX)[:, 0], 0.0)
        return jnp.sum(jnp.where(counts_T, weight_T, 0.0) * loss_T), loss_T

    q32_TD = jnp.where(counts_T[:, None], q_TD.astype(jnp.float32), 0.0)
    slopes, loss_T = jax.grad(total, argnums=(0, 1), has_aux=True)(q32_TD, e_ID)
    return Gradients(loss_T, slopes[0].astype(q_TD.dtype), slopes[1])
