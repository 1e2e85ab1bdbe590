"""jax-triton's calls, in a form that XLA can record in a CUDA graph.

jax-triton 0.3 lowers to a custom call of the old kind. XLA launches that by itself, between the
graphs of the operations before and behind it, which counts where kernels are short. jaxlib has the
same call behind a name of its foreign function interface, which may be recorded; jax-triton uses it
from 0.4 on, which needs a newer Triton.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxtyping import Array

from kernels import device

FFI_NAME = "triton_kernel_call_ffi"
FFI_VERSION = 4


def launch(
    kernel: str,
    arrays: Sequence[Array],
    outs: Sequence[jax.ShapeDtypeStruct],
    *,
    programs: int,
    warps: int,
    stages: int,
    constants: Mapping[str, bool | int | float | str],
    zeroed: tuple[int, ...] = (),
) -> list[Array]:
    """Runs a kernel on `arrays` and returns its outputs.

    Args:
      kernel: module and function, as in "kernels.OP.triton.kernels:forward". The module is imported
        here, because it imports triton.
      outs: outputs, which the kernel takes behind the arrays.
      programs: size of the grid.
      warps, stages: of a program.
      constants: the kernel's `constexpr` arguments, by name.
      zeroed: numbers of the outputs that begin with zeros.
    """
    import jax_triton

    _record_calls()
    module, function = kernel.split(":")
    op = module.split(".")[1]
    return jax_triton.triton_call(
        *arrays,
        kernel=getattr(importlib.import_module(module), function),
        out_shape=list(outs),
        grid=(programs,),
        name=f"{op}_{function}",
        num_warps=warps,
        num_stages=stages,
        zeroed_outputs=zeroed,
        **constants,
    )


def refusal(unfit: Callable[[tuple[int, int]], str | None], *, name: str = "triton") -> str | None:
    """Why the implementation `name` cannot run Triton kernels on this device, or None.

    Args:
      unfit: why a kernel cannot run on a GPU of a compute capability that Triton supports, or None.
    """
    current = device.current()
    capability = current.compute_capability
    if current.platform != "gpu" or capability is None or capability < (8, 0):
        return (
            f"{name} needs an NVIDIA GPU from sm80 (A100) on, the device is {current.kind!r}; "
            "implementation='xla' runs anywhere"
        )
    if (reason := unfit(capability)) is not None:
        return reason
    for package in ("jax_triton", "triton"):
        if importlib.util.find_spec(package) is None:
            return (
                f"{name} needs {package}: pip install -r requirements-cuda.txt; "
                "implementation='xla' needs nothing more"
            )
    return None


def padded(width: int) -> int:
    """Width that products compute with: a power of two."""
    return max(16, 1 << (width - 1).bit_length())


def product_precision() -> str:
    """How float32 products are taken, in Triton's words: as JAX's matmul precision says."""
    name = str(jax.config.jax_default_matmul_precision).lower()
    if name in ("highest", "float32", "f32_f32_f32"):
        return "ieee"
    return "tf32x3" if name == "high" or name.endswith(("x3", "3x", "x6", "x9")) else "tf32"


@functools.cache
def _record_calls() -> None:
    from jax_triton import triton_lib

    lower = functools.partial(triton_lib.triton_kernel_call_lowering, triton_lib.get_cuda_backend)

    def lowered(
        ctx: mlir.LoweringRuleContext, *operands: ir.Value, **parameters: Any
    ) -> Sequence[ir.Value]:
        results = lower(ctx, *operands, **parameters)
        attributes = results[0].owner.attributes
        attributes["backend_config"] = ir.DictAttr.get({"opaque": attributes["backend_config"]})
        attributes["call_target_name"] = ir.StringAttr.get(FFI_NAME)
        attributes["api_version"] = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), FFI_VERSION)
        return results

    mlir.register_lowering(triton_lib.triton_kernel_call_p, lowered, platform="cuda")
