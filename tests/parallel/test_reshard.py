"""Batches read by each device become one shared buffer.

Rows and gradients are those of a concatenation, bytes are few, nothing is lost in silence.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ultra_hstu.parallel.collectives import collectives
from ultra_hstu.parallel.layout import Layout
from ultra_hstu.parallel.mesh import make_mesh
from ultra_hstu.parallel.reshard import LOST, gather_then_slice, needed_capacity, reshard, to_shared

SHARDS, LOCAL, ROWS, WIDTH = 8, 40, 256, 4
MESH = make_mesh(context=SHARDS)
LENGTHS = {  # three sequences a device
    "even": np.full((SHARDS, 3), 10),
    "mixed": np.array(
        [
            [0, 0, 0],
            [40, 0, 0],
            [1, 20, 2],
            [13, 13, 13],
            [0, 1, 0],
            [30, 5, 5],
            [7, 0, 33],
            [10, 10, 10],
        ]
    ),
    "late": np.array([[0, 0, 0]] * 6 + [[40, 0, 0], [0, 20, 20]]),
    "nothing": np.zeros((SHARDS, 3), int),
}
LAYOUTS = {"slices": Layout.contiguous(ROWS, SHARDS), "blocks": Layout.striped(ROWS, SHARDS, 4)}


def own_rows(name):
    """What every device read, NaN behind its last row, and what the shared buffer should hold."""
    lengths = LENGTHS[name]
    rng = np.random.default_rng(0)
    x, ids = (
        rng.standard_normal((SHARDS, LOCAL, WIDTH), dtype=np.float32),
        rng.integers(1, 99, (SHARDS, LOCAL)).astype(np.int32),
    )
    totals = lengths.sum(1)
    for device, total in enumerate(totals):
        x[device, total:] = np.nan
    used = np.arange(LOCAL)[None] < totals[:, None]
    pad = ROWS - totals.sum()
    return (x.reshape(-1, WIDTH), ids.reshape(-1)), (
        np.pad(x[used], ((0, pad), (0, 0))),
        np.pad(ids[used], (0, pad)),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LENGTHS)
def test_equals_the_rows_in_a_row(name, layout):
    values, expected = own_rows(name)
    shared = reshard(
        values, LENGTHS[name].reshape(-1), num_rows=ROWS, mesh=MESH, layout=LAYOUTS[layout]
    )
    order = np.asarray(LAYOUTS[layout].permutation())
    for got, want in zip(shared.values, expected, strict=True):
        np.testing.assert_array_equal(got, want[order])
    np.testing.assert_array_equal(shared.offsets, np.concatenate([[0], np.cumsum(LENGTHS[name])]))
    assert bool(shared.fits)


def over_devices(function, *inputs):
    rows = PartitionSpec("context")
    return jax.jit(
        jax.shard_map(function, mesh=MESH, in_specs=rows, out_specs=rows, check_vma=False)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_and_the_baseline(layout):
    (x, _), _ = own_rows("mixed")
    weights = np.random.default_rng(1).standard_normal((ROWS, WIDTH)).astype(np.float32)
    lengths, where = jnp.asarray(LENGTHS["mixed"].reshape(-1), jnp.int32), LAYOUTS[layout]
    capacity = needed_capacity(lengths, where)

    def with_gradient(move):
        def run(x, lengths, weights):
            return move(x, lengths), jax.grad(lambda x: jnp.sum(move(x, lengths) * weights))(x)

        return over_devices(run)(jnp.asarray(x), lengths, weights)

    moved, gradient = with_gradient(
        lambda x, lengths: to_shared(x, lengths, where, capacity).values
    )
    gathered, expected = with_gradient(
        lambda x, lengths: gather_then_slice(x, lengths, where).values
    )
    np.testing.assert_array_equal(moved, gathered)
    np.testing.assert_array_equal(gradient, expected)
    totals = LENGTHS["mixed"].sum(1)
    used = (np.arange(LOCAL)[None] < totals[:, None]).reshape(-1)
    natural = weights[np.argsort(np.asarray(where.permutation()))]
    np.testing.assert_array_equal(np.asarray(gradient)[used], natural[: totals.sum()])
    assert not np.asarray(gradient)[~used].any()


def test_bytes():
    """A device sends what sticks out of its slice, here an eighth of its rows at most.

    The baseline sends all rows to all.
    """
    rows, width, where = 8 * 1024, 64, Layout.contiguous(8 * 1024, SHARDS)
    lengths = np.array([1024, 960, 1024, 1088, 1024, 1024, 960, 1088])
    capacity = needed_capacity(lengths, where)
    assert capacity == 64

    def sent(move):
        inputs = [
            jax.ShapeDtypeStruct((SHARDS * 1152, width), jnp.float32),
            jax.ShapeDtypeStruct((SHARDS,), jnp.int32),
        ]
        inputs = [
            jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=NamedSharding(MESH, PartitionSpec("context"))
            )
            for x in inputs
        ]
        program = over_devices(lambda x, lengths: move(x, lengths).values).lower(*inputs).compile()
        found = [one for one in collectives(program.as_text(), SHARDS) if one.elements >= width]
        return (
            {one.kind for one in found},
            sum(one.bytes for one in found),
            program.memory_analysis().temp_size_in_bytes,
        )

    kinds, few, small = sent(lambda x, lengths: to_shared(x, lengths, where, capacity))
    assert kinds == {"all-to-all"} and few == 7 * capacity * width * 4
    kinds, many, big = sent(lambda x, lengths: gather_then_slice(x, lengths, where))
    assert kinds == {"all-gather"} and many == 7 * 1152 * width * 4
    assert big > rows * width * 4 and small < 0.6 * big


def test_too_little_room():
    values, _ = own_rows("mixed")
    lengths = LENGTHS["mixed"].reshape(-1)
    where = LAYOUTS["slices"]
    needed = needed_capacity(lengths, where)
    with pytest.raises(
        ValueError, match=f"capacity={needed - 1} rows .* this batch needs {needed}"
    ):
        reshard(values, lengths, num_rows=ROWS, mesh=MESH, capacity=needed - 1)
    with pytest.raises(
        ValueError,
        match="have 213 rows together, more than the shared buffer's 200: raise num_rows",
    ):
        reshard(values, lengths, num_rows=200, mesh=MESH)
    with pytest.raises(ValueError, match="T=250.*multiple of 8"):
        reshard(values, lengths, num_rows=250, mesh=MESH)
    with pytest.raises(ValueError, match="pass capacity="):
        jax.jit(lambda lengths: reshard(values, lengths, num_rows=ROWS, mesh=MESH))(lengths)
    traced = jax.jit(
        lambda lengths, capacity: reshard(
            values, lengths, num_rows=ROWS, mesh=MESH, capacity=capacity
        ),
        static_argnums=1,
    )
    x, ids = traced(lengths, needed - 1).values
    assert np.isnan(x).all() and (np.asarray(ids) == LOST).all()
    good = traced(lengths, needed)
    assert bool(good.fits) and np.isfinite(good.values[0]).all()
    small = jax.jit(lambda lengths: reshard(values, lengths, num_rows=200, mesh=MESH, capacity=40))(
        lengths
    )
    assert not bool(small.fits) and np.isnan(small.values[0]).all()
