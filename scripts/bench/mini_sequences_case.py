"""A case of the benchmark of mini-sequences: a model, what it keeps, and its training step."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax
from flax import nnx
from jaxtyping import PyTree

from experiments import configs
from experiments.record import Json
from scripts.bench.program import Program
from ultra_hstu.config import Config
from ultra_hstu.entry_updates import split
from ultra_hstu.fields import changed
from ultra_hstu.parallel.embedding_sharding import EmbeddingTable

CATALOGUE = 1_000_000  # items of a full softmax
SAMPLED = 20_000  # items of a sampled one, as of long_mst
CHUNK, HEAD_CHUNK = 4096, 512  # rows of a mini-sequence: of layers, and of a full softmax
QUICK = {"xla_backend_optimization_level": 0}  # of CPU programs that are only counted

TIGHT = 0.97  # of a memory that counts as full
COMPILES = 12

Mode = Literal["nothing", "selective", "mini-sequences", "both"]
MODES: tuple[Mode, ...] = ("nothing", "selective", "mini-sequences", "both")
Strategy = Literal["auto", "ring", "ulysses"]
STRATEGIES: tuple[Strategy, ...] = ("ring", "ulysses")  # of several devices
# long_mst, whose encoder has 8 layers of width 512, with 8 heads of 64, which 8 devices can divide.
HSTU: Json = {"heads": 8, "qk_width": 64, "v_width": 64}
FEED_FORWARD: Json = {"feed_forward": 2048}
# Two blocks and one head, as SASRec's own settings have; the feed-forward net is 4 x as wide.
SASREC: Json = {"kind": "sasrec", "layers": 2, "heads": 1, "ffn_width": 2048}
MODELS: dict[str, Json] = {
    "hstu": HSTU,
    "hstu_ffn": HSTU | FEED_FORWARD,
    "hstu_ffn_full": HSTU | FEED_FORWARD,
    "sasrec_full": SASREC,
}
SMALL: Json = {"width": 32, "layers": 1}  # what a CPU can train
SMALL_OF: dict[str, Json] = {"hstu": {"heads": 2, "qk_width": 16, "v_width": 16}, "sasrec": {}}


@dataclasses.dataclass(frozen=True)
class SequenceCase:
    """One training step on `users` histories of `length` events.

    Attributes:
      on_gpu: bfloat16 and the kernels for Hopper GPUs, else float32 and the attention for CPUs:
        the CPU compiler widens bfloat16, which would be counted as both.
    """

    model: str
    mode: Mode
    length: int
    users: int = 1
    context: int = 1
    strategy: Strategy = "auto"
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    tables: Literal["same", "rowwise_adagrad", "lazy_adam"] = "same"
    catalogue: int | None = None  # None: that of the model
    on_gpu: bool = False
    small: bool = False

    @property
    def devices(self) -> int:
        return self.context

    @property
    def full(self) -> bool:
        return self.model.endswith("_full")

    @property
    def rows(self) -> int:
        return self.users * self.length

    @property
    def step(self) -> int:
        """Of lengths: devices hold whole mini-sequences where there are such."""
        chunks = self.mode in ("mini-sequences", "both")
        return self.context * ((8 if self.small else CHUNK) if chunks else 8 if self.small else 256)

    @property
    def items(self) -> int:
        return self.catalogue or (200 if self.small else CATALOGUE if self.full else SAMPLED)

    @functools.cached_property
    def config(self) -> Config:
        model = MODELS[self.model] | {
            "dtype": "bfloat16" if self.on_gpu else "float32",
            "implementation": "mosaic" if self.on_gpu else "xla",
            "remat": "selective" if self.mode in ("selective", "both") else "none",
            "chunk_rows": None,
        }
        chunk, head = (8, 8) if self.small else (CHUNK, HEAD_CHUNK)
        if self.small:
            model |= SMALL | SMALL_OF[model.get("kind", "hstu")]
        if self.mode in ("mini-sequences", "both"):
            model["chunk_rows"] = chunk
        elif self.full:
            head = self.rows  # all logits at one time
        config = changed(
            configs.named("long_mst"),
            data={
                "max_history": self.length,
                "batch_users": self.users,
                "batch_tokens": self.rows,
            },
            model=model,
            loss={
                "kind": "full" if self.full else "sampled",
                "chunk_rows": head if self.full else chunk,
            },
            optim={"state_dtype": self.state_dtype, "tables": self.tables},
            parallel={
                "context": self.context,
                "strategy": self.strategy if self.context > 1 else "auto",
            },
        )
        config.validate()
        return config

    def compiled(
        self, devices: Sequence[jax.Device], options: dict[str, int] | None = None
    ) -> Program:
        """The step, compiled for these devices, which need not be here."""
        program = Program(self.config, self.items, devices)
        return program.compile(options if self.on_gpu else QUICK)


def bytes_by_part(program: Program) -> Json:
    """What a device holds, in bytes: all that the compiler counts, and its parts.

    Gradients are as large as the parameters; under `optim.tables`, those of tables' entries are
    among the rest. The rest is activations, and whatever else the compiler needs.
    """
    recipe, total = program.recipe, program.bytes()
    state = jax.eval_shape(lambda: recipe.init(0))

    def held(tree: PyTree) -> int:
        """Tables are divided among the devices, as `parallel.parameters` has it."""
        leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
        parts = {True: recipe.shards.devices, False: 1}
        return sum(
            sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(leaf))
            // parts[isinstance(leaf, EmbeddingTable)]
            for leaf in leaves
        )

    found = {
        "parameters": held(state.params),
        "optimizer": held(state.opt_state),
        "gradients": held(split(state.params, recipe.by_entries)[0]),
    }
    return {"bytes": total} | found | {"rest": total - sum(found.values())}


def nearly_longest(
    case: SequenceCase, budget: float, measure: Callable[[SequenceCase], Json], step: int
) -> Json:
    """A length, a multiple of `step`, whose training step fills `budget` bytes to 97 % at least.

    Where `step` is too coarse for that, the longest that fits.

    Args:
      case: its length is the first guess.
      measure: as `bytes_by_part`.

    Raises:
      ValueError: nothing that fits was found.
    """
    found: dict[int, Json] = {}
    length = max(case.length // step, 1) * step
    while len(found) < COMPILES and length not in found:
        found[length] = measure(dataclasses.replace(case, length=length))
        if TIGHT * budget <= found[length]["bytes"] <= budget:
            break
        # Near a full memory it grows as a power of the length: of its square with dense attention.
        sizes = {n: math.log(one["bytes"] / budget) for n, one in found.items()}
        near, *others = sorted(sizes, key=lambda n: abs(sizes[n]))
        # Of the others, one on the other side of the budget is the better neighbour.
        others.sort(key=lambda n: (sizes[n] < 0) == (sizes[near] < 0))
        power = 1.0
        for other in others[:1]:
            power = (sizes[other] - sizes[near]) / math.log(other / near)
        aim = math.log((1 + TIGHT) / 2) - sizes[near]
        growth = min(math.exp(aim / max(power, 0.3)), 8.0)
        length = max(int(near * growth) // step, 1) * step
    fitting = [n for n in found if found[n]["bytes"] <= budget]
    if not fitting:
        raise ValueError(f"no length of {case} fits into {budget:.0f} bytes: tried {sorted(found)}")
    longest = max(fitting)
    compiled = {str(n): one["bytes"] for n, one in found.items()}
    return {"longest": longest, "step": step, "compiled": compiled, "held": found[longest]}
