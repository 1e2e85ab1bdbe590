"""The first exchange of a batch: rows that devices read for themselves, in one shared buffer."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from experiments.record import Json
from kernels.timing import device_time
from scripts.bench.context_parallel_balance import draw_lengths
from scripts.bench.program import temporaries
from ultra_hstu.parallel.collectives import bytes_sent
from ultra_hstu.parallel.layout import Layout
from ultra_hstu.parallel.mesh import make_mesh
from ultra_hstu.parallel.reshard import Shared, gather_then_slice, needed_capacity, to_shared


def measure_reshard(devices: int, rows: int, width: int, seconds: float) -> Json:
    """Jagged batches that every device read for itself, moved into one shared buffer.

    By an all-to-all, and by the all-gather that the paper starts from.
    """
    mesh = make_mesh(context=devices, devices=jax.devices()[:devices])
    rng, result = np.random.default_rng(0), {}
    local = rows // devices
    lengths_Bd = [
        draw_lengths(rng, "lognormal", local - local // 16 * int(rng.integers(0, 4)), local // 8)
        for _ in range(devices)
    ]
    most = max(map(len, lengths_Bd))
    lengths = np.concatenate([np.pad(x, (0, most - len(x))) for x in lengths_Bd]).astype(np.int32)
    rows_spec = PartitionSpec("context")

    def placed(values: np.ndarray) -> jax.Array:
        return jax.device_put(values, NamedSharding(mesh, rows_spec))

    floats = rng.standard_normal((rows, width), dtype=np.float32).astype(jnp.bfloat16)
    integers = rng.integers(0, 99, (rows, 4)).astype(np.int32)
    arguments = ([placed(floats), placed(integers)], placed(lengths))
    for place, layout in (
        ("slices", Layout.contiguous(rows, devices)),
        ("blocks", Layout.striped(rows, devices, min(128, local // 2))),
    ):
        capacity = needed_capacity(lengths, layout)
        ways: dict[str, Callable[..., Shared]] = {
            "all_to_all": functools.partial(to_shared, layout=layout, capacity=capacity),
            "all_gather": functools.partial(gather_then_slice, layout=layout),
        }
        found = {}
        for name, move in ways.items():
            mapped = jax.shard_map(
                lambda values, lengths, move=move: move(values, lengths).values,
                mesh=mesh,
                in_specs=rows_spec,
                out_specs=rows_spec,
                check_vma=False,
            )
            program = jax.jit(mapped).lower(*arguments).compile()
            timing = device_time(program, *arguments, repetitions=5, sample_seconds=seconds)
            found[name] = {
                "ms": 1e3 * timing.seconds,
                "batches_a_second": 1 / timing.seconds,
                "temporary_bytes": temporaries(program),
                "bytes_sent": bytes_sent(program.as_text() or "", devices),
            }
        result[place] = found
    return {"rows": rows, "width": width, "devices": devices, "ways": result}
