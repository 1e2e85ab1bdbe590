"""Sizes of the GPU kernels, by measurement.

`python -m scripts.tune_attention` fills `tuning.json`. An entry holds for a kind of device, an
implementation, the bytes of an element, the head width (the wider of K and V, padded to a power of
two), whether the mask is causal or windowed, and the length class. Calls without an entry take
their implementation's heuristic: `triton.sizes.heuristic`, `mosaic.forward.forward_config`,
`mosaic.backward.backward_config`.
"""

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp

from kernels import device
from kernels.hstu_attention.plan import AttentionPlan, AttentionSpec

PATH = pathlib.Path(__file__).with_name("tuning.json")
KERNELS = {"triton": ("forward", "queries", "keys"), "mosaic": ("forward", "backward")}
MASKS = ("causal", "windowed")
LENGTHS = ("short", "long")
LONG = 512  # rows of the buffer for each sequence, from which on it is long
REMEDY = "; make it with python -m scripts.tune_attention"

# By kernel, then by the names that the kernel's implementation gives its sizes.
Sizes = Mapping[str, Mapping[str, int]]


class Key(NamedTuple):
    device: str
    implementation: str
    bytes: int
    width: int
    mask: str
    length: str


def key(implementation: str, spec: AttentionSpec, plan: AttentionPlan) -> Key:
    """The key of calls on the current device."""
    width = 1 << (max(spec.k_width, spec.v_width, 32) - 1).bit_length()
    return Key(
        device.current().kind,
        implementation,
        jnp.dtype(spec.dtype).itemsize,
        width,
        MASKS[plan.mask.windowed],
        LENGTHS[not is_short(plan)],
    )


def is_short(plan: AttentionPlan) -> bool:
    """Whether the sequences of a batch are short, by the rows that there are for each."""
    return plan.num_rows < LONG * max(plan.sequences, 1)


def find(implementation: str, spec: AttentionSpec, plan: AttentionPlan) -> Sizes | None:
    """Measured sizes for calls on the current device, or None: then the heuristic decides."""
    return table().get(key(implementation, spec, plan))


@functools.cache
def table() -> dict[Key, Sizes]:
    return parse(PATH.read_text(), str(PATH))


def use(entries: Mapping[Key, Sizes]) -> None:
    """Puts entries into this process's table, for calls that are traced from now on."""
    table().update(entries)


def parse(text: str, name: str) -> dict[Key, Sizes]:
    """The table in a file's text. ValueError, with the entry and what is wrong with it."""
    try:
        entries = json.loads(text)["entries"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{name} is not an object with a list 'entries' ({error}){REMEDY}"
        ) from error
    found: dict[Key, Sizes] = {}
    for number, entry in enumerate(entries):
        place = f"{name}, entry {number}"
        missing = [field for field in (*Key._fields, "sizes") if field not in entry]
        if missing:
            raise ValueError(f"{place} lacks {', '.join(missing)}{REMEDY}")
        made = Key(*(entry[field] for field in Key._fields))
        for field, allowed in (
            ("implementation", tuple(KERNELS)),
            ("mask", MASKS),
            ("length", LENGTHS),
        ):
            if entry[field] not in allowed:
                raise ValueError(
                    f"{place}: {field} is {entry[field]!r}, not one of {', '.join(allowed)}{REMEDY}"
                )
        kernels = KERNELS[made.implementation]
        sizes = entry["sizes"]
        if not isinstance(sizes, dict) or set(sizes) != set(kernels):
            raise ValueError(
                f"{place}: sizes must be given for {', '.join(kernels)}, got {sizes!r}{REMEDY}"
            )
        for kernel, values in sizes.items():
            bad = {
                field: value
                for field, value in values.items()
                if type(value) is not int or value < 1
            }
            if bad:
                raise ValueError(
                    f"{place}: sizes of {kernel} must be whole numbers from 1 on, got {bad}{REMEDY}"
                )
        if made in found:
            raise ValueError(f"{place} repeats {made}; keep one of them")
        found[made] = sizes
    return found
