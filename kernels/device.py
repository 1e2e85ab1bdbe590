"""What the default device can do."""

from typing import NamedTuple

import jax


class Device(NamedTuple):
    platform: str  # "cpu", "gpu", "tpu"
    kind: str  # as the driver names it
    compute_capability: tuple[int, int] | None  # of an NVIDIA GPU

    @property
    def is_hopper(self) -> bool:
        return self.compute_capability is not None and self.compute_capability[0] == 9


def current() -> Device:
    """The device that an un-placed computation runs on (`jax_default_device` respected)."""
    default = jax.config.jax_default_device
    device = default if isinstance(default, jax.Device) else jax.local_devices(backend=default)[0]
    capability = getattr(device, "compute_capability", None) if device.platform == "gpu" else None
    parsed = None
    if isinstance(capability, str) and "." in capability:
        major, minor = capability.split(".")[:2]
        parsed = (int(major), int(minor))
    return Device(device.platform, device.device_kind, parsed)
