"""Selective rematerialisation (ULTRA-HSTU, arXiv 2602.16986): what a layer keeps for its backward pass, and what is computed again.

Kept are the layer's input, the statistics of its two norms and the attention output: 2 D + 2 H V bytes a row in bfloat16. Computed again are the normed
input, u, v, q, k and the gated output: two norms, one projection and elementwise work, but no attention.
"""

from collections.abc import Callable
from typing import Literal

import jax

from ultra_hstu.parallel.parameters import keep_no_matrix

# Names of values, given with jax.ad_checkpoint.checkpoint_name.
LAYER_INPUT, NORM_STATS, ATTENTION_OUTPUT = "layer_input", "norm_stats", "attention_output"

Remat = Literal["none", "selective", "full"]


def checkpointed(
    run: Callable[..., jax.Array], mode: Remat, *, forget_weights: bool = False
) -> Callable[..., jax.Array]:
    """`run` with another trade of memory against time in its backward pass; values and gradients are the same.

    "none" keeps what differentiation asks for. "selective" keeps the named values alone. "full" keeps the arguments alone and runs attention a second time,
    unless its kernel has side effects, which JAX never runs twice: the output of `mosaic` is kept.

    Args:
      forget_weights: under "none" too, matrices that were put together from shards are put together again.
    """
    if mode == "none" and forget_weights:
        return jax.checkpoint(run, policy=keep_no_matrix)
    if mode == "none":
        return run
    names = (LAYER_INPUT, NORM_STATS, ATTENTION_OUTPUT) if mode == "selective" else ()
    return jax.checkpoint(run, policy=jax.checkpoint_policies.save_only_these_names(*names))
