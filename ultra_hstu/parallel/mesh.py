"""The mesh of a run.

`data` counts groups with batches of their own, `context` the devices that share a batch's rows.
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

DATA, CONTEXT = "data", "context"
EVERYWHERE = PartitionSpec()


def make_mesh(
    data: int = 1, context: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of `data` x `context` devices.

    Neighbours along `context` are neighbours in `devices`, where links are fastest.

    Args:
      devices: None takes all devices of all processes.

    Raises:
      ValueError: data * context is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if data < 1 or context < 1 or data * context != len(devices):
        raise ValueError(
            f"data={data} x context={context} must be the number of devices, {len(devices)}: "
            "change one of them, or pass devices="
        )
    return Mesh(np.asarray(devices).reshape(data, context), (DATA, CONTEXT))


def groups_here(mesh: Mesh) -> list[int]:
    """Numbers of the data groups that this process has devices of."""
    return [
        group
        for group, devices in enumerate(mesh.devices)
        if not set(devices).isdisjoint(mesh.local_devices)
    ]


def devices_here(mesh: Mesh) -> list[int]:
    """Numbers of this process's devices in the mesh, group after group."""
    return [
        number
        for number, device in enumerate(mesh.devices.flat)
        if device.process_index == jax.process_index()
    ]


def put(tree: PyTree, mesh: Mesh | None, spec: PartitionSpec = EVERYWHERE) -> PyTree:
    """Arrays of the host on the devices, divided as `spec` says.

    Without a mesh they are on the default device.

    Of several processes each holds the whole arrays and puts its own devices' parts.
    """
    if mesh is None:
        return jax.device_put(tree)
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(
            np.shape(x), sharding, lambda index: np.asarray(x)[index]
        ),
        tree,
    )


def put_parts(tree: PyTree, mesh: Mesh, spec: PartitionSpec) -> PyTree:
    """Arrays of all data groups or devices, from those of this process's.

    Arrays are [S, ...] with the parts side by side on the second axis, which `spec` divides.
    """
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(functools.partial(jax.make_array_from_process_local_data, sharding), tree)
