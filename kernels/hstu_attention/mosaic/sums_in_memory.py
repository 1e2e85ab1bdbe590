"""Adds accumulators to float32 memory, without a stop in shared memory."""

import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from kernels.hstu_attention.mosaic.masking import thread_place

ADD_PAIR = (
    "{ .reg .u64 a; cvta.to.global.u64 a, $0; red.relaxed.gpu.global.add.v2.f32 [a], {$1, $2}; }"
)


def add_to_memory(target_gm, values):
    """Adds `values`, float32[64, N] in accumulator layout, to a slice of float32 memory.

    A kernel that is bound by shared memory adds this way, instead of by TMA: what is staged for TMA
    is written to shared memory and read again.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
    def add(_, target, values):
        i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        f32 = ir.F32Type.get()
        strides, _ = ir.MemRefType(target.type).get_strides_and_offset()
        row, column = (arith.extui(i64, x) for x in thread_place())
        first = arith.addi(arith.muli(row, mgpu.c(strides[0], i64)), column)
        base = mgpu.utils.memref_ptr(target)
        for number, place in enumerate(np.ndindex(values.registers.shape)):
            pair = values.registers[place]
            beyond = number % 2 * 8 * strides[0] + number // 2 * 8
            pointer = mgpu.utils.getelementptr(base, [arith.addi(first, mgpu.c(beyond, i64))], f32)
            numbers = [llvm.extractelement(pair, mgpu.c(i, i32)) for i in range(2)]
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [pointer, *numbers],
                ADD_PAIR,
                "l,f,f",
                has_side_effects=True,
            )

    add(target_gm, values)
