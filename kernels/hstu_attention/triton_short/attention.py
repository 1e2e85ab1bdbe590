"""The implementation `short` of `hstu_attention` (jax-triton): short sequences, whole in a tile.

Where the caller promises that no sequence is long (`make_plan(longest=...)`), a program can hold a
sequence, or several: nothing is computed for pairs of different tiles, and one pass makes all
gradients, five products a pair, each gradient written once, with the same bits in every run. It
takes the relative bias, whose tables' gradients are added in any order.

Tiles of one causal sequence have kernels of their own, `halves.py`; all others take `kernels.py`.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import device, triton_call
from kernels.hstu_attention.plan import AttentionPlan, AttentionSpec, Derived
from kernels.hstu_attention.relative_bias import RelativeBias
from kernels.hstu_attention.triton.attention import (
    RowInputs,
    Tables,
    Tensors,
    bias_arrays,
    table_lengths,
    tables_and_rows,
)
from kernels.hstu_attention.triton.sizes import refusal, shared_kib
from kernels.hstu_attention.triton_short.sizes import HALVES, ShortSizes, find_sizes
from kernels.triton_call import padded
from kernels.typing import THK, THV, Scale

LONGEST, LONGEST_BIASED = 128, 256  # behind these, `mosaic` or `triton` is as fast
WIDEST = 64  # of heads
TABLE_COPIES = 1024
SHARED_KIB = 163


def unsupported(spec: AttentionSpec) -> str | None:
    """Why these calls cannot run on the current device, or None."""
    longest = LONGEST_BIASED if spec.biased else LONGEST
    if spec.longest is None or spec.longest > longest:
        return (
            f"short needs sequences of at most {longest} rows ({LONGEST_BIASED} with a relative "
            f"bias), the plan promises {spec.longest}; make it with make_plan(..., longest=...), "
            "or use 'triton'"
        )
    dtype = jnp.dtype(spec.dtype)
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"short takes bfloat16 or float16, got {dtype.name}; cast q, k, v or use 'triton'"
    if max(spec.k_width, spec.v_width) > WIDEST:
        return (
            f"short takes heads of width 1 to {WIDEST}, got K = {spec.k_width}, "
            f"V = {spec.v_width}; use 'mosaic' or 'triton'"
        )
    if spec.deterministic and spec.biased:
        return (
            "short sums gradients of bias tables in no fixed order, deterministic=True asks for "
            "one; use bias=None"
        )
    capability = device.current().compute_capability
    if capability is not None and shared_kib(capability) < SHARED_KIB:
        return (
            f"short needs {SHARED_KIB} KiB of shared memory for a program, {device.current().kind} "
            "has less; use 'triton'"
        )
    return refusal(spec, "short")


@dataclasses.dataclass(frozen=True)
class WholeTiles(Derived[Int[Array, " tiles"]]):
    """First rows of tiles of whole sequences, and the end of the last one.

    A tile has the sequences that begin in its share of the rows: so many rows that the last of them
    ends within `rows` of the first. Where a sequence may be more than half of a tile, each has one.
    """

    rows: int

    def share(self, plan: AttentionPlan) -> int:
        """Rows in which the sequences of a tile begin."""
        assert plan.longest is not None
        return self.rows - plan.longest + 1

    def one_each(self, plan: AttentionPlan) -> bool:
        """Whether a tile has one sequence."""
        return self.share(plan) <= self.rows // 2

    def make(self, plan: AttentionPlan) -> Int[Array, " tiles"]:
        assert plan.offsets is not None
        if self.one_each(plan):
            return plan.offsets
        share = self.share(plan)
        begin = jnp.arange(-(-plan.num_rows // share) + 1, dtype=jnp.int32) * share
        number = (plan.offsets[None, :] < begin[:, None]).sum(1, dtype=jnp.int32)
        return plan.offsets.at[number].get(mode="clip")


def prepare(plan: AttentionPlan, spec: AttentionSpec) -> AttentionPlan:
    """The plan with the tiles of these calls, made once for every layer."""
    tiles = [WholeTiles(each) for each in sorted({find_sizes(spec).tile})]
    return plan.storing(tiles, [plan.find(each) for each in tiles])


def attention(
    q_THK: THK,
    k_THK: THK,
    v_THV: THV,
    plan: AttentionPlan,
    *,
    alpha: float,
    scale: Scale,
    bias: RelativeBias | None,
    deterministic: bool = False,
) -> THV:
    """See `hstu_attention`. No gradient flows to `scale`."""
    if q_THK.size == 0 or plan.sequences == 0:
        return jnp.zeros_like(v_THV)
    _, heads, k_width = q_THK.shape
    spec = AttentionSpec(
        q_THK.dtype, heads, k_width, v_THV.shape[2], bias is not None, longest=plan.longest
    )
    sizes = HALVES if bias is None and in_halves(plan) else find_sizes(spec)
    call = ShortCall(alpha, triton_call.product_precision(), sizes)
    return forward(call, (q_THK, k_THK, v_THV), *tables_and_rows(plan, scale, bias))


def in_halves(plan: AttentionPlan) -> bool:
    """Whether kernels without a bias may cut tiles in halves: they read no intervals.

    A tile must have one sequence, and its rows see every row up to themselves: no window, and no
    targets and contextual tokens were named.
    """
    return plan.plain and not plan.mask.windowed and WholeTiles(HALVES.tile).one_each(plan)


@dataclasses.dataclass(frozen=True)
class ShortCall:
    """What of a call is static.

    Attributes:
      alpha: as in `hstu_attention`.
      precision: of products, in Triton's words.
      sizes: of the kernels.
    """

    alpha: float
    precision: str
    sizes: ShortSizes

    def pieces(self, rows: int) -> int:
        """Blocks of so many rows in a tile."""
        return -(-self.sizes.tile // rows)

    def copies(self, plan: AttentionPlan, heads: int) -> int:
        """How many copies of the tables' gradients there are.

        Each program has its own up to a number: adds to one address come one after another, and
        most gaps of time are in few buckets.
        """
        tiles = plan.find(WholeTiles(self.sizes.tile)).shape[0] - 1
        return min(TABLE_COPIES, tiles * self.pieces(self.sizes.backward.block_q) * heads)


Kernel = Literal["forward", "backward", "backward_in_parts"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def forward(call: ShortCall, qkv: Tensors, tables: Tables, rows: RowInputs) -> THV:
    v = qkv[2]
    outs = [jax.ShapeDtypeStruct(v.shape, v.dtype)]
    if call.sizes.halves:
        return _launch_halves("forward_halves", call, qkv, rows, outs)[0]
    return _launch("forward", call, qkv, tables, rows, outs)[0]


def _forward(
    call: ShortCall, qkv: Tensors, tables: Tables, rows: RowInputs
) -> tuple[THV, tuple[Tensors, Tables, RowInputs]]:
    return forward(call, qkv, tables, rows), (qkv, tables, rows)


def gradients(
    call: ShortCall, saved: tuple[Tensors, Tables, RowInputs], g: THV
) -> tuple[Tensors, Tables, None]:
    qkv, tables, rows = saved
    outs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in qkv]
    if call.sizes.halves:
        dq, dk, dv = _launch_halves("backward_halves", call, (*qkv, g), rows, outs)
        return (dq, dk, dv), (None, None), None
    positions, buckets = table_lengths(tables)
    d_tables = jax.ShapeDtypeStruct(
        (call.copies(rows.plan, qkv[0].shape[1]), positions + buckets)
        if positions + buckets
        else (1, 1),
        jnp.float32,
    )
    kernel: Kernel = "backward" if call.sizes.whole else "backward_in_parts"
    dq, dk, dv, copied = _launch(kernel, call, (*qkv, g), tables, rows, [*outs, d_tables])
    summed = copied.sum(0)
    return (
        (dq, dk, dv),
        (
            None if tables[0] is None else summed[:positions],
            None if tables[1] is None else summed[positions:],
        ),
        None,
    )


forward.defvjp(_forward, gradients)


def _launch(
    kernel: Kernel,
    call: ShortCall,
    tensors: tuple[Float[Array, "T H _"], ...],
    tables: Tables,
    rows: RowInputs,
    outs: list[jax.ShapeDtypeStruct],
) -> list[Array]:
    """Runs a kernel: a program for a head of a block of a tile's rows, or two.

    Args:
      tensors: q, k, v, and in the backward the output's gradient.
      outs: in the backward the last one is of the tables.
    """
    plan, forwards = rows.plan, kernel == "forward"
    sizes = call.sizes.forward if forwards else call.sizes.backward
    tiles = plan.find(WholeTiles(call.sizes.tile))
    positions, buckets = table_lengths(tables)
    pieces = call.pieces(sizes.block_q)
    programs = (tiles.shape[0] - 1) * tensors[0].shape[1] * pieces
    seen_by: tuple[Array, ...] = ()
    if kernel == "backward_in_parts":
        programs *= 2
        seen_by = (plan.rows.ctx_lo, plan.rows.ctx_hi, plan.rows.near_hi, plan.rows.tail_hi)
    constants = _constants(call, tensors, rows, sizes.block_q) | {
        "BK": sizes.block_k,
        "PIECES": pieces,
        "POSITIONS": positions,
        "BUCKETS": buckets,
        "PRECISION": call.precision,
    }
    return triton_call.launch(
        f"kernels.hstu_attention.triton_short.kernels:{kernel}",
        (*tensors, rows.scale, tiles, *plan.keys, *seen_by, *bias_arrays(tables, rows)),
        outs,
        programs=programs,
        warps=sizes.warps,
        stages=sizes.stages,
        constants=constants if forwards else constants | {"COPIES": outs[3].shape[0]},
        zeroed=() if forwards else (3,),
    )


def _launch_halves(
    kernel: Literal["forward_halves", "backward_halves"],
    call: ShortCall,
    tensors: tuple[Float[Array, "T H _"], ...],
    rows: RowInputs,
    outs: list[jax.ShapeDtypeStruct],
) -> list[Array]:
    """`_launch` for tiles of one causal sequence: a program for a head of a tile."""
    sizes = call.sizes.forward if kernel == "forward_halves" else call.sizes.backward
    tiles = rows.plan.find(WholeTiles(call.sizes.tile))
    return triton_call.launch(
        f"kernels.hstu_attention.triton_short.halves:{kernel}",
        (*tensors, rows.scale, tiles),
        outs,
        programs=(tiles.shape[0] - 1) * tensors[0].shape[1],
        warps=sizes.warps,
        stages=sizes.stages,
        constants=_constants(call, tensors, rows, sizes.block_q),
    )


def _constants(
    call: ShortCall, tensors: tuple[Float[Array, "T H _"], ...], rows: RowInputs, block_q: int
) -> dict[str, bool | int | float | str]:
    """What all kernels are compiled for."""
    (num_rows, heads, k_width), v_width = tensors[0].shape, tensors[2].shape[2]
    return {
        "T": num_rows,
        "H": heads,
        "K": k_width,
        "V": v_width,
        "WK": padded(k_width),
        "WV": padded(v_width),
        "BQ": block_q,
        "TILES": rows.plan.find(WholeTiles(call.sizes.tile)).shape[0] - 1,
        "ALPHA": call.alpha,
        "ROW_SCALE": rows.scale.ndim == 1,
        "APPROXIMATE": tensors[0].dtype == jnp.bfloat16,
    }
