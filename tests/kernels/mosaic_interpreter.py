"""Runs the Hopper kernels in Pallas's GPU interpreter, thread by thread, barriers and all.

The interpreter of this JAX has no accumulator registers, no wgmma with a register operand, no
reductions to global memory and no inline code. This file, and no other, stands in for them:
accumulators are shared memory, products are `jnp.dot`, sums to memory are plain (so one thread
block at a time, as its interpreter would let them race), and items are drawn in turn. What it
cannot show: alignment, register counts, races of the tensor cores, speed. Those need a GPU.
"""

import contextlib
import dataclasses
import functools
import types

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax._src.pallas.mosaic_gpu.interpret import shared_memory

from kernels.hstu_attention.mosaic import (
    backward_keys,
    backward_one_pass,
    backward_queries,
    backward_shared,
    backward_wide,
    forward,
    items,
    launch,
    schedule,
    split_tiles,
)
from kernels.norm_linear.mosaic import product

MODULES = (
    backward_keys,
    backward_one_pass,
    backward_queries,
    backward_shared,
    backward_wide,
    forward,
    items,
    launch,
    product,
    split_tiles,
)
ACCUMULATORS = 7  # that a warpgroup holds at a time, at most


@dataclasses.dataclass
class _Accumulator:
    shape: tuple[int, int]
    dtype: object


class _Pool:
    """Shared memory in place of accumulator registers, taken and given back like a stack."""

    def __init__(self):
        self.buffers, self.used = [], 0

    def run_scoped(self, body, *args, collective_axes=(), **kwargs):
        if collective_axes:
            names = [f"accumulator{i}" for i in range(ACCUMULATORS)]

            def entered(*refs, **named):
                self.buffers, self.used = [named.pop(name) for name in names], 0
                return body(*refs, **named)

            pool = {name: plgpu.SMEM((2, 128, 256), jnp.float32) for name in names}
            return pl.run_scoped(entered, *args, collective_axes=collective_axes, **kwargs, **pool)
        before, refs = self.used, []
        for wanted in args:
            ref = self.buffers[self.used].at[
                lax.axis_index("wg"), pl.ds(0, wanted.shape[0]), pl.ds(0, wanted.shape[1])
            ]
            ref[...] = jnp.zeros(wanted.shape, wanted.dtype)
            refs.append(ref)
            self.used += 1
        out = body(*refs)
        self.used = before
        return out


def _wgmma(acc, a, b):
    acc[...] += jnp.dot(a[...].astype(jnp.float32), b[...].astype(jnp.float32))


def _copy_smem_to_gmem(source, target, reduction_op=None):
    if reduction_op is None:
        plgpu.copy_smem_to_gmem(source, target)
    else:
        target[...] += source[...]


def _fetch_item(gm, s, slot, *, which, number=None):
    box = s.rec.at[s.rec.shape[0] - 1]
    number = box[0] + schedule.WORKERS if number is None else number
    box[0] = number
    plgpu.barrier_wait(s.rec_empty.at[slot])
    number = jnp.minimum(number, gm.records.shape[0] - 1)
    plgpu.copy_gmem_to_smem(gm.records.at[number], s.rec.at[slot], s.rec_full.at[slot])


def _keep_inside(arrays, intervals):
    column = lax.broadcasted_iota(jnp.int32, arrays[0].shape, 1)
    seen = sum(
        ((column >= lo[:, None]) & (column < hi[:, None])).astype(jnp.int32) for lo, hi in intervals
    )
    return tuple(jnp.where(seen > 0, x, 0.0) for x in arrays)


def _copy(module, **changes):
    out = types.ModuleType(module.__name__)
    out.__dict__.update(
        {name: getattr(module, name) for name in dir(module) if not name.startswith("__")},
        **changes,
    )
    return out


@contextlib.contextmanager
def interpreted(monkeypatch):
    """Inside, the kernels run in the interpreter. Call them with few workers."""
    pool = _Pool()
    gpu = _copy(
        plgpu,
        ACC=_Accumulator,
        wgmma=_wgmma,
        wgmma_wait=lambda n: None,
        wgmma_accumulator_load=lambda acc, wait_n=0: acc[...],
        copy_smem_to_gmem=_copy_smem_to_gmem,
        set_max_registers=lambda n, action: None,
        load=lambda ref, layout=None, optimized=True: ref[...],
        kernel=functools.partial(plgpu.kernel, interpret=plgpu.InterpretGPUParams()),
    )
    pallas = _copy(pl, run_scoped=pool.run_scoped)
    stand_ins = {"fetch_item": _fetch_item, "keep_inside": _keep_inside}
    with monkeypatch.context() as patch:
        for module in MODULES:
            patch.setattr(module, "plgpu", gpu)
            patch.setattr(module, "pl", pallas)
            for name, stand_in in stand_ins.items():
                if hasattr(module, name):
                    patch.setattr(module, name, stand_in)
        # The kernels leave the barriers of emptied buffers armed at their end, which the hardware
        # does not mind.
        patch.setattr(
            shared_memory.Barrier,
            "deallocate",
            lambda barrier: setattr(barrier, "ref_count", barrier.ref_count - 1),
        )
        yield
