"""The longest sequences that train within a memory per device, by what the compiler says of programs for 1, 2, 4 and 8 GPUs, none of which must be here.

The real step is compiled by XLA's GPU compiler with the real kernels, for Hopper GPUs that a description stands for; that needs the CUDA plugin of JAX
(`make install-cuda`) and no more. `confirm` then trains at a length that was found, where there are GPUs, and reads the memory that it took.
"""

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from scripts.bench.context_parallel_model import Case, Program

GIB = 2**30
USERS = 336  # of a group: so many that what is read is memory of activations, at lengths of some thousands
CONTEXTS = (1, 2, 4, 8)
VARIANTS = (
    ("causal", "none"),
    ("semi_local", "none"),
    ("causal", "selective"),
    ("semi_local", "selective"),
)
STRATEGY = {"causal": "ring", "semi_local": "halo"}
# An H100, but for its memory: with little, XLA begins to rematerialise by itself.
HOPPER = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 343597383680
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
UNTUNED = {"xla_gpu_autotune_level": 0}  # there is no GPU to search for algorithms on


def hopper(count: int) -> list[Any]:
    """GPUs to compile for."""
    return list(
        topologies.get_topology_desc(
            platform="cuda", target_config=HOPPER, topology=f"1x1x{count}"
        ).devices
    )


def bytes_of(case: Case) -> int:
    """Memory of a device, compiled for Hopper GPUs; of a small case, for the devices that are here."""
    if case.small:
        return Program(case, jax.devices()).compile().bytes()
    return Program(case, hopper(case.devices)).compile(UNTUNED).bytes()


def longest(
    case: Case,
    budget: float,
    step: int,
    measure: Callable[[Case], int] = bytes_of,
    compiles: int = 8,
) -> dict[str, Any]:
    """The longest history, a multiple of `step`, whose step takes no more than `budget` bytes. Memory is nearly linear in the length.

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


def search(
    budget: float,
    contexts: Sequence[int] = CONTEXTS,
    users: int = USERS,
    variants: Sequence[tuple[str, str]] = VARIANTS,
    small: bool = False,
    jobs: int = 1,
    known: Any = None,
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(variant, context, what `longest` found), as they come. `known`: such results, by variant and context, that a search begins with."""

    def guess(mask: str, remat: str, context: int) -> int:
        found = (known or {}).get(f"{mask}/{remat}", {}).get(str(context))
        return (
            found["longest"]
            if found
            else context * (64 if small else {"none": 2048, "selective": 7488}[remat])
        )

    cases = {
        (f"{mask}/{remat}", context): Case(
            mask,
            users,
            guess(mask, remat, context),
            context=context,
            strategy=STRATEGY[mask],
            remat=remat,
            small=small,
        )
        for context in contexts
        for mask, remat in variants
    }
    run = functools.partial(_longest, budget=budget)
    if jobs <= 1:
        yield from ((*key, run(case)) for key, case in cases.items())
        return
    with concurrent.futures.ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), initializer=_without_devices
    ) as pool:
        futures = {pool.submit(run, case): key for key, case in cases.items()}
        for done in concurrent.futures.as_completed(futures):
            yield *futures[done], done.result()


def _longest(case: Case, budget: float) -> dict[str, Any]:
    started = time.perf_counter()
    found = longest(case, budget, (16 if not case.small else 8) * case.context)
    return found | {"seconds": time.perf_counter() - started}


def _without_devices() -> None:
    """A process that compiles leaves the GPUs alone."""
    jax.config.update("jax_platforms", "cpu")


# --- on GPUs ---


def prepare_training(
    case: Case, steps: int, options: dict[str, Any] | None = None
) -> Callable[[], dict[str, Any]]:
    """Compiles a step. What it returns trains some: times, losses and the memory that the last of the devices took, in a process that does nothing else."""
    devices = jax.devices()
    started = time.perf_counter()
    program = Program(case, devices).compile(options)
    compiled = time.perf_counter() - started

    def train() -> dict[str, Any]:
        state, batch = program.start()
        losses, seconds = [], []
        for _ in range(steps):
            before = time.perf_counter()
            state, metrics = program.run(state, batch)
            losses.append(float(metrics["loss"]))
            seconds.append(time.perf_counter() - before)
        memory = devices[case.devices - 1].memory_stats() or {}
        return {
            "case": dataclasses.asdict(case),
            "compile_s": compiled,
            "losses": losses,
            "step_ms": [1e3 * s for s in seconds],
            "bytes_predicted": program.bytes(),
            "bytes_peak": memory.get("peak_bytes_in_use"),
            "bytes_limit": memory.get("bytes_limit"),
        }

    return train


def lengths_to_confirm(
    record: dict[str, Any], context: int, room: float
) -> Iterator[tuple[Case, int]]:
    """Cases of a record that a device with `room` bytes can run, shortened where it has less than the budget, and the bytes that were found for them."""
    for variant, by_context in record["variants"].items():
        mask, remat = variant.split("/")
        if remat != "none" or str(context) not in by_context:
            continue
        found = by_context[str(context)]
        length = found["longest"]
        if found["bytes"] > room:
            length = int(length * room / found["bytes"]) // found["step"] * found["step"]
        yield (
            Case(mask, record["users"], length, context=context, strategy=STRATEGY[mask]),
            found["bytes"],
        )
