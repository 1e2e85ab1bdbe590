"""The Hopper kernels on rows and keys of two buffers, in the interpreter, against `reference`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import device
from kernels.hstu_attention import AttentionSpec
from kernels.hstu_attention.mosaic import schedule
from kernels.hstu_attention.mosaic.backward import backward_config, gradients
from kernels.hstu_attention.mosaic.forward import ForwardConfig, forward
from kernels.hstu_attention.mosaic.padding import padded
from kernels.hstu_attention.partial import partial_attention, partial_plan
from kernels.jagged import Rows
from kernels.mask import AttentionMask, KeyIntervals, RowIntervals
from tests.kernels.mosaic_interpreter import interpreted

MASK = AttentionMask(window=30, full_rows=12, prefix=4)
OFFSETS, LENGTH = np.array([0, 90, 91, 240], np.int32), 245


@pytest.mark.parametrize(
    ("passes", "widths", "own", "num_keys", "row_scale"),
    [
        (1, (64, 64), False, 100, False),
        (2, (128, 128), True, 100, True),
        (1, (128, 256), True, 128, True),
    ],
    ids=["one pass", "two passes, own keys", "wide, own keys"],
)
def test_rows_and_keys_of_two_buffers(passes, widths, own, num_keys, row_scale, monkeypatch):
    """The last rows of a buffer against its first keys, and against themselves with `own`."""
    num_rows = LENGTH - num_keys
    stop = LENGTH if own else num_keys
    rng = np.random.default_rng(0)
    draw = [(num_rows, widths[0]), (stop, widths[0]), (stop, widths[1]), (num_rows, widths[1])]
    arrays = [
        jnp.asarray(rng.standard_normal((n, 1, w), dtype=np.float32), jnp.bfloat16) for n, w in draw
    ]
    scale = (
        jnp.asarray(rng.uniform(0.01, 1, num_rows), jnp.float32)
        if row_scale
        else jnp.float32(1 / 64)
    )

    def intervals(offsets):
        seen = KeyIntervals(
            *(jnp.clip(x[num_keys:], 0, stop) for x in MASK.intervals(offsets, LENGTH))
        )
        return seen, RowIntervals(
            *(
                jnp.clip(x[:stop] - num_keys, 0, num_rows)
                for x in MASK.rows_of(Rows.of(offsets, LENGTH))
            )
        )

    @jax.jit
    def expected(offsets, q, k, v, g):
        def plain(q, k, v):
            options = dict(
                alpha=0.1,
                scale=scale,
                own=(k[num_keys:], v[num_keys:]) if own else None,
                implementation="reference",
            )
            return partial_attention(q, k[:num_keys], v[:num_keys], *intervals(offsets), **options)

        out, pull = jax.vjp(plain, *(x.astype(jnp.float32) for x in (q, k, v)))
        return out, *pull(g.astype(jnp.float32))

    @jax.jit
    def computed(offsets, q, k, v, g):
        plan = partial_plan(*intervals(offsets), num_rows=num_rows, num_keys=num_keys, own=own)
        gap = plan.first_row - num_keys
        q, g = padded(q), padded(g)
        k, v = (padded(jnp.insert(x, np.full(gap, num_keys), 0, axis=0)) for x in (k, v))
        config = ForwardConfig(block_k=64, stages=2, q_slots=1)
        back = backward_config(AttentionSpec("bfloat16", 1, *widths), plan, passes)
        out = forward(q, k, v, plan, scale, 0.1, config)
        dq, *of_keys = gradients(q, k, v, g, plan, scale, 0.1, back)
        return (
            out,
            dq,
            *(jnp.delete(x, slice(num_keys, num_keys + gap), axis=0)[:stop] for x in of_keys),
        )

    # in one pass dQ is summed in memory, which the interpreter does not do atomically
    monkeypatch.setattr(schedule, "WORKERS", 1 if passes == 1 else 4)
    with interpreted(monkeypatch):
        got = computed(OFFSETS, *arrays)
    for name, x, want in zip(
        ("out", "dq", "dk", "dv"), got, expected(OFFSETS, *arrays), strict=True
    ):
        x, want = np.asarray(x[: want.shape[0]], np.float64), np.asarray(want, np.float64)
        assert np.linalg.norm(want) > 0, name
        assert np.linalg.norm(x - want) < 4e-3 * np.linalg.norm(want), name


@pytest.mark.parametrize(
    ("own", "width"), [(False, 64), (True, 256)], ids=["apart", "own keys, wide"]
)
def test_it_lowers(own, width, monkeypatch):
    """Through the dispatcher, as on a Hopper GPU.

    Forward and one-pass backward, and after each the sums of split tiles.
    """
    monkeypatch.setattr(device, "current", lambda: device.Device("gpu", "some GPU", (9, 0)))
    num_rows, num_keys = 500, 300

    def run(q, k, v, g, keys, rows):
        def attend(q, k, v):
            own_kv = (k[:num_rows], v[:num_rows]) if own else None
            return partial_attention(
                q,
                k[:num_keys],
                v[:num_keys],
                keys,
                rows,
                alpha=0.1,
                scale=1.0,
                own=own_kv,
                implementation="mosaic",
            )

        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(g)

    array = jax.ShapeDtypeStruct((num_rows, 2, width), jnp.bfloat16)
    end = jax.ShapeDtypeStruct((num_rows,), jnp.int32)
    seen_by = jax.ShapeDtypeStruct((num_keys,), jnp.int32)
    arguments = (array, array, array, array, KeyIntervals(*[end] * 4), RowIntervals(*[seen_by] * 6))
    text = jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu_v2") == 4
