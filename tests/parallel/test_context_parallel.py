"""Attention over sharded rows equals that of one device.

Every strategy, mask and gradient, on 8 CPU devices.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kernels.hstu_attention import RelativeBias, hstu_attention
from kernels.mask import AttentionMask
from tests.parallel.dataflow import waiting
from ultra_hstu.parallel import context_parallel_attention, make_mesh
from ultra_hstu.parallel import strategy as strategies
from ultra_hstu.parallel.context_attention import STRATEGIES
from ultra_hstu.parallel.layout import Layout
from ultra_hstu.parallel.reshard import reshard

ROWS, HEADS, WIDTH = 256, 8, 8
BATCHES = {  # lengths: empty ones, ones longer than a shard of 32 rows, padding behind
    "mixed": (0, 1, 7, 97, 60, 0, 25),
    "one": (256,),
    "short": (3,) * 30,
    "nothing": (0, 0),
}
MASKS = {
    "causal": AttentionMask(),
    "window": AttentionMask(window=9),
    "wide": AttentionMask(window=75),
    "full rows": AttentionMask(window=9, full_rows=6),
    "prefix": AttentionMask(window=9, prefix=6),
    "all": AttentionMask(window=20, full_rows=5, prefix=4, context_sink=False),
}


@functools.cache
def case(name):
    rng = np.random.default_rng(0)
    lengths = np.asarray(BATCHES[name], np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    arrays = {x: rng.standard_normal((ROWS, HEADS, WIDTH), dtype=np.float32) for x in "qkvg"}
    for x in "qkv":
        arrays[x][offsets[-1] :] = np.nan
    arrays["g"][offsets[-1] :] = 0
    counts = {
        "num_targets": np.minimum(lengths // 4, 5).astype(np.int32),
        "num_contextual": np.minimum(lengths // 5, 3).astype(np.int32),
    }
    return arrays, offsets, counts


def results(attend, arrays):
    """Output and gradients."""

    def run(q, k, v):
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(jnp.asarray(arrays["g"]))

    return [np.asarray(x) for x in jax.jit(run)(*(jnp.asarray(arrays[x]) for x in "qkv"))]


@functools.cache
def expected(name, mask, counted):
    arrays, offsets, counts = case(name)
    attend = functools.partial(
        hstu_attention,
        offsets=offsets,
        mask=MASKS[mask],
        alpha=0.3,
        scale=1 / 64,
        implementation="reference",
        **(counts if counted else {}),
    )
    return results(lambda q, k, v: attend(q, k, v), arrays)


def check(got, want):
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        np.testing.assert_allclose(
            a, b, atol=3e-6 * max(np.abs(b).max(), 1e-3), rtol=0, err_msg=name
        )


def sharded(strategy, name, mask, *, shards=8, layout=None, counted=True, **options):
    """Output and gradients with rows on several devices, in the order of the buffer."""
    arrays, offsets, counts = case(name)
    order = np.arange(ROWS) if layout is None else np.asarray(layout.permutation())
    attend = functools.partial(
        context_parallel_attention,
        offsets=offsets,
        mesh=make_mesh(8 // shards, shards),
        strategy=strategy,
        mask=MASKS[mask],
        alpha=0.3,
        layout=layout,
        **(counts if counted else {}),
        **({"scale": 1 / 64} | options),
    )
    got = results(attend, {x: array[order] for x, array in arrays.items()})
    return [x[np.argsort(order)] for x in got]


PAIRS = [
    (strategy, mask)
    for strategy in STRATEGIES
    for mask in MASKS
    if strategy != "halo" or MASKS[mask].windowed
]


@pytest.mark.parametrize("strategy, mask", PAIRS)
def test_equals_one_device(strategy, mask):
    """Eight shards of 32 rows.

    Empty sequences, sequences longer than a shard, a window that reaches over two neighbours.
    """
    # the dense implementation compiles several times faster than the blockwise one, which the other
    # tests run
    check(
        sharded(strategy, "mixed", mask, implementation="reference"), expected("mixed", mask, True)
    )


@pytest.mark.parametrize(
    "strategy, mask", [("gather", "causal"), ("ring", "causal"), ("halo", "full rows")]
)
def test_heads_in_turns(strategy, mask, monkeypatch):
    """Attention to many rows takes some heads at a time: two of eight here."""
    monkeypatch.setattr(strategies, "ROWS_AT_A_TIME", 2 * ROWS // 4)
    assert STRATEGIES[strategy].heads_of_a_call(Layout.contiguous(ROWS, 4), HEADS) == 2
    check(
        sharded(strategy, "mixed", mask, shards=4, implementation="reference"),
        expected("mixed", mask, True),
    )


@pytest.mark.parametrize("batch", ["one", "short", "nothing"])
@pytest.mark.parametrize(
    "strategy, mask",
    [("gather", "causal"), ("ring", "causal"), ("halo", "full rows"), ("halo", "all")],
)
def test_other_batches_without_targets(strategy, mask, batch):
    blockwise_or_dense = "xla" if batch == "short" else "reference"
    check(
        sharded(strategy, batch, mask, shards=4, counted=False, implementation=blockwise_or_dense),
        expected(batch, mask, False),
    )


@pytest.mark.parametrize("strategy", ["gather", "ring", "ulysses"])
def test_balanced_layout(strategy):
    """Rows dealt out in blocks give the same sums elsewhere."""
    layout = Layout.balanced(BATCHES["mixed"], MASKS["full rows"], ROWS, 4, 8)
    check(
        sharded(
            strategy, "mixed", "full rows", shards=4, layout=layout, implementation="reference"
        ),
        expected("mixed", "full rows", True),
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_scale_a_row(strategy):
    scale = np.random.default_rng(1).uniform(0.01, 1, ROWS).astype(np.float32)
    arrays, offsets, counts = case("mixed")
    scale[offsets[-1] :] = np.nan
    one = functools.partial(
        hstu_attention,
        offsets=offsets,
        mask=MASKS["window"],
        alpha=0.3,
        scale=scale,
        implementation="reference",
        **counts,
    )
    got = sharded(strategy, "mixed", "window", shards=4, scale=scale, implementation="reference")
    check(got, results(lambda q, k, v: one(q, k, v), arrays))


def test_ulysses_takes_the_relative_bias():
    arrays, offsets, _ = case("mixed")
    rng = np.random.default_rng(2)
    times = np.cumsum(rng.integers(1, 10**5, ROWS + 1)).astype(np.int32)
    tables = [jnp.asarray(rng.standard_normal(n, dtype=np.float32)) for n in (2 * ROWS - 1, 129)]
    mesh = make_mesh(context=8)

    def loss(attend, tables):
        bias = RelativeBias(*tables, jnp.asarray(times[:-1]), jnp.asarray(times[1:]))
        out = attend(
            *(jnp.asarray(arrays[x]) for x in "qkv"), offsets, alpha=0.3, scale=1 / 64, bias=bias
        )
        return jnp.sum(out * arrays["g"])

    many = functools.partial(context_parallel_attention, mesh=mesh, strategy="ulysses")
    one = functools.partial(hstu_attention, implementation="reference")
    for a, b in zip(
        *(
            jax.tree.leaves(jax.jit(jax.value_and_grad(lambda t, f=f: loss(f, t)))(tables))
            for f in (many, one)
        ),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_counts_may_be_traced():
    arrays, offsets, counts = case("mixed")
    mesh = make_mesh(context=8)

    def attend(q, k, v, offsets, targets, contextual, **options):
        return context_parallel_attention(
            q,
            k,
            v,
            offsets,
            mesh=mesh,
            strategy="halo",
            alpha=0.3,
            scale=1 / 64,
            implementation="reference",
            num_targets=targets,
            num_contextual=contextual,
            **({"mask": MASKS["all"]} | options),
        )

    inputs = [
        *(jnp.asarray(arrays[x]) for x in "qkv"),
        jnp.asarray(offsets),
        *(jnp.asarray(x) for x in counts.values()),
    ]
    with pytest.raises(ValueError, match="max_targets="):
        jax.jit(attend)(*inputs)
    got = jax.jit(functools.partial(attend, max_targets=5, max_contextual=3))(*inputs)
    np.testing.assert_allclose(got, expected("mixed", "all", True)[0], atol=1e-6)
    # more than the bound: no silent loss
    for bounds in (
        {"max_targets": 0, "max_contextual": 3},
        {"max_targets": 5, "max_contextual": 0},
    ):
        assert np.isnan(
            np.asarray(
                jax.jit(functools.partial(attend, mask=AttentionMask(window=3), **bounds))(*inputs)
            )
        ).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_outside_jit(strategy):
    """Output and gradients, on a mesh with two axes."""
    arrays, offsets, counts = case("mixed")
    attend = functools.partial(
        context_parallel_attention,
        offsets=offsets,
        mesh=make_mesh(data=2, context=4),
        strategy=strategy,
        mask=MASKS["full rows"],
        alpha=0.3,
        scale=1 / 64,
        implementation=["reference"],
        num_targets=counts["num_targets"].tolist(),
        num_contextual=counts["num_contextual"].tolist(),
    )
    out, pull = jax.vjp(attend, *(jnp.asarray(arrays[x]) for x in "qkv"))
    check([out, *pull(jnp.asarray(arrays["g"]))], expected("mixed", "full rows", True))


COLLECTIVE = re.compile(
    r"= (\([^)]*\)|\S+) "
    r"(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)
SHAPE = re.compile(r"\b(f32|bf16|s32|pred)\[([0-9,]*)\]")
BYTES = {"f32": 4, "bf16": 2, "s32": 4, "pred": 1}


def bytes_moved(rows, strategy, length=None):
    """What collectives of forward and backward put out on a shard, from the compiled program."""
    mesh = make_mesh(context=8)
    inputs = [
        jax.ShapeDtypeStruct(
            (rows, 8, 16), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("context"))
        )
    ] * 4
    offsets = np.asarray([0, rows // 2, rows], np.int32)
    attend = functools.partial(
        context_parallel_attention,
        offsets=offsets,
        mesh=mesh,
        strategy=strategy,
        mask=AttentionMask(window=16, full_rows=8),
        alpha=0.3,
        scale=1.0,
    )
    program = (
        jax.jit(lambda q, k, v, g: jax.vjp(attend, q, k, v)[1](g))
        .lower(*inputs)
        .compile()
        .as_text()
    )
    return sum(
        BYTES[dtype] * int(np.prod([int(n) for n in dims.split(",") if n]))
        for out, _ in COLLECTIVE.findall(program)
        for dtype, dims in SHAPE.findall(out)
    )


def test_halo_moves_what_does_not_depend_on_length():
    """Window 16 and B * full_rows = 16 rows, each with q or k and v of 8 x 16 floats.

    Forward and backward move a few times that.
    """
    short, long = bytes_moved(1024, "halo"), bytes_moved(8192, "halo")
    assert 0 < short == long
    row = 8 * 16 * 4
    forward = 2 * 16 + 2 * 16  # halo of k and v; visiting queries and their sums
    assert long <= 2 * forward * row
    assert bytes_moved(8192, "gather") > 20 * long


def order(strategy, mask, backward=False, **names):
    attend = functools.partial(
        context_parallel_attention,
        offsets=np.array([0, ROWS], np.int32),
        mesh=make_mesh(context=8),
        strategy=strategy,
        mask=MASKS[mask],
        alpha=1.0,
        scale=1.0,
        implementation="reference",
    )
    x = jnp.ones((ROWS, HEADS, WIDTH))
    return waiting(
        (lambda *a: jax.vjp(attend, *a)[1](a[0])) if backward else attend, x, x, x, **names
    )


def test_ring_sends_before_it_computes():
    """Transfers of keys and values wait for no product; transfers of gradients do."""
    transfers = {"source": "dot_general", "sink": "ppermute"}
    # The first transfer and the transfer of a loop step, each of keys and of values.
    assert order("ring", "causal", **transfers) == [False] * 4
    # The backward has two transfers before its loop and one in it, beside which gradients of the
    # step before are sent. Behind the loop, gradients wait for its last step, and gradients that go
    # home wait for the step after it.
    both = order("ring", "causal", backward=True, **transfers)
    assert (both.count(False), both.count(True)) == (12, 4)


@pytest.mark.parametrize("mask", ["window", "full rows"])
def test_halo_computes_while_it_receives(mask):
    """Scores and sums at home wait for nothing.

    Those at the edge wait for the halo, those of visiting rows for the rows.
    """
    products = {"sink": "dot_general"}
    home, visit, edge = [0, 0], [1, 1] if mask == "full rows" else [], [2, 2]
    assert order("halo", mask, source="ppermute", **products) == [
        place == 2 for place in (*home, *visit, *edge)
    ]
    assert order("halo", mask, source="psum", **products) == [
        place == 1 for place in (*home, *visit, *edge)
    ]
    assert order("gather", mask, source="all_gather", **products) == [True, True], (
        "the test can fail"
    )


def busiest(lengths, mask, layout):
    """Allowed (row, key) pairs of the busiest shard over the mean.

    Ring and gather compute a pair where its row is.
    """
    pairs = (
        mask.row_pairs(lengths, layout.num_rows)[np.asarray(layout.permutation())]
        .reshape(layout.shards, -1)
        .sum(1)
    )
    return pairs.max() / pairs.mean()


@pytest.mark.parametrize("seed", range(6))
def test_balance(seed):
    """Under skewed lengths (Zipf) the busiest shard of balanced blocks has at most 5 % too much.

    Contiguous slices do not come near.
    """
    rows, shards, rng, lengths = 65536, 8, np.random.default_rng(seed), []
    while sum(lengths) < rows:
        lengths.append(min(int(200 * rng.zipf(1.3)), 32768, rows - sum(lengths)))
    causal = AttentionMask()
    assert busiest(lengths, causal, Layout.balanced(lengths, causal, rows, shards)) <= 1.05
    assert busiest(lengths, causal, Layout.striped(rows, shards)) <= 1.10
    assert busiest(lengths, causal, Layout.contiguous(rows, shards)) > 1.2
    semi_local = AttentionMask(window=256)
    assert busiest(lengths, semi_local, Layout.contiguous(rows, shards)) <= 1.05


LAYOUTS = {
    "contiguous": Layout.contiguous(256, 8),
    "striped": Layout.striped(256, 8, 4),
    "balanced": Layout.balanced((100, 3, 90), AttentionMask(), 256, 8, 4),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name):
    layout = LAYOUTS[name]
    rows = np.stack([np.asarray(layout.rows(shard)) for shard in range(8)])
    np.testing.assert_array_equal(rows.reshape(-1), layout.permutation())
    np.testing.assert_array_equal(np.sort(rows.reshape(-1)), np.arange(256))
    for shard in range(8):
        assert (np.diff(rows[shard]) > 0).all()
        for row in (0, 1, 31, 32, 100, 255, 256):
            assert int(layout.index(row, shard)) == (rows[shard] < row).sum()


@pytest.mark.parametrize(
    "layout, message",
    [
        (Layout(ROWS, 8, 8, np.arange(32) // 3 % 8), "must hold the same number, 4"),
        (Layout(ROWS, 8, 8, np.arange(8)), "each of 32 blocks"),
        (Layout(ROWS, 8, 8, np.arange(32) % 9), "0 to 7"),
        (Layout(ROWS, 8, 24, np.arange(8)), "block=24 cannot be divided"),
        (Layout(ROWS, 8, 32, np.arange(8)[::-1]), "another order"),
    ],
)
def test_layouts_by_hand(layout, message):
    """What the strategies cannot use is refused, not computed into something else."""
    arrays, offsets, _ = case("mixed")
    mesh = make_mesh(context=8)
    options = dict(mesh=mesh, strategy="ring", alpha=1.0, scale=1.0, layout=layout)
    with pytest.raises(ValueError, match=message):
        context_parallel_attention(*(arrays[x] for x in "qkv"), offsets, **options)
    with pytest.raises(ValueError, match=message):
        reshard(arrays["q"], np.full(8, 32), num_rows=ROWS, mesh=mesh, layout=layout)


def test_bad_input():
    arrays, offsets, _ = case("mixed")
    q, k, v = (jnp.asarray(arrays[x]) for x in "qkv")
    mesh = make_mesh(context=8)

    def attend(q=q, k=k, v=v, mesh=mesh, **options):
        return context_parallel_attention(
            q,
            k,
            v,
            offsets,
            **({"mesh": mesh, "strategy": "ring", "alpha": 1.0, "scale": 1.0} | options),
        )

    with pytest.raises(ValueError, match="number of devices, 8"):
        make_mesh(3, 2)
    with pytest.raises(ValueError, match="T=250.*multiple of 8"):
        attend(*(x[:250] for x in (q, k, v)))
    with pytest.raises(ValueError, match="'halo'.*window"):
        attend(strategy="halo")
    with pytest.raises(ValueError, match="'halo'.*contiguous"):
        attend(strategy="halo", mask=AttentionMask(window=4), layout=Layout.striped(ROWS, 8, 8))
    with pytest.raises(ValueError, match="heads divisible by the 8 context shards, got 4"):
        attend(*(x[:, :4] for x in (q, k, v)), strategy="ulysses")
    with pytest.raises(ValueError, match="block=7"):
        Layout.striped(ROWS, 8, 7)
    with pytest.raises(ValueError, match="block=7"):
        Layout.balanced((3,), AttentionMask(), ROWS, 8, 7)
    with pytest.raises(ValueError, match="256 rows and 4 shards"):
        attend(layout=Layout.contiguous(ROWS, 4))
    with pytest.raises(ValueError, match="strategy='broadcast'.*ring"):
        attend(strategy="broadcast")
    with pytest.raises(ValueError, match="max_targets=1, but a sequence has 5"):
        attend(
            strategy="halo",
            mask=AttentionMask(window=4),
            num_targets=np.full(7, 5, np.int32),
            max_targets=1,
        )
    with pytest.raises(NotImplementedError, match="'ulysses'"):
        attend(bias=RelativeBias(jnp.zeros(2 * ROWS - 1), None, None, None))
    with pytest.raises(ValueError, match="none is 'context'"):
        attend(mesh=jax.make_mesh((8,), ("data",)))


def test_a_new_strategy_is_a_class_and_an_entry(monkeypatch):
    class Again(STRATEGIES["gather"]):
        pass

    monkeypatch.setitem(STRATEGIES, "again", Again)
    check(
        sharded("again", "short", "causal", implementation="reference"),
        expected("short", "causal", True),
    )
