"""The softmax over all items: the public function and its checks."""

from collections.abc import Sequence
from types import ModuleType

from jaxtyping import Array, Int, PyTree

from kernels import dispatch, softmax_rows
from kernels.full_softmax.spec import FullSpec
from kernels.softmax_rows import Gradients, Loss, PerRow, Rows, Table, Unshaped

_OP = dispatch.Op[FullSpec](
    "full_softmax",
    modules={
        "triton": "kernels.full_softmax.triton.tiles",
        "xla": "kernels.full_softmax.xla",
        "reference": "kernels.full_softmax.reference",
    },
    order={"gpu": ("triton", "xla")},
)


def implementations() -> dict[str, str]:
    """Names of the implementations, with their modules."""
    return dict(_OP.modules)


def full_softmax(
    q_TD: Unshaped,
    e_ID: Unshaped,
    positive_T: Int[Array, " T"],
    weight_T: Unshaped,
    *,
    num_items: Int[Array, ""] | None = None,
    chunk_rows: int | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Loss:
    """`sum_t w_t * -log softmax(q_t . e_1..I)_positive`.

    Differentiable in q, e and the weights, once. Scores are products of q and of e in the dtype of
    q; sums, losses and the gradient of e are float32, the gradient of q has its dtype. Memory does
    not grow with T x I.

    Args:
      q_TD: float32 or bfloat16; rows of weight 0 may hold anything, NaN included.
      e_ID: float32 [I + 1, D]; entry 0 is padding.
      positive_T: ids 1..I; anything where the weight is 0.
      weight_T: float32, not negative.
      num_items: I, where e has room for more items behind them; None: all of e.
      chunk_rows: of `xla`, rows whose logits exist at one time; None: what suits the device.
        `triton` keeps no logits.
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

    def call(module: ModuleType) -> Loss:
        def run(q_TD: Rows, e_ID: Table, weight_T: PerRow, rest: PyTree) -> Gradients:
            positive_T, num_items = rest
            return module.gradients(
                q_TD, e_ID, weight_T, positive_T, num_items, chunk_rows=chunk_rows
            )

        return softmax_rows.weighted_loss(run, q_TD, e_ID, weight_T, (positive_T, num_items))

    return _OP.call(implementation, FullSpec(q_TD.dtype, q_TD.shape[1]), call)
