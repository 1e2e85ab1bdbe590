"""What is inside of a kernel: the instructions of a compiled program, from its text."""

import collections
import dataclasses
import functools
import re
from pathlib import Path

PACKAGES = Path(__file__).parents[1]
MOSAIC = "_mosaic_gpu_kernel"  # behind the name that a launch gives
# The first that is found in a kernel's name and operations; for others see `kind_of`.
KINDS = (
    (
        "matrix products",
        r"\b(dot|convolution)\b|gemm|cublas|cudnn|nvjet|cutlass|xmma|matmul|^linear_",
    ),
    ("rows of a layer", r"^(norm|gate)_(forward|backward)|^join_rows"),
    ("communication", r"nccl|\ball-(reduce|gather|to-all)|\breduce-scatter|collective"),
    ("gathers, scatters, sorts", r"\b(gather|scatter|sort)\b|topk|DeviceRadixSort"),
    ("reductions", r"reduce"),
    ("control flow", r"\b(while|conditional|call)\b"),
    ("custom kernels", r"\bcustom-call\b"),
)
MOVES = {"copy", "transpose", "concatenate", "slice", "dynamic-slice", "dynamic-update-slice"}
MOVES |= {"pad", "reverse", "broadcast", "bitcast", "reshape", "tuple", "get-tuple-element"}
MOVES |= {"parameter", "constant", "copy-start", "copy-done"}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of a compiled program, which runs as a kernel or a library call.

    Attributes:
      operations: its opcode, those of the computation that it calls, and the target of a call.
      source: the innermost of our functions that it comes from, "FOLDER/FILE.py:FUNCTION"; "" where
        none is known.
      backward: it comes from a gradient.
    """

    operations: frozenset[str]
    source: str = ""
    backward: bool = False


_TABLE = re.compile(r"^(\d+) (?:\"(.*)\"|\{(.*)\})$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (?:\(.*?\)|\S+) ([\w\-]+)\(")
# Not the files that the ops of `kernels` share.
_OURS = re.compile(r"(?:^|/)((?:ultra_hstu|kernels/\w+)/.*)")
NUMBERS = re.compile(r"[._]\d+(?=$|[._])")


def instructions(text: str) -> dict[str, Instruction]:
    """The instructions of a compiled program, by name, from its text."""
    tables: dict[str, dict[str, dict[str, str]]] = {}
    found: dict[str, tuple[str, str]] = {}  # opcode and line
    opcodes = collections.defaultdict[str, set[str]](set)  # of each computation
    roots: dict[str, str] = {}  # its last line, by computation
    table, computation = "", ""
    for line in text.splitlines():
        if entry := _TABLE.match(line):
            number, name, values = entry.groups()
            pairs = dict(re.findall(r"(\w+)=(\d+)", values or ""))
            tables[table][number] = pairs if name is None else {"name": name}
        elif line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            table = line
            tables[table] = {}
        elif start := _COMPUTATION.match(line):
            computation = start[1]
        elif one := _INSTRUCTION.match(line):
            name, opcode = one.groups()
            found[name] = opcode, line
            opcodes[computation].add(opcode)
            roots[computation] = line
    sources = _sources(tables)

    def instruction(opcode: str, line: str) -> Instruction:
        inside, told = {opcode}, line
        if opcode in ("fusion", "call", "custom-call"):
            for called in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", line):
                inside |= opcodes[called]
                told += roots.get(called, "")  # where XLA named the fusion itself after nothing
            inside |= set(re.findall(r'custom_call_target="([^"]*)"', line))
        frame = re.search(r"stack_frame_id=(\d+)", told)
        source = sources.get(frame[1], "") if frame else ""
        return Instruction(frozenset(inside), source, "transpose(" in told)

    return {name: instruction(opcode, line) for name, (opcode, line) in found.items()}


def _sources(tables: dict[str, dict[str, dict[str, str]]]) -> dict[str, str]:
    """By the number of a stack frame, the innermost frame in our own packages."""
    frames = tables.get("StackFrames", {})

    @functools.cache
    def source(number: str) -> str:
        frame = frames[number]
        place = tables["FileLocations"][frame["file_location_id"]]
        if file := _OURS.search(tables["FileNames"][place["file_name_id"]]["name"]):
            function = tables["FunctionNames"][place["function_name_id"]]["name"]
            return f"{file[1]}:{function.replace('<locals>.', '')}"
        above = frame.get("parent_frame_id", number)
        return source(above) if above != number else ""

    return {number: source(number) for number in frames}


def kind_of(name: str, instruction: Instruction) -> str:
    """What a reader calls it. A kernel of `kernels/` is named after its folder."""
    name = name.removesuffix(MOSAIC)
    own = instruction.source.startswith("kernels/")
    file = instruction.source if own else own_kernels().get(name, "")
    if folder := file.removeprefix("kernels/").rpartition("/")[0]:
        op = folder.split("/")[0]
        return "attention" if "attention" in op else op.replace("_", " ")
    operations = instruction.operations
    text = " ".join([name, *sorted(operations)])
    for kind, pattern in KINDS:
        if re.search(pattern, text):
            return kind
    if operations:
        return "copies" if operations - {"fusion"} <= MOVES else "elementwise"
    return "copies" if re.match("mem(cpy|set)", name, re.IGNORECASE) else "unknown"


@functools.cache
def own_kernels() -> dict[str, str]:
    """The files of the GPU kernels that are written here, by the kernel's name.

    A trace knows these names alone: of Triton functions, and those that a Mosaic launch gives.
    """
    found: dict[str, str] = {}
    for path in sorted((PACKAGES / "kernels").glob("*/**/*.py")):
        text = path.read_text()
        names = re.findall(r"^@triton\.jit.*\n(?:@.*\n)*def (\w+)\(", text, re.M)
        if "mosaic" in path.parts or "short" in path.parts:
            names += re.findall(r"\"([a-z]+(?:_[a-z0-9]+)+)\"", text)
        for name in names:
            found.setdefault(name, str(path.relative_to(PACKAGES)))
    return found
