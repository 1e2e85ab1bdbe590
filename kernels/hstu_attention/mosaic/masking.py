"""Masks of accumulators, as words of bits."""

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from kernels.hstu_attention.mosaic.launch import ROW


def keep_inside(arrays, intervals):
    """`arrays` float32[64, N], N at most 128, with 0 in columns outside the row's `intervals`.

    Arrays are in accumulator layout. A thread has at most 32 columns of a row, and an interval is a
    run of them: so a word of bits says which to keep, whatever the number of intervals, and the
    compiler turns its bits into predicates several at a time.
    """
    shape = arrays[0].shape

    @plgpu.inline_mgpu(
        arg_types=(((ROW, ROW),) * len(intervals), (plgpu.Layout.WGMMA,) * len(arrays)),
        return_type=(plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=plgpu.Layout.WGMMA),)
        * len(arrays),
    )
    def keep(_, intervals, arrays):
        i32 = ir.IntegerType.get_signless(32)
        _, column = _thread_place()

        def constant(x):
            return mgpu.c(x, i32)

        def columns_before(end):
            """How many of this thread's columns, two of every eight, come before `end`."""
            end = arith.minsi(arith.maxsi(arith.subi(end, column), constant(0)), constant(shape[1]))
            pairs = arith.muli(arith.shrui(end, constant(3)), constant(2))
            return arith.addi(pairs, arith.minsi(arith.andi(end, constant(7)), constant(2)))

        def bits(row):
            word = None
            for lo, hi in intervals:
                first, stop = (
                    columns_before(llvm.extractelement(x.registers.flat[row], constant(0)))
                    for x in (lo, hi)
                )
                run = llvm.inline_asm(
                    i32, [first, arith.subi(stop, first)], "bmsk.clamp.b32 $0, $1, $2;", "=r,r,r"
                )
                word = run if word is None else arith.ori(word, run)
            return word

        words = [bits(row) for row in range(2)]
        zero = mgpu.c(0.0, ir.F32Type.get())
        out = [x.registers.copy() for x in arrays]
        for number, place in enumerate(np.ndindex(out[0].shape)):
            for i in range(2):
                bit = constant(1 << (number // 2 * 2 + i))
                seen = arith.cmpi(
                    arith.CmpIPredicate.ne, arith.andi(words[number % 2], bit), constant(0)
                )
                for registers in out:
                    pair = registers[place]
                    kept = arith.select(seen, llvm.extractelement(pair, constant(i)), zero)
                    registers[place] = llvm.insertelement(pair, kept, constant(i))
        return tuple(
            mgpu.FragmentedArray(_registers=r, _layout=x.layout, _is_signed=None)
            for r, x in zip(out, arrays, strict=True)
        )

    return keep(tuple(intervals), tuple(arrays))


def _thread_place():
    """(row, first column) of this thread in an accumulator of 64 rows.

    The thread also has the row 8 below, the column on the right, and every 8th column from there.
    """
    i32 = ir.IntegerType.get_signless(32)
    thread = arith.remui(mgpu.utils.thread_idx(), mgpu.c(128, i32))
    warp, lane = (f(thread, mgpu.c(32, i32)) for f in (arith.divui, arith.remui))
    row = arith.addi(arith.muli(warp, mgpu.c(16, i32)), arith.divui(lane, mgpu.c(4, i32)))
    return row, arith.muli(arith.remui(lane, mgpu.c(4, i32)), mgpu.c(2, i32))
