"""The loss of ranking: binary cross entropy or squared error of one logit a task."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

PerTask = Float[Array, "P K"]  # one value a prediction and task
KINDS = ("binary", "regression")


def multitask_loss(
    logit_PK: PerTask,
    label_PK: PerTask,
    weight_PK: PerTask,
    kinds: Sequence[str],
    total_K: Float[Array, " K"] | None = None,
) -> Float[Array, ""]:
    """The mean over tasks of each task's weighted mean loss, in float32 whatever the inputs.

    `loss_k = sum_p w l / sum_p w`, where l is `-log sigmoid(x)` for label 1 and `-log sigmoid(-x)`
    for label 0 in a binary task (x is the logit, a label between them is a mixture of both), `(x -
    y)^2` in a regression. The loss is `sum_k loss_k / K`; a task without a label in the
    batch adds 0.

    Args:
      logit_PK: the head's output for each predicted row and task; entries of weight 0 may hold
        anything, NaN included.
      label_PK: labels 0 or 1 in binary tasks (the data is checked where it is read; a traced array
        cannot be), any number in regressions.
      weight_PK: not negative; 0 leaves an entry out.
      kinds: "binary" or "regression" for each of the K columns.
      total_K: the sums of the weights, where more rows than these have a part in them; then the
        losses of all parts add up to the loss.

    Raises:
      ValueError: an unknown kind, or not one for each column.
    """
    if len(kinds) != logit_PK.shape[1] or not set(kinds) <= set(KINDS):
        raise ValueError(
            f"kinds={tuple(kinds)} must hold one of {KINDS} for each of the {logit_PK.shape[1]} "
            "columns"
        )
    weight_PK = weight_PK.astype(jnp.float32)
    used_PK = weight_PK > 0
    # Replaced on the way in: a NaN behind a weight of 0 would come back through the gradient of the
    # product.
    logit_PK = jnp.where(used_PK, logit_PK.astype(jnp.float32), 0.0)
    label_PK = jnp.where(used_PK, label_PK.astype(jnp.float32), 0.0)
    cross_entropy_PK = label_PK * jax.nn.softplus(-logit_PK) + (1.0 - label_PK) * jax.nn.softplus(
        logit_PK
    )
    binary_1K = jnp.array([[kind == "binary" for kind in kinds]])
    loss_PK = jnp.where(binary_1K, cross_entropy_PK, jnp.square(logit_PK - label_PK))
    total_K = jnp.sum(weight_PK, axis=0) if total_K is None else total_K
    return jnp.mean(jnp.sum(weight_PK * loss_PK, axis=0) / jnp.where(total_K > 0, total_K, 1.0))
