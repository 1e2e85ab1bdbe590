"""Compiled programs of a run, which a second start finds without tracing them.

JAX's own cache is asked with a lowered program, and tracing and lowering a deep model takes
seconds. Here the question is what tracing would read: the code, the versions of what it uses, the
settings of JAX, and what the function closes over. Programs lie in the folder of
`compilation_cache`, in files like the others.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import io
import json
import logging
import os
import sys
import sysconfig
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import NamedTuple, cast

import jax
import numpy as np
from jax._src import compilation_cache as jax_cache  # whose format has no public name
from jax._src import config as jax_config  # nor have the settings of a thread
from jax._src.interpreters import pxla
from jax.experimental import serialize_executable
from jaxtyping import PyTree

from kernels import dispatch
from kernels.dispatch import Choice
from ultra_hstu import compilation_cache
from ultra_hstu.parallel import processes

_log = logging.getLogger(__name__)
PACKAGES = Path(__file__).parents[1]
OURS = ("kernels", "ultra_hstu")
VERSIONS = ("jax", "jaxlib", "flax", "optax", "numpy", "jax-triton", "triton")
VARIABLES = ("JAX_", "XLA_", "TRITON_", "CUDA_", "NVIDIA_", "LIBTPU_")
NOT_READ = ("cache", "log", "dump")  # in names of settings that no program depends on


class Begun(NamedTuple):
    """A program that was found or is being compiled, and which implementations its ops have."""

    program: Future[jax.stages.Compiled]
    choices: list[Choice]


def begin(
    jitted: jax.stages.Wrapped,
    arguments: tuple[PyTree, ...],
    results: PyTree,
    closed_over: Sequence[object],
    pool: Executor,
) -> Begun:
    """The program of a jitted function for these arguments.

    It is looked for; where there is none, the function is traced now, and compiled in the pool.

    Args:
      results: a pytree of the structure of the results.
      closed_over: all that the program depends on, beside the shapes of the arguments, the code and
        the settings of JAX: what the function reads, and how it is jitted.
    """
    files = None if processes.several() else compilation_cache.files()
    key = None if files is None else _key(arguments, closed_over)
    if files is not None and key is not None:
        found = files.get(key)
        if found is not None and (begun := _loaded(found, arguments, results)) is not None:
            return begun
    with dispatch.record() as choices:
        lowered = jitted.lower(*arguments)

    def compiled() -> jax.stages.Compiled:
        if files is None or key is None:
            return lowered.compile()
        with files.seen() as seen:
            program = lowered.compile()
        if (serialized := _serialized(program, seen)) is not None:
            files.put(key, json.dumps(choices).encode() + b"\n" + zlib.compress(serialized, 1))
        return program

    return Begun(pool.submit(compiled), choices)


def _loaded(content: bytes, arguments: tuple[PyTree, ...], results: PyTree) -> Begun | None:
    head, packed = content.split(b"\n", 1)
    future = Future[jax.stages.Compiled]()
    try:
        program = serialize_executable.deserialize_and_load(
            zlib.decompress(packed),
            jax.tree.structure((arguments, {})),
            jax.tree.structure(results),
            execution_devices=_devices(arguments),
        )
    except Exception as error:  # whatever another driver or a lost device makes of it
        _log.warning("a compiled program cannot be loaded (%s); it is compiled again", error)
        return None
    future.set_result(program)
    return Begun(future, [Choice(*choice) for choice in json.loads(head)])


def _devices(arguments: tuple[PyTree, ...]) -> Sequence[jax.Device]:
    """Where a program with these arguments runs, in the order of its mesh."""
    for leaf in jax.tree.leaves(arguments):
        if isinstance(leaf, jax.Array):
            return leaf.sharding._device_assignment
    return jax.devices()[:1]


def _serialized(program: jax.stages.Compiled, seen: list[bytes]) -> bytes | None:
    """What `deserialize_and_load` takes; None for a program that holds what is of this process.

    Args:
      seen: what JAX's cache read or wrote when it was compiled. What was read from there cannot be
        serialized again on a CPU, so the machine code is taken from it.
    """
    unloaded = cast(pxla.MeshExecutable, program._executable)._unloaded_executable
    if program._params.const_args or unloaded.host_callbacks:
        return None
    code = None
    if seen:
        content = jax_cache.decompress_executable(seen[-1])
        code = jax_cache.extract_executable_and_time(content)[0]
    machine = type(program.runtime_executable())

    class Pickler(serialize_executable._JaxPjrtPickler):
        def persistent_id(self, obj: object) -> tuple[object, ...] | None:
            if code is not None and isinstance(obj, machine):
                return "exec", code
            return super().persistent_id(obj)

    with io.BytesIO() as file:
        Pickler(file).dump((unloaded, jax.tree.leaves(program.args_info), program._no_kwargs))
        return file.getvalue()


# --- keys ---


class _Unknown(TypeError):
    """Nobody knows whether such an object means the same in another process."""


def _key(arguments: tuple[PyTree, ...], closed_over: Sequence[object]) -> str | None:
    """The name of a program; None where something has no name in other processes."""
    leaves, tree = jax.tree.flatten(arguments)
    digest = hashlib.sha256(_surroundings())
    try:
        for one in (str(tree), _settings(), [_shape(leaf) for leaf in leaves], list(closed_over)):
            for part in _parts(one):
                digest.update(part + b"\0")
    except _Unknown:
        return None
    return f"traced-{digest.hexdigest()}"


def _shape(leaf: jax.Array | np.ndarray | np.generic) -> tuple[object, ...]:
    weak, sharding = getattr(leaf, "weak_type", False), getattr(leaf, "sharding", None)
    return leaf.shape, str(leaf.dtype), weak, repr(sharding)


def _settings() -> list[str]:
    """What JAX was told, globally and in this thread."""
    values = [
        f"{name}={value}"
        for name, value in sorted(jax.config.values.items())
        if not any(part in name for part in NOT_READ)
    ]
    thread = [repr(value) for value in jax_config.trace_context()]
    return [*values, *(value for value in thread if " object at 0x" not in value)]


@functools.cache
def _surroundings() -> bytes:
    """A hash of the code, the versions of what it uses, the environment and the devices."""
    digest = hashlib.sha256()
    for path in _sources():
        digest.update(str(path).encode() + path.read_bytes())
    for name in VERSIONS:
        try:
            digest.update(f"{name} {importlib.metadata.version(name)}".encode())
        except importlib.metadata.PackageNotFoundError:
            continue
    for name, value in sorted(os.environ.items()):
        if name.startswith(VARIABLES) and "CACHE" not in name:
            digest.update(f"{name}={value}".encode())
    devices = jax.devices()
    kinds = [(device.id, device.device_kind) for device in devices]
    platform = devices[0].client.platform_version
    digest.update(f"{kinds} {platform} {compilation_cache.processor()} {sys.version}".encode())
    return digest.digest()


def _sources() -> Iterator[Path]:
    """The files of our packages, and every other loaded module that no installer has put there."""
    ours = [PACKAGES / name for name in OURS]
    for folder in ours:
        yield from sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".json"))
    folders = [*map(str, ours), *sysconfig.get_paths().values()]
    installed = tuple({f"{folder}{os.sep}" for folder in folders})
    files = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
    for file in sorted(files):
        if not file.startswith(installed) and os.path.isfile(file):
            yield Path(file)


def _parts(value: object) -> Iterator[bytes]:
    """The bytes that tell a value from others."""
    if isinstance(value, str | bytes | int | float | bool | type(None) | np.generic):
        yield f"{type(value).__name__} {value!r}".encode()
    elif isinstance(value, np.ndarray | jax.Array):
        array = np.asarray(value)
        yield f"{array.shape} {array.dtype}".encode()
        yield np.ascontiguousarray(array).tobytes()
    elif isinstance(value, type):
        yield f"{value.__module__}.{value.__qualname__}".encode()
    elif isinstance(value, jax.ShapeDtypeStruct | jax.Device | jax.sharding.Sharding):
        yield repr(value).encode()
    elif dataclasses.is_dataclass(value):
        yield from _parts(type(value))
        for field in dataclasses.fields(value):
            yield field.name.encode()
            yield from _parts(getattr(value, field.name))
    elif isinstance(value, Mapping):
        yield f"mapping of {len(value)}".encode()
        for name, part in value.items():
            yield from _parts(name)
            yield from _parts(part)
    elif isinstance(value, list | tuple):
        yield f"{len(value)} values".encode()
        for part in value:
            yield from _parts(part)
    else:
        raise _Unknown(type(value))
