"""What the default device can do."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import jax

_compiled_for: contextvars.ContextVar[jax.Device | None] = contextvars.ContextVar(
    "compiled_for", default=None
)


class Device(NamedTuple):
    platform: str  # "cpu", "gpu", "tpu"
    kind: str  # as the driver names it
    compute_capability: tuple[int, int] | None  # of an NVIDIA GPU

    @property
    def is_hopper(self) -> bool:
        return self.compute_capability is not None and self.compute_capability[0] == 9


@contextlib.contextmanager
def compiling_for(device: jax.Device) -> Iterator[None]:
    """Inside, `current` is this device, for programs that are compiled and not run.

    The device need not be here (`jax.experimental.topologies`).
    """
    token = _compiled_for.set(device)
    try:
        yield
    finally:
        _compiled_for.reset(token)


def current() -> Device:
    """The device that a computation runs on, or is compiled for (`compiling_for`).

    It is that of `jax_default_device`, if set.
    """
    default = jax.config.jax_default_device
    device = _compiled_for.get() or (
        default if isinstance(default, jax.Device) else jax.local_devices(backend=default)[0]
    )
    capability = getattr(device, "compute_capability", None) if device.platform == "gpu" else None
    parsed = None
    if isinstance(capability, str) and "." in capability:
        major, minor = capability.split(".")[:2]
        parsed = (int(major), int(minor))
    return Device(device.platform, device.device_kind, parsed)
