"""A small HSTU stack and a batch of sequences for it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ultra_hstu.config import ModelConfig
from ultra_hstu.nn.hstu import HSTU
from ultra_hstu.sequences import Sequences

WIDTH, LENGTH, ROWS = 8, 20, 64
# (contextual, history, targets)
SEQUENCES = [(2, 13, 3), (0, 0, 0), (1, 5, 2), (0, 3, 0), (2, 0, 2)]
CONFIG = ModelConfig(
    width=WIDTH,
    layers=2,
    heads=2,
    qk_width=4,
    v_width=6,
    preset="production",
    relative_bias=False,
    linear_dropout=0.0,
    implementation="reference",
)


def batch(parts=SEQUENCES, rows=ROWS, extra_rows=5) -> Sequences:
    """Sequences with room for `extra_rows` targets and contextual tokens, together."""
    contextual, history, targets = (np.array(x, np.int32) for x in zip(*parts, strict=True))
    offsets = np.concatenate([[0], np.cumsum(contextual + history + targets)]).astype(np.int32)
    time_T = np.arange(rows, dtype=np.int32) * 50
    fields = (offsets, np.arange(rows) < offsets[-1], time_T, time_T + 50, targets, contextual)
    return Sequences(*(jnp.asarray(x) for x in fields), max_targets=extra_rows)


def inputs(seed=0, rows=ROWS):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, WIDTH)), jnp.float32)


def encoder(**options) -> HSTU:
    """The stack of CONFIG with other options, and parameters large enough to matter."""
    built = HSTU.from_config(dataclasses.replace(CONFIG, **options), LENGTH, rngs=nnx.Rngs(0))
    for number, layer in enumerate(built.layers):
        layer.uvqk[...] *= 3
        if hasattr(layer, "output_norm_weight"):
            layer.output_norm_weight[...] += 0.1 * (number + 1)
            layer.uvqk_bias[...] += 0.3
    return built
