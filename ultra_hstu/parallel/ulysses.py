"""Strategy `ulysses` (DeepSpeed-Ulysses): all rows of some heads in place of some rows of all heads."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.hstu_attention.api import RelativeBias
from ultra_hstu.parallel.frame import Frame


def ulysses(q: Array, k: Array, v: Array, scale: Array, bias: RelativeBias | None, frame: Frame, attend: Callable[..., Array]) -> Array:
    """Four all-to-alls of O(T / C) bytes a shard; attention itself is that of one device, over whole sequences."""
    natural = frame.layout.is_contiguous
    order = frame.layout.permutation()
    back = jnp.argsort(order)

    def whole(x: Array) -> Array:
        """[T / C, H, *] to [T, H / C, *], rows in the order of the buffer."""
        x = jax.lax.all_to_all(x, frame.axis, split_axis=1, concat_axis=0, tiled=True)
        return x if natural else x[back]

    def rows(x: Array) -> Array:
        x = jax.lax.all_gather(x, frame.axis, tiled=True)
        return x if natural else x[back]

    if bias is not None and bias.time_table is not None:
        bias = dataclasses.replace(bias, timestamps=rows(bias.timestamps), query_timestamps=rows(bias.query_timestamps))
    sequences = frame.sequences
    out = attend(
        whole(q), whole(k), whole(v), sequences.offsets, num_targets=sequences.num_targets, num_contextual=sequences.num_contextual,
        scale=rows(scale) if jnp.ndim(scale) else scale, bias=bias,
    )  # fmt: skip
    return jax.lax.all_to_all(out if natural else out[order], frame.axis, split_axis=0, concat_axis=1, tiled=True)
