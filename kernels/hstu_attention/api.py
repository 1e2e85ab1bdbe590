"""HSTU attention over flat jagged buffers: the public function, its checks, its implementations."""

from collections.abc import Sequence
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from kernels import dispatch
from kernels.hstu_attention.plan import AttentionPlan, AttentionSpec, make_plan
from kernels.hstu_attention.relative_bias import RelativeBias
from kernels.mask import AttentionMask
from kernels.typing import QHK, QHV, SHK, SHV, THV, Unchecked

# `reference` runs only by name: its memory is O(T^2). So does `mosaic_fp8`: it rounds.
_OP = dispatch.Op[AttentionSpec](
    "hstu_attention",
    modules={
        "short": "kernels.hstu_attention.triton_short.attention",
        "mosaic": "kernels.hstu_attention.mosaic.attention",
        "mosaic_fp8": "kernels.hstu_attention.mosaic_fp8.attention",
        "triton": "kernels.hstu_attention.triton.attention",
        "xla": "kernels.hstu_attention.xla",
        "reference": "kernels.hstu_attention.reference",
    },
    order={"gpu": ("short", "mosaic", "triton", "xla")},
)


def implementations() -> dict[str, str]:
    """Names of the implementations, with their modules."""
    return dict(_OP.modules)


def hstu_attention(
    q_THK: Unchecked,
    k_THK: Unchecked,
    v_THV: Unchecked,
    offsets: Int[ArrayLike, "..."],
    *,
    mask: AttentionMask = AttentionMask(),  # noqa: B008 - frozen
    num_targets: Int[ArrayLike, "..."] | None = None,
    num_contextual: Int[ArrayLike, "..."] | None = None,
    alpha: float | int | np.generic | np.ndarray,
    scale: ArrayLike,
    bias: RelativeBias | None = None,
    implementation: str | Sequence[str] | None = None,
    plan: AttentionPlan | None = None,
    deterministic: bool = False,
) -> THV:
    """`o_t = scale_t * sum over allowed k of silu(alpha * q_t . k_k + bias_tk) * v_k`.

    HSTU, arXiv 2402.17152, equation 2; there is no softmax. Differentiable in q, k, v and the bias
    tables; sums are in float32 whatever the dtype of q, k, v, which the output has too. Rows of
    padding come out 0, get zero gradients, and may hold NaN.

    Args:
      q_THK, k_THK, v_THV: flat jagged buffers [T, H, K], [T, H, K], [T, H, V] of one dtype:
        float32, bfloat16 or float16.
      offsets: int32[B+1], ascending from 0; sequence b owns rows offsets[b]:offsets[b+1];
        offsets[B] <= T. Checked where concrete; a traced value that breaks this gives undefined
        results.
      mask: who attends to whom.
      num_targets, num_contextual: int32[B] or None; their sum at most the sequence's length
        (checked where concrete, clamped where traced).
      alpha: factor on the scores.
      scale: factor on the outputs, a constant (1 / N) or float[T], one a row. No gradient flows to
        it.
      bias: relative bias, added to the scores inside the SiLU.
      implementation: a name, which never falls back; a sequence, tried in order; None, the order
        of the platform.
      plan: of `make_plan` with the same mask and batch, which saves recomputing it in every layer;
        or of `plan_of_intervals`, for a mask of your own.
      deterministic: gradients with the same bits on every run. `mosaic` then makes that of q in a
        pass of its own; `triton` (with a bias) and `xla` on a GPU cannot. Outputs of the kernels,
        and everything on CPU, have the same bits anyhow.

    Raises:
      ValueError: inputs that no implementation could take.
      NotImplementedError: the named implementation cannot take these inputs, or none can; with the
        reasons.
    """
    check_tensors(q_THK, k_THK, v_THV)
    if q_THK.shape != k_THK.shape:
        raise ValueError(f"q {q_THK.shape} and k {k_THK.shape} must have the same shape [T, H, K]")
    if q_THK.shape[:2] != v_THV.shape[:2]:
        raise ValueError(f"v {v_THV.shape} must share rows and heads with q {q_THK.shape}")
    rows, heads, k_width = q_THK.shape
    _check_batch(offsets, rows, num_targets, num_contextual)
    factor = _checked_scale(scale, rows)
    if bias is not None:
        _check_bias(bias, rows)
    if plan is None:
        known = _concrete(offsets)
        longest = None if known is None else int(np.diff(known).max(initial=0))
        plan = make_plan(mask, offsets, rows, num_targets, num_contextual, longest)
    elif plan.num_rows != rows:
        raise ValueError(
            f"plan was made for {plan.num_rows} rows, q has {rows}; make it with "
            f"make_plan(..., num_rows={rows})"
        )
    elif plan.mask != mask:
        raise ValueError(
            f"plan was made for {plan.mask}, the call names {mask}; pass the same mask to both"
        )

    def run(module: ModuleType) -> Array:
        return module.attention(
            q_THK,
            k_THK,
            v_THV,
            plan,
            alpha=float(alpha),
            scale=factor,
            bias=bias,
            deterministic=deterministic,
        )

    spec = AttentionSpec(
        q_THK.dtype, heads, k_width, v_THV.shape[2], bias is not None, deterministic, plan.longest
    )
    return _OP.call(implementation, spec, run)


def attention_apart(
    q_QHK: QHK,
    k_SHK: SHK,
    v_SHV: SHV,
    plan: AttentionPlan,
    *,
    alpha: float,
    scale: ArrayLike,
    implementation: str | Sequence[str] | None,
) -> QHV:
    """`hstu_attention` of the rows from `plan.first_row` on, for `plan.num_keys` keys.

    Kernels that cannot tell rows from keys get zeros for what is missing.

    Args:
      scale: a constant or one value a row, [Q].
    """
    (num_rows, heads, k_width), first = q_QHK.shape, plan.first_row
    factor = _checked_scale(scale, num_rows)

    def run(module: ModuleType) -> Array:
        if getattr(module, "ROWS_APART", False):
            return module.attention(q_QHK, k_SHK, v_SHV, plan, alpha=alpha, scale=factor, bias=None)
        missing = plan.num_rows - plan.num_keys
        q = jnp.pad(q_QHK, ((first, 0), (0, 0), (0, 0)))
        k, v = (jnp.pad(x, ((0, missing), (0, 0), (0, 0))) for x in (k_SHK, v_SHV))
        factors = jnp.pad(factor, (first, 0)) if factor.ndim else factor
        return module.attention(q, k, v, plan.joined, alpha=alpha, scale=factors, bias=None)[first:]

    spec = AttentionSpec(q_QHK.dtype, heads, k_width, v_SHV.shape[2])
    return _OP.call(implementation, spec, run)


def prepare_plan(
    plan: AttentionPlan,
    spec: AttentionSpec,
    implementation: str | Sequence[str] | None = None,
) -> AttentionPlan:
    """The plan with what the implementation of such calls would otherwise make in each of them.

    Args:
      spec: of the calls.
      implementation: as in `hstu_attention`.
    """
    spec = spec._replace(longest=plan.longest)
    module = _OP.first_supported(implementation, spec)
    return plan if module is None else module.prepare(plan, spec)


def check_tensors(q: Unchecked, k: Unchecked, v: Unchecked) -> None:
    """ValueError where they are no heads of one dtype that attention takes."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3:
            raise ValueError(
                f"{name} must be [rows, H, width], got shape {x.shape}; "
                "a flat jagged buffer has no batch axis"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize not in (2, 4):
            raise ValueError(
                f"{name} has dtype {x.dtype}; cast it to float32, bfloat16 or float16, "
                "and a quantised cache back to one of them"
            )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v mix dtypes {q.dtype}, {k.dtype}, {v.dtype}; cast them to one")


def _concrete(x: ArrayLike | None) -> np.ndarray | None:
    return None if x is None or isinstance(x, jax.core.Tracer) else np.asarray(x)


def _check_batch(
    offsets: ArrayLike,
    rows: int,
    num_targets: ArrayLike | None,
    num_contextual: ArrayLike | None,
) -> None:
    if np.ndim(offsets) != 1 or np.shape(offsets)[0] < 1:
        raise ValueError(f"offsets must be int32[B+1], got shape {np.shape(offsets)}")
    batch = np.shape(offsets)[0] - 1
    counts = {"num_targets": num_targets, "num_contextual": num_contextual}
    for name, count in counts.items():
        if count is not None and np.shape(count) != (batch,):
            raise ValueError(
                f"{name} must be int32[B] with B = {batch} from offsets, "
                f"got shape {np.shape(count)}"
            )
    known = _concrete(offsets)
    if known is None:
        return
    lengths = np.diff(known)
    if known[0] != 0 or (lengths < 0).any():
        raise ValueError(
            f"offsets must start at 0 and never fall, got {known.tolist()[:20]}; "
            "they are cumulative lengths"
        )
    if known[-1] > rows:
        raise ValueError(
            f"offsets end at {known[-1]} but the buffers have only {rows} rows; "
            "raise the capacity T or drop sequences"
        )
    total = np.zeros(batch, np.int64)
    for name, count in counts.items():
        values = _concrete(count)
        if values is not None:
            if (values < 0).any():
                raise ValueError(
                    f"{name} must be >= 0, got {values.min()} for sequence {values.argmin()}"
                )
            total += values
    over = np.flatnonzero(total > lengths)
    if over.size:
        b = over[0]
        raise ValueError(
            f"sequence {b} has {lengths[b]} rows but {total[b]} targets and contextual tokens; "
            "lower num_targets or num_contextual"
        )


def _checked_scale(scale: ArrayLike, rows: int) -> Float[Array, "..."]:
    if np.shape(scale) not in ((), (rows,)):
        raise ValueError(
            f"scale must be a constant or one value a row, [{rows}], got shape {np.shape(scale)}"
        )
    return jax.lax.stop_gradient(jnp.asarray(scale, jnp.float32))


def _check_bias(bias: RelativeBias, rows: int) -> None:
    if bias.position_table is None and bias.time_table is None:
        raise ValueError(
            "RelativeBias needs position_table or time_table; pass bias=None for no bias"
        )
    for name in ("position_table", "time_table"):
        table = getattr(bias, name)
        if table is not None and (
            np.ndim(table) != 1 or not jnp.issubdtype(table.dtype, jnp.floating)
        ):
            raise ValueError(
                f"RelativeBias.{name} must be one-dimensional and floating, "
                f"got {table.dtype}{list(np.shape(table))}"
            )
    position = bias.position_table
    if position is not None and position.shape[0] % 2 == 0:
        raise ValueError(
            f"RelativeBias.position_table has an odd length 2N - 1, got {position.shape[0]}"
        )
    check_times(bias, keys=rows, queries=rows)


def check_times(bias: RelativeBias, *, keys: int, queries: int) -> None:
    """ValueError where a table of times lacks the times of so many keys and queries."""
    if bias.time_table is not None:
        for name, size in (("timestamps", keys), ("query_timestamps", queries)):
            times = getattr(bias, name)
            if times is None or np.shape(times) != (size,) or times.dtype != jnp.int32:
                got = "None" if times is None else f"{times.dtype}{list(np.shape(times))}"
                raise ValueError(f"RelativeBias.{name} must be int32[{size}] seconds, got {got}")
