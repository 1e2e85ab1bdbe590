"""What a compiled program sends from device to device, read from its text."""

import math
import re
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# The result's shapes, the kind, whether it is the start of an asynchronous one, and its attributes.
_LINE = re.compile(
    rf"^[^=]*= (?P<shapes>.*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\((?P<rest>.*)",
    re.MULTILINE,
)
_SHAPE = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w+)\[([0-9,]*)\]")
# Which devices take part: "{{0,1},{2,3}}", "[2,2]<=[4]" or "mesh['data'=2,'context'=2] {'data'}".
_LISTED = re.compile(r"replica_groups=\{\{([0-9,]+)\}")
_COUNTED = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_AXES = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")


class Collective(NamedTuple):
    kind: str
    elements: int  # of its result on a device
    bytes: int  # that a device sends, by the bandwidth-optimal algorithm


def collectives(program: str, devices: int) -> list[Collective]:
    """Every collective of an optimized HLO program; one inside a loop counts once."""
    found = []
    for match in _LINE.finditer(program):
        kind = match["kind"]
        shapes = [(_width(name), _count(dims)) for name, dims in _SHAPE.findall(match["shapes"])]
        if match["start"] and (
            kind in ("all-gather", "collective-permute") or match["shapes"].startswith("((")
        ):
            # Operands stand before the results; of a permutation, handles of the hardware may stand
            # behind.
            shapes = shapes[1:2] if kind == "collective-permute" else shapes[len(shapes) // 2 :]
        size = sum(width * count for width, count in shapes)
        members = _members(match["rest"], devices)
        others = (members - 1) / members
        sent = {
            "all-gather": size * others,
            "all-reduce": 2 * size * others,
            "reduce-scatter": size * (members - 1),
            "all-to-all": size * others,
            "collective-permute": size,
        }
        elements = sum(count for _, count in shapes)
        found.append(Collective(kind, elements, round(sent[kind])))
    return found


def bytes_sent(program: str, devices: int) -> int:
    """What a device sends in a run of the program."""
    return sum(one.bytes for one in collectives(program, devices))


def _members(attributes: str, devices: int) -> int:
    """How many devices a collective joins."""
    if listed := _LISTED.search(attributes):
        return listed[1].count(",") + 1
    if counted := _COUNTED.search(attributes):
        return int(counted[1])
    if axes := _AXES.search(attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", axes[2]))
    return devices


def _count(dims: str) -> int:
    return math.prod(int(n) for n in dims.split(",") if n)


def _width(name: str) -> float:
    if name == "pred":
        return 1
    return int(re.findall(r"\d+", name)[0]) / 8
