"""The sampled softmax: the public function and its checks."""

from collections.abc import Sequence
from types import ModuleType

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from kernels import dispatch, softmax_rows
from kernels.sampled_softmax.spec import Negatives, SampledSpec
from kernels.softmax_rows import Gradients, Loss, PerItem, PerRow, Rows, Table, Unshaped

_OP = dispatch.Op[SampledSpec](
    "sampled_softmax",
    modules={
        "triton": "kernels.sampled_softmax.triton.chunks",
        "xla": "kernels.sampled_softmax.xla",
        "reference": "kernels.sampled_softmax.reference",
    },
    order={"gpu": ("triton", "xla")},
)


def implementations() -> dict[str, str]:
    """Names of the implementations, with their modules."""
    return dict(_OP.modules)


def sampled_softmax(
    q_TD: Unshaped,
    e_ID: Unshaped,
    positive_T: Int[Array, " T"],
    weight_T: Unshaped,
    negatives: Negatives | Int[Array, "T R"],
    *,
    shift_I: PerItem | None = None,
    chunk_rows: int | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Loss:
    """`sum_t w_t * -log softmax([q_t . e_positive, q_t . e_negatives - shift_negatives])_0`.

    A negative that is the positive has the constant logit -5e4. Differentiable in q, e and the
    weights, once. Scores are products of q and of e in the dtype of q; sums, losses and the
    gradient of e are float32, the gradient of q has its dtype. Memory does not grow with T x R.

    Args:
      q_TD: float32 or bfloat16; rows of weight 0 may hold anything, NaN included.
      e_ID: float32 [I + 1, D]; entry 0 is padding.
      positive_T: ids 1..I; anything where the weight is 0.
      weight_T: float32, not negative.
      negatives: ids 1..I, an array or drawn for each chunk; anything where the weight is 0.
      shift_I: float32 [I + 1], not differentiated: what a negative's logit is lowered by.
      chunk_rows: rows whose negatives and logits exist at one time; None: what suits the device.
      implementation: a name, which never falls back; a sequence, tried in order; None, the order of
        the platform.

    Returns:
      The sum, and float32[T], the loss of each row, 0 where its weight is 0; no gradient flows
      through the latter.

    Raises:
      ValueError: inputs that no implementation could take.
      NotImplementedError: the named implementation cannot take these inputs, or none can; with the
        reasons.
    """
    softmax_rows.check(q_TD, e_ID, weight_T, chunk_rows)
    if not isinstance(negatives, Negatives):
        negatives = Negatives.of(negatives)
    count, together, draw = negatives.count, negatives.rows_per_draw, negatives.draw
    if min(count, together) < 1:
        raise ValueError(f"negatives have {count=} a row and rows_per_draw={together}: at least 1")
    of_rows, missing = (positive_T, negatives.rows), -q_TD.shape[0] % together
    if missing:
        q_TD, weight_T = jnp.pad(q_TD, ((0, missing), (0, 0))), jnp.pad(weight_T, (0, missing))
        row_T = jnp.minimum(jnp.arange(len(q_TD), dtype=jnp.int32), len(positive_T) - 1)
        of_rows = jax.tree.map(lambda leaf: leaf[row_T], of_rows)

    def call(module: ModuleType) -> Loss:
        def run(q_TD: Rows, e_ID: Table, weight_T: PerRow, rest: PyTree) -> Gradients:
            of_rows, shared, shift_I = rest

            def ids_of(of_rows: PyTree) -> tuple[Int[Array, " C"], Int[Array, "G R"]]:
                positive_C, rows = of_rows
                ids = positive_C, draw(jax.tree.map(lambda leaf: leaf[::together], rows), shared)
                # Where the weight is 0, ids may be anything.
                return jax.tree.map(
                    lambda id: jnp.clip(id, 0, len(e_ID) - 1).astype(jnp.int32), ids
                )

            return module.gradients(
                q_TD, e_ID, weight_T, of_rows, ids_of, shift_I, spec=spec, chunk_rows=chunk_rows
            )

        rest = of_rows, negatives.shared, shift_I
        return softmax_rows.weighted_loss(run, q_TD, e_ID, weight_T, rest)

    spec = SampledSpec(q_TD.dtype, q_TD.shape[1], count, together)
    loss, loss_T = _OP.call(implementation, spec, call)
    return loss, loss_T[: len(positive_T)]
