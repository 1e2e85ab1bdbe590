"""The longest sequences that train within a memory per device, by what the compiler says.

Programs are for 1, 2, 4 and 8 GPUs, none of which must be here: XLA's GPU compiler compiles the
real step with the real kernels for Hopper GPUs that a description stands for. That needs the CUDA
plugin of JAX (`make install-cuda`) and no more. `confirm` then trains at a length that was found,
where there are GPUs, and reads the memory that it took.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import jax
from jax.experimental import topologies

from experiments.record import Json
from scripts.bench.context_parallel_case import Case
from scripts.bench.program import TrainingCase
from scripts.bench.turns import each

GIB = 2**30
# Of a group: so many that the memory is that of activations, at lengths of some thousands.
USERS = 336
CONTEXTS = (1, 2, 4, 8)
Remat = Literal["none", "selective"]
VARIANTS: list[tuple[str, Remat]] = [
    ("causal", "none"),
    ("semi_local", "none"),
    ("causal", "selective"),
    ("semi_local", "selective"),
]
STRATEGY: dict[str, Literal["ring", "halo"]] = {"causal": "ring", "semi_local": "halo"}
# An H100, but for its memory: with little, XLA begins to rematerialise by itself.
HOPPER = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 343597383680
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
UNTUNED = {"xla_gpu_autotune_level": 0}  # there is no GPU to search for algorithms on


def hopper(count: int) -> Sequence[jax.Device]:
    """GPUs to compile for."""
    return topologies.get_topology_desc(
        platform="cuda", target_config=HOPPER, topology=f"1x1x{count}"
    ).devices


def bytes_of(case: Case) -> int:
    """Memory of a device, compiled for Hopper GPUs; of a small case, for the devices here."""
    return case.compiled(jax.devices() if case.small else hopper(case.devices), UNTUNED).bytes()


def longest(
    case: Case,
    budget: float,
    step: int,
    measure: Callable[[Case], int] = bytes_of,
    compiles: int = 8,
) -> Json:
    """The longest history, a multiple of `step`, whose training step fits into `budget` bytes.

    Memory is nearly linear in the length.

    Args:
      case: its length is the first guess.
    """
    found: dict[int, int] = {}  # bytes, by length in steps
    guess = case.length // step
    while len(found) < compiles:
        fits = max((n for n in found if found[n] <= budget), default=0)
        beyond = min((n for n in found if n > fits), default=0)
        if beyond == fits + 1:
            last = {"bytes": found.get(fits), "bytes_of_one_step_more": found[beyond]}
            return {"longest": fits * step, **last, "step": step, "compiles": len(found)}
        near = sorted(found, key=lambda n: abs(found[n] - budget))[:2]
        if len(near) == 1:
            guess = int(near[0] * budget / found[near[0]])
        elif near and (slope := (found[near[1]] - found[near[0]]) / (near[1] - near[0])) > 0:
            guess = near[0] + int((budget - found[near[0]]) // slope)
        guess = max(fits + 1, min(guess, beyond - 1 if beyond else 4 * max(fits, guess)))
        found[guess] = measure(dataclasses.replace(case, length=guess * step))
    raise ValueError(f"no longest length of {case} after {compiles} compilations: {found}")


def search(cases: Sequence[Case], budget: float, jobs: int = 1) -> Iterator[tuple[Case, Json]]:
    """What `longest` finds for each case, as it comes; in this process, or in `jobs` new ones."""
    tasks = [functools.partial(_longest, case, budget, alone=jobs > 1) for case in cases]
    for number, found in each(tasks, jobs):
        yield cases[number], found


def _longest(case: Case, budget: float, alone: bool) -> Json:
    if alone:  # a process that compiles leaves the GPUs alone
        jax.config.update("jax_platforms", "cpu")
    started = time.perf_counter()
    found = longest(case, budget, (16 if not case.small else 8) * case.context)
    return found | {"seconds": time.perf_counter() - started}


def first_guesses(
    contexts: Sequence[int],
    users: int,
    variants: Sequence[tuple[str, Remat]],
    small: bool,
    known: Json,
) -> list[Case]:
    """Cases to search from: the lengths that `known` has by variant and context, or usual ones."""
    usual = {"none": 2048, "selective": 7488}
    return [
        Case(
            mask,
            users,
            known.get(f"{mask}/{remat}", {})
            .get(str(context), {})
            .get("longest", context * (64 if small else usual[remat])),
            context=context,
            strategy=STRATEGY[mask],
            remat=remat,
            small=small,
        )
        for context in contexts
        for mask, remat in variants
    ]


# --- on GPUs ---


def prepare_training(
    case: TrainingCase, steps: int, options: dict[str, int] | None = None
) -> Callable[[], Json]:
    """Compiles a step; what it returns trains some, in a process that does nothing else.

    Its result: times, losses, and the memory that the last of the devices took.
    """
    devices = jax.devices()
    started = time.perf_counter()
    program = case.compiled(devices, options)
    compiled = time.perf_counter() - started

    def train() -> Json:
        state, batch = program.start()
        losses, times = [], []
        for _ in range(steps):
            before = time.perf_counter()
            state, metrics = program.run(state, batch)
            losses.append(float(metrics["loss"]))
            times.append(1e3 * (time.perf_counter() - before))
        memory = devices[case.devices - 1].memory_stats() or {}
        return {
            "case": dataclasses.asdict(case),
            "compile_s": compiled,
            "losses": losses,
            "step_ms": times,
            "bytes_predicted": program.bytes(),
            "bytes_peak": memory.get("peak_bytes_in_use"),
            "bytes_limit": memory.get("bytes_limit"),
        }

    return train


def lengths_to_confirm(record: Json, context: int, memory: float) -> Iterator[tuple[Case, int]]:
    """(case, bytes that were found for it) of a record, for a device with `memory` bytes.

    A case is shortened where the device has less than the budget.
    """
    for variant, by_context in record["variants"].items():
        mask, remat = variant.split("/")
        if remat != "none" or str(context) not in by_context:
            continue
        found = by_context[str(context)]
        length, size, step = found["longest"], found["bytes"], found["step"]
        if size > memory:
            length = int(length * memory / size) // step * step
        yield Case(mask, record["users"], length, context=context, strategy=STRATEGY[mask]), size
