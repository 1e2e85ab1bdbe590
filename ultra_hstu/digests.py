"""A hash of every array of a pytree: the same on every mesh, for one process as for many.

It sums, modulo 2^64, the bits of each element times 2 i + 1, where i is the element's index in the
whole array. So shards add up, whoever holds them, and the zeros that fill a table up on some mesh
add nothing. A change of one element always shows, because an odd factor has an inverse; so does a
swap of two different elements. Random damage stays unnoticed once in 2^64.
"""

import jax
import numpy as np
from jaxtyping import PyTree, Shaped

from ultra_hstu.parallel import processes


def digests(tree: PyTree) -> dict[str, str]:
    """The hash of every array, by its name: 16 hexadecimal digits.

    All processes must call it. Each reads the shards that it holds, on the host, and tells the
    others its sums.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    sums = {
        jax.tree_util.keystr(path, simple=True, separator="."): sum(
            _sum(np.asarray(shard.data), shard.index, leaf.shape)
            for shard in leaf.addressable_shards
            if shard.replica_id == 0  # each element once over all devices
        )
        for path, leaf in leaves
    }
    all_sums = processes.all_gather(sums)
    return {name: f"{sum(one[name] for one in all_sums) % 2**64:016x}" for name in sums}


def _sum(part: Shaped[np.ndarray, "..."], index: tuple[slice, ...], shape: tuple[int, ...]) -> int:
    """The sum over a part of an array of this shape, which begins where the slices do.

    An index is a sum over axes, so each axis is weighted by itself, after the sum over the others.
    """
    bits = part.view(f"u{part.itemsize}")
    weighted, stride = 0, 1
    for axis in reversed(range(part.ndim)):
        others = tuple(other for other in range(part.ndim) if other != axis)
        marginal = bits.sum(axis=others, dtype=np.uint64)
        along = np.arange(part.shape[axis], dtype=np.uint64) + np.uint64(index[axis].start or 0)
        weighted += stride * int(marginal @ along)
        stride *= shape[axis]
    return 2 * weighted + int(bits.sum(dtype=np.uint64))
