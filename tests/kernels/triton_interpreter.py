"""Runs Triton kernels in Triton's interpreter, on the CPU, behind the same calls.

It has no PyTorch here, whose tensors it knows: arrays stand in for them. What it cannot show:
layouts, races, speed, and rounding of products other than float32's.
"""

import contextlib
import importlib
import sys

import jax
import numpy as np
import triton.language as tl

from kernels import device, triton_call

KERNELS = (
    "kernels.hstu_attention.triton.kernels",
    "kernels.hstu_attention.triton_short.kernels",
    "kernels.hstu_attention.triton_short.halves",
)


def octaves_of(x):
    """In place of the kernels' own: the interpreter knows no machine code."""
    return tl.log2(x)


class _Pointer:
    """An array as the interpreter takes tensors."""

    def __init__(self, array):
        self.array, self.dtype = array, array.dtype

    def data_ptr(self):
        return self.array.ctypes.data


def _interpreted_modules(monkeypatch):
    """Fresh copies of the modules with kernels, decorated for the interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with monkeypatch.context() as patch:
        for name in KERNELS:
            patch.delitem(sys.modules, name, raising=False)
        return {name: importlib.import_module(name) for name in KERNELS}


@contextlib.contextmanager
def interpreted(monkeypatch):
    """Inside, the implementations of Triton think of a GPU, and their kernels are interpreted."""
    from triton.language import standard
    from triton.runtime import JITFunction, interpreter

    language = [vars(x) for name, x in sys.modules.items() if name.startswith("triton.language")]
    before = [dict(names) for names in language]
    modules = _interpreted_modules(monkeypatch)

    def launch(kernel, arrays, outs, *, programs, warps, stages, constants, zeroed=()):
        module, function = kernel.split(":")

        def run(*arrays):
            made = [np.full(x.shape, np.nan, x.dtype) for x in outs]
            for number in zeroed:
                made[number][...] = 0
            pointers = [_Pointer(np.ascontiguousarray(x)) for x in (*arrays, *made)]
            with np.errstate(over="ignore", invalid="ignore"):  # as on a GPU, where none is told
                getattr(modules[module], function)[(programs,)](*pointers, **constants)
            return tuple(pointer.array for pointer in pointers[len(arrays) :])

        return list(jax.pure_callback(run, tuple(outs), *arrays))

    with monkeypatch.context() as patch:
        patch.setattr(triton_call, "launch", launch)
        patch.setattr(device, "current", lambda: device.Device("gpu", "NVIDIA H200", (9, 0)))
        for library in (tl, standard):  # functions that were decorated when triton was imported
            for name, function in list(vars(library).items()):
                if isinstance(function, JITFunction):
                    patch.setattr(library, name, interpreter.InterpretedFunction(function.fn))

        patch.setattr(
            modules[KERNELS[0]], "octaves_of", interpreter.InterpretedFunction(octaves_of)
        )
        patch_tensor = interpreter._patch_lang_tensor

        def patched_tensor(tensor, scope):
            patch_tensor(tensor, scope)  # of which an array of one number is no index to NumPy
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        patch.setattr(interpreter, "_patch_lang_tensor", patched_tensor)
        executor = interpreter.GridExecutor
        patch.setattr(executor, "_init_args_hst", lambda self, args, kwargs: (args, kwargs))
        patch.setattr(executor, "_restore_args_dev", lambda self, *args: None)
        yield
    for names, old in zip(language, before, strict=True):  # the interpreter leaves its own there
        names.update(old)
