"""Sizes of the Triton kernels, by kind of GPU, dtype and head width; and what they cannot take."""

from typing import NamedTuple

import jax.numpy as jnp

from kernels import device, triton_call
from kernels.hstu_attention import tuning
from kernels.hstu_attention.plan import AttentionPlan, AttentionSpec, TileSizes
from kernels.triton_call import padded

WIDEST = 256
WIDEST_SMALL = 128  # where a program has less than 163 KiB of shared memory
# by compute capability, 99 elsewhere
SHARED_KIB = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}


class LaunchSizes(NamedTuple):
    """Sizes of one kernel: rows and keys of a tile, warps of a program, stages of its loads."""

    block_q: int
    block_k: int
    warps: int
    stages: int

    @property
    def tiles(self) -> TileSizes:
        return TileSizes(self.block_q, self.block_k)


class KernelSizes(NamedTuple):
    """Sizes of the forward, of the backward over query tiles, and of that over key tiles."""

    forward: LaunchSizes
    queries: LaunchSizes
    keys: LaunchSizes


# What a shape takes that has no entry in tuning.json, by bytes of an element and padded width of
# the widest head: the sizes that an H200 does long causal sequences fastest with.
# `tests/kernels/test_triton_compiles.py` compiles all of them, and the table's, for each kind of
# GPU, with and without a bias.
SIZES = {
    (2, 32): ((64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 2)),
    (2, 64): ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3)),
    (2, 128): ((64, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 2)),
    (2, 256): ((128, 64, 8, 2), (64, 32, 4, 2), (32, 64, 8, 2)),
    (4, 32): ((32, 32, 2, 2), (32, 32, 2, 2), (32, 32, 2, 2)),
    (4, 64): ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
    (4, 128): ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
    (4, 256): ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
}
# Sizes where shared memory is scarcer, not measured.
SMALLER_SIZES = SIZES | {
    (2, 64): ((64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 2)),
    (2, 128): ((64, 64, 4, 2), (64, 32, 4, 2), (32, 64, 4, 2)),
    (2, 256): ((64, 32, 8, 2), (64, 32, 8, 2), (32, 64, 8, 1)),
}


def shared_kib(compute_capability: tuple[int, int]) -> int:
    """Shared memory that a program may have."""
    return SHARED_KIB.get(compute_capability, 99)


def widest(compute_capability: tuple[int, int]) -> int:
    """Widest head that this kind of GPU takes."""
    return WIDEST if shared_kib(compute_capability) >= 163 else WIDEST_SMALL


def refusal(spec: AttentionSpec, name: str = "triton") -> str | None:
    """Why no Triton kernel can run calls of this dtype and these widths here, or None."""

    def unfit(capability: tuple[int, int]) -> str | None:
        widths = (spec.k_width, spec.v_width)
        if 0 < min(widths) <= max(widths) <= widest(capability):
            return None
        return (
            f"{name} takes heads of width 1 to {widest(capability)} here, got K = {widths[0]}, "
            f"V = {widths[1]}; implementation='xla' takes any"
        )

    return triton_call.refusal(unfit, name=name)


def heuristic(compute_capability: tuple[int, int], spec: AttentionSpec) -> KernelSizes:
    """Sizes for a kind of GPU and head widths up to `widest`, where nothing was measured."""
    table = SIZES if shared_kib(compute_capability) >= 227 else SMALLER_SIZES
    width = max(32, padded(spec.k_width), padded(spec.v_width))
    return KernelSizes(
        *(LaunchSizes(*sizes) for sizes in table[jnp.dtype(spec.dtype).itemsize, width])
    )


def find_sizes(spec: AttentionSpec, plan: AttentionPlan) -> KernelSizes:
    """Sizes of calls on the current device: measured ones, else those of the heuristic."""
    found = tuning.find("triton", spec, plan)
    if found is None:
        capability = device.current().compute_capability
        assert capability is not None, "no GPU, which `refusal` says"
        sizes = heuristic(capability, spec)
    else:
        sizes = from_table(found)
    return with_bias(sizes, spec) if spec.biased else sizes


def from_table(sizes: tuning.Sizes) -> KernelSizes:
    return KernelSizes(**{kernel: LaunchSizes(**values) for kernel, values in sizes.items()})


def with_bias(sizes: KernelSizes, spec: AttentionSpec) -> KernelSizes:
    """Sizes for calls with a bias, which takes shared memory of its own.

    16-bit sizes are measured without one: the loads' pipeline gets a stage less. 32-bit sizes are
    measured with one.
    """
    if jnp.dtype(spec.dtype).itemsize > 2:
        return sizes
    return KernelSizes(*(each._replace(stages=max(1, each.stages - 1)) for each in sizes))
