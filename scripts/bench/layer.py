"""What one layer costs: time, TFLOP/s, memory, and where the time goes.

python -m scripts.bench.layer [--workloads=NAME,...] [--modes=NAME,...]
    [--record=experiments/results/NAME.json]
python -m scripts.bench.layer --record=experiments/results/layer_h200.json

Two stacks of different depth are compiled; a layer is their difference, divided. `training` is the
loss and the gradients of input and parameters, `inference` the forward pass alone. Sequences fill
the buffer; there is no truncation and no dropout. Model FLOPs are matrix products and attention
over the mask's pairs, backward twice the products and 2.5 times attention. Memory is the compiler's
count of temporaries. The programs are made side by side, a process each, and run one after another.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx
from jaxtyping import PyTree

from experiments import command, configs
from experiments.record import Json, Record
from kernels.timing import device_time, mfu
from scripts.bench import turns
from scripts.bench.program import temporaries
from scripts.bench.terminal import show
from ultra_hstu import flops, profiling
from ultra_hstu.config import Config
from ultra_hstu.fields import changed
from ultra_hstu.nn.hstu import HSTU
from ultra_hstu.sequences import Sequences

FLAGS = flags.FLAGS
CHUNKS = 8
LEAST_MS = 0.002  # of a kernel that is named
STEPS = 3  # of a profile
ROUNDS = 7  # of samples
PROFILED = ("none", "xla", "fp8")  # modes of the windowed layer
Function = Callable[..., PyTree]


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """Sequences of one length, and the model that they enter.

    Attributes:
      depths: layers of the two stacks.
    """

    users: int
    length: int
    window: int = -1
    full_rows: int = 0
    width: int = 512
    heads: int = 4
    head_width: int = 128
    depths: tuple[int, int] = (1, 2)

    @property
    def rows(self) -> int:
        return self.users * self.length

    def config(self, layers: int, options: Json) -> Config:
        model = {
            "layers": layers,
            "window": (self.window,),
            "full_rows": (self.full_rows,),
            "width": self.width,
            "heads": self.heads,
            "qk_width": self.head_width,
            "v_width": self.head_width,
            "truncate_after": None,
            "truncate_length": None,
            "remat": "none",
        }
        rows = {"max_history": self.length, "batch_tokens": self.rows}
        return changed(configs.named("long_ultra"), model=model | options, data=rows)


WORKLOADS = {
    "8 x 8192 causal": LayerShape(8, 8192),
    "32 x 2048 causal": LayerShape(32, 2048),
    "4 x 16384 window 256": LayerShape(4, 16384, window=256),
    "4 x 16384 window 256 + 256 full rows": LayerShape(4, 16384, window=256, full_rows=256),
    "128 x 2630 causal": LayerShape(128, 2630),
    "d1024 32 x 4096 causal": LayerShape(32, 4096, width=1024, head_width=256),
}
MODES: dict[str, Json] = {
    "none": {},
    "selective": {"remat": "selective"},
    f"selective {CHUNKS} chunks": {"remat": "selective", "chunk_rows": 65536 // CHUNKS},
    "xla": {"layer_implementation": "xla"},
    "fp8": {"projection": "fp8"},
    "fp8 gradient": {"projection": "fp8", "projection_gradient": "fp8"},
}
# TFLOP/s of others on these shapes, by the same count of model FLOPs.
QUOTED: dict[str, dict[str, float]] = {
    "8 x 8192 causal": {"Meta": 240, "NVIDIA": 476},
    "32 x 2048 causal": {"Meta": 299, "NVIDIA": 353},
    "4 x 16384 window 256": {"Meta": 302},
    "128 x 2630 causal": {"reference": 205, "best": 287},
}
SOURCES = {
    "Meta": "its layer of public PyTorch and Triton code, tuned, measured on an H200 before",
    "NVIDIA": "published for its layer at d1024, H4 x 256 on an H100, in recsys-examples",
    "reference": "published for the public HSTU benchmark",
    "best": "the fastest published for that benchmark",
}
WINDOW = "4 x 16384 window 256"
# Which modes are measured on which workload, and what of them.
CASES = [
    *((name, "none", "training") for name in WORKLOADS),
    *((WINDOW, mode, "training") for mode in ("fp8", "fp8 gradient", "xla")),
    *((WINDOW, mode, "inference") for mode in ("none", "fp8")),
    *((name, "selective", "training") for name in WORKLOADS),
    ("8 x 8192 causal", f"selective {CHUNKS} chunks", "training"),
]


def main(_: list[str]) -> None:
    chosen = FLAGS.workloads or list(WORKLOADS)
    if unknown := set(chosen) - set(WORKLOADS):
        raise ValueError(f"no workload is called {unknown}; there are {', '.join(WORKLOADS)}")
    cases = [
        case
        for case in CASES
        if case[0] in chosen and (FLAGS.modes is None or case[1] in FLAGS.modes)
    ]
    record = Record(FLAGS.record, grows=FLAGS.grows)
    tasks = [functools.partial(prepare, *case, small=FLAGS.small) for case in cases]
    found: dict[str, Json] = record.values.get("layers", {})
    record.add(quoted=QUOTED, quoted_from=SOURCES)
    if not FLAGS.small:
        record.add(matmul_TFLOP_a_second=matrix_product())
    results = turns.one_by_one(tasks, not FLAGS.small)
    for (name, mode, kind), result in zip(cases, results, strict=True):
        measured = {"error": str(result)} if isinstance(result, Exception) else result
        found[f"{name}, {mode}, {kind}"] = {"workload": name, "mode": mode, "kind": kind} | measured
        record.add(layers=found)
    show(found, ("ms", "TFLOP_a_second", "MFU", "bytes_a_token", "error"), "layer")


def matrix_product(size: int = 8192) -> float:
    """TFLOP/s of a product of two bfloat16 matrices, in this run."""
    x = jnp.ones((size, size), jnp.bfloat16)
    return device_time(jax.jit(jnp.matmul), x, x).tflops(2.0 * size**3)


def prepare(name: str, mode: str, kind: str, *, small: bool = False) -> Callable[[], Json]:
    """Compiles the two stacks of a case; the function that measures a layer."""
    workload, options = WORKLOADS[name], MODES[mode]
    if small:  # on a CPU
        workload = dataclasses.replace(workload, users=2, length=128, width=32, head_width=16)
        options = options | {"implementation": "xla", "chunk_rows": None}
    stacks = [stack(workload, options, kind, depth) for depth in workload.depths]
    profiled = name == WINDOW and mode in PROFILED and kind == "training" and not small
    return functools.partial(measure, workload, options, kind, stacks, profiled)


Stack = tuple[jax.stages.Compiled, Callable[[], tuple[nnx.State, jax.Array, jax.Array, Sequences]]]


def stack(workload: LayerShape, options: Json, kind: str, layers: int) -> Stack:
    """A compiled stack, and a function that makes its arguments."""
    return stack_of(workload.config(layers, options), workload.rows, kind)


def stack_of(config: Config, rows: int, kind: str = "training") -> Stack:
    """`stack` for any configuration."""
    dtype, length = jnp.dtype(config.model.dtype), min(config.data.max_history, rows)

    def build() -> HSTU:
        return HSTU.from_config(config.model, length, rngs=nnx.Rngs(0))

    graph = nnx.split(nnx.eval_shape(build))[0]

    def arguments() -> tuple[nnx.State, jax.Array, jax.Array, Sequences]:
        offsets = jnp.arange(rows // length + 1, dtype=jnp.int32) * length
        row_T = jnp.arange(rows, dtype=jnp.int32)
        arrays = jax.random.normal(jax.random.key(0), (2, rows, config.model.width))
        x_TD, g_TD = arrays.astype(dtype)
        sequences = Sequences(offsets, row_T < offsets[-1], row_T, row_T + 1)
        return nnx.split(build())[1], x_TD, g_TD, sequences

    def encode(
        params: nnx.State, x_TD: jax.Array, g_TD: jax.Array, sequences: Sequences
    ) -> jax.Array:
        return nnx.merge(graph, params)(x_TD, sequences)

    def loss(
        params: nnx.State, x_TD: jax.Array, g_TD: jax.Array, sequences: Sequences
    ) -> jax.Array:
        return jnp.sum((encode(params, x_TD, g_TD, sequences) * g_TD).astype(jnp.float32))

    run: Function = jax.grad(loss, argnums=(0, 1)) if kind == "training" else encode
    return jax.jit(run).lower(*jax.eval_shape(arguments)).compile(), arguments


def measure(
    workload: LayerShape, options: Json, kind: str, stacks: list[Stack], profiled: bool = False
) -> Json:
    """A layer: the difference of two stacks, divided; and of their profiles."""
    (shallow, deep), rows = workload.depths, workload.rows
    sizes = [temporaries(run) for run, _ in stacks]
    made = [jax.jit(arguments)() for _, arguments in stacks]
    # In turns: a device that has worked for a while is slower, and both stacks must meet that.
    samples = [
        [
            device_time(run, *each, repetitions=1, sample_seconds=0.04).seconds
            for (run, _), each in zip(stacks, made, strict=True)
        ]
        for _ in range(ROUNDS)
    ]
    seconds = [statistics.median(stack) for stack in zip(*samples, strict=True)]
    a_layer = (seconds[1] - seconds[0]) / (deep - shallow)
    counted = flops.count(workload.config(1, options), workload.length)
    forward = counted.projections + counted.attention
    work = forward if kind == "inference" else counted.training - counted.recomputed
    result = {
        "ms": 1e3 * a_layer,
        "stack_ms": [1e3 * each for each in seconds],
        "depths": [shallow, deep],
        "TFLOP": work * workload.users / 1e12,
        "TFLOP_a_second": work * workload.users / a_layer / 1e12,
        "MFU": mfu(work * workload.users / a_layer),
        "tokens_a_second": rows / a_layer,
        "bytes_a_token": (sizes[1] - sizes[0]) / (deep - shallow) / rows,
        "temporary_GiB": [size / 2**30 for size in sizes],
    }
    if not profiled:
        return result
    profiles = []
    for (run, _), each in zip(stacks, made, strict=True):
        steps = functools.partial(_several, run, each)
        profiles.append(profiling.profiled(steps, [run], steps=STEPS)[0])
    return result | {"kernels": difference(profiles[0], profiles[1], deep - shallow)}


def _several(run: Function, arguments: Sequence[PyTree]) -> list[PyTree]:
    return [run(*arguments) for _ in range(STEPS)]


def difference(shallow: profiling.Profile, deep: profiling.Profile, layers: int) -> list[Json]:
    """The kernels of a layer, the longest first: those that the deeper of two stacks has more."""
    sums: dict[tuple[str, str, str], list[float]] = {}
    for profile, sign in ((shallow, -1), (deep, 1)):
        for kernel in profile.kernels:
            found = sums.setdefault((kernel.kind, kernel.name, kernel.source), [0.0, 0.0])
            found[0] += sign * kernel.calls / layers
            found[1] += sign * 1e3 * kernel.seconds / layers
    kernels = [
        {"kind": kind, "name": name, "source": source, "calls": calls, "ms": ms}
        for (kind, name, source), (calls, ms) in sums.items()
        if abs(ms) >= LEAST_MS
    ]
    return sorted(kernels, key=lambda kernel: -kernel["ms"])


if __name__ == "__main__":
    flags.DEFINE_list("workloads", None, "names of workloads; all by default")
    flags.DEFINE_list("modes", None, "names of modes; all by default")
    flags.DEFINE_bool("grows", False, "keep what the record holds")
    flags.DEFINE_bool("small", False, "tiny sizes, here, for a look on a CPU")
    command.define_record()
    command.run(main)
