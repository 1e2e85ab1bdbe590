"""The Hopper kernels on rows and keys of two buffers, against `reference`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.hstu_attention.partial import partial_attention
from kernels.jagged import Rows
from kernels.mask import AttentionMask, KeyIntervals, RowIntervals

MASK = AttentionMask(window=200, full_rows=90, prefix=40)
OFFSETS, LENGTH = np.array([0, 900, 901, 2990], np.int32), 3000


@pytest.mark.parametrize("widths", [(64, 64), (128, 128), (256, 256), (128, 64)])
@pytest.mark.parametrize("own", [False, True], ids=["apart", "own keys"])
@pytest.mark.parametrize("num_keys", [1024, 1300])
def test_rows_and_keys_of_two_buffers(widths, own, num_keys):
    where = Rows.of(OFFSETS, LENGTH)
    keys, rows = MASK.keys_of(where), MASK.rows_of(where)
    num_rows, stop = LENGTH - num_keys, LENGTH if own else num_keys
    seen = KeyIntervals(*(jnp.clip(x[num_keys:], 0, stop) for x in keys))
    seen_by = RowIntervals(*(jnp.clip(x[:stop] - num_keys, 0, num_rows) for x in rows))
    rng = np.random.default_rng(0)
    draw = [(num_rows, widths[0]), (stop, widths[0]), (stop, widths[1]), (num_rows, widths[1])]
    q, k, v, g = (
        jnp.asarray(rng.standard_normal((n, 2, w), dtype=np.float32), jnp.bfloat16) for n, w in draw
    )
    scale = jnp.asarray(rng.uniform(0.01, 1, num_rows), jnp.float32)

    def run(implementation, *arrays):
        def attend(q, k, v):
            options = dict(
                alpha=0.1,
                scale=scale,
                own=(k[num_keys:], v[num_keys:]) if own else None,
                implementation=implementation,
            )
            return partial_attention(q, k[:num_keys], v[:num_keys], seen, seen_by, **options)

        out, pull = jax.vjp(attend, *arrays[:3])
        return out, *pull(arrays[3])

    got = jax.jit(lambda *x: run("mosaic", *x))(q, k, v, g)
    with jax.default_matmul_precision("float32"):
        wanted = jax.jit(lambda *x: run("reference", *x))(
            *(x.astype(jnp.float32) for x in (q, k, v, g))
        )
    for name, x, want in zip(("out", "dq", "dk", "dv"), got, wanted, strict=True):
        x, want = np.asarray(x, np.float64), np.asarray(want, np.float64)
        assert np.linalg.norm(want) > 0, name
        assert np.linalg.norm(x - want) < 5e-3 * np.linalg.norm(want), name
