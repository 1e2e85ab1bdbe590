"""jax-triton's calls, in a form that XLA can record in a CUDA graph.

jax-triton 0.3 lowers to a custom call of the old kind. XLA launches that by itself, between the graphs of the operations before and behind it, which
counts where kernels are short. jaxlib has the same call behind a name of its foreign function interface, which may be
recorded; jax-triton uses it from 0.4 on, which needs a newer Triton.
"""

import functools
from typing import Any

from jax.interpreters import mlir
from jaxlib.mlir import ir

FFI_NAME = "triton_kernel_call_ffi"
FFI_VERSION = 4


def triton_call(*arrays: Any, **options: Any) -> Any:
    """`jax_triton.triton_call`."""
    import jax_triton

    _record_calls()
    return jax_triton.triton_call(*arrays, **options)


@functools.cache
def _record_calls() -> None:
    from jax_triton import triton_lib

    lower = functools.partial(triton_lib.triton_kernel_call_lowering, triton_lib.get_cuda_backend)

    def lowered(ctx: Any, *operands: Any, **parameters: Any) -> Any:
        results = lower(ctx, *operands, **parameters)
        attributes = results[0].owner.attributes
        attributes["backend_config"] = ir.DictAttr.get({"opaque": attributes["backend_config"]})
        attributes["call_target_name"] = ir.StringAttr.get(FFI_NAME)
        attributes["api_version"] = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), FFI_VERSION)
        return results

    mlir.register_lowering(triton_lib.triton_kernel_call_p, lowered, platform="cuda")
