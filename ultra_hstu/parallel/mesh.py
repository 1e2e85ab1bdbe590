"""The mesh of a run: `data` counts groups with batches of their own, `context` the devices that share the rows of one batch."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

DATA, CONTEXT = "data", "context"


def make_mesh(data: int = 1, context: int = 1, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of `data` x `context` devices; neighbours along `context` are neighbours in `devices`, where links are fastest.

    Args:
      devices: None takes all devices of all processes.

    Raises:
      ValueError: data * context is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if data < 1 or context < 1 or data * context != len(devices):
        raise ValueError(
            f"data={data} x context={context} must be the number of devices, {len(devices)}: change one of them, or pass devices="
        )
    return Mesh(np.asarray(devices).reshape(data, context), (DATA, CONTEXT), axis_types=(AxisType.Auto, AxisType.Auto))
