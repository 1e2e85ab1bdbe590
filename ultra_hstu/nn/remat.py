"""Selective rematerialisation (ULTRA-HSTU, arXiv 2602.16986): what a layer keeps for its backward.

Kept are the layer's input, the statistics of its two norms and the attention output: 2 D + 2 H V
bytes a row in bfloat16. Computed again are the normed input, u, v, q, k and the gated output: two
norms, one projection and elementwise work, but no attention. A feed-forward block keeps its input
and the statistics of its norm, and computes its hidden layer again. SASRec keeps the same values;
its attention has no kernel, so that its scores are computed again.
"""

import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
from flax import nnx
from jaxtyping import Array, Float

from kernels.rowwise import NORM_STATS
from ultra_hstu.parallel.parameters import CallLayer, Policy
from ultra_hstu.sequences import Activations

# Names of values, given with jax.ad_checkpoint.checkpoint_name, as NORM_STATS.
LAYER_INPUT, ATTENTION_OUTPUT = "layer_input", "attention_output"
FEED_FORWARD_INPUT = "feed_forward_input"

Remat = Literal["none", "selective"]

# How a stack runs a layer: `call(layer, x_TD)`, whose backward keeps what the policy says, or
# whatever it needs. `parallel.parameters.ShardedLayers` is one for a mesh.
RunLayer = Callable[[CallLayer, nnx.Module, Array, Policy | None], Array]


def run_layer(
    call: CallLayer, layer: nnx.Module, x_TD: Activations, policy: Policy | None
) -> Float[Array, "P D"]:
    """A `RunLayer` for one device."""
    run = functools.partial(call, layer)
    return run(x_TD) if policy is None else jax.checkpoint(run, policy=policy)(x_TD)


def policy_of(mode: Remat) -> Policy | None:
    """What the backward of a layer keeps; values and gradients are the same.

    "none" keeps what differentiation asks for. "selective" keeps the named values alone. Raises
    ValueError for another mode.
    """
    if mode not in (modes := get_args(Remat)):
        raise ValueError(f"remat={mode!r} must be one of {', '.join(modes)}")
    if mode == "none":
        return None
    names = (LAYER_INPUT, NORM_STATS, ATTENTION_OUTPUT, FEED_FORWARD_INPUT)
    return jax.checkpoint_policies.save_only_these_names(*names)
