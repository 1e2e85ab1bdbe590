"""Losses: parity with the public implementation, chunks, memory, padding, what log_q means."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from kernels import device
from kernels.sampled_softmax import xla
from tests import golden
from ultra_hstu.nn.norms import l2_normalize
from ultra_hstu.retrieval.loss import softmax_loss

PATHS = {"whole table": True, "gathered": False}


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Runs a test with both ways to score negatives; another test has the rule that chooses."""
    monkeypatch.setattr(
        xla, "whole_table_is_cheaper", lambda items, negatives: PATHS[request.param]
    )


@pytest.mark.parametrize(
    "case", ["local", "local_weighted", "local_no_l2", "in_batch", "in_batch_no_dedup"]
)
def test_golden(case, path):
    data = golden.load("sampled_softmax")
    lengths = data["lengths"]
    kind = "frac" if case in ("local_weighted", "in_batch_no_dedup") else "ones"
    rows = 13  # 11 positions and padding, which holds NaN
    flat = functools.partial(golden.flatten, lengths=lengths, rows=rows)
    h = np.where(np.arange(rows)[:, None] < lengths.sum(), flat(data["x"]), np.nan)
    positive, weight, negative = (
        flat(data["past_ids"][:, 1:]),
        flat(data[f"weights_{kind}"]),
        flat(data[f"{case}/negative_ids"]),
    )

    def run(h, table, weight):
        return softmax_loss(
            h,
            table,
            jnp.asarray(positive),
            weight,
            jnp.asarray(negative),
            temperature=0.05,
            l2_normalize=case != "local_no_l2",
            chunk_rows=4,
        )

    table = jnp.asarray(data["item_table"])
    (loss, per_row), (dh, dtable) = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(
        jnp.asarray(h), table, jnp.asarray(weight)
    )
    golden.assert_close(loss, data[f"{case}/loss"], 1e-5, "loss")
    expected = flat(data[f"{case}/per_position"])
    golden.assert_close(per_row, np.where(weight > 0, expected, 0), 1e-5, "per_position")
    golden.assert_close(
        run(jnp.asarray(h), table, jnp.asarray(weight))[0],
        data[f"{case}/loss"],
        1e-5,
        "loss without gradients",
    )
    golden.assert_close(dh, flat(data[f"{case}/grad/x"]), 1e-5, "grad/x")
    golden.assert_close(dtable, data[f"{case}/grad/item_table"], 1e-5, "grad/item_table")
    assert np.all(np.asarray(dtable[0]) == 0)


def naive_sampled(h, table, positive, weight, negative, *, temperature, normalize, log_q=None):
    """The definition, with all logits at once."""
    if normalize:
        h, table = l2_normalize(h), l2_normalize(table)
    ids = jnp.concatenate([positive[:, None], negative], axis=1)
    logits = jnp.einsum("td,trd->tr", h, table[ids], precision="highest") / temperature
    if log_q is not None:
        logits = logits.at[:, 1:].add(-(log_q[negative] + jnp.log(negative.shape[1])))
    logits = logits.at[:, 1:].set(jnp.where(negative == positive[:, None], -5e4, logits[:, 1:]))
    return jnp.sum(weight * -jax.nn.log_softmax(logits)[:, 0]) / jnp.sum(weight)


def naive_full(h, table, positive, weight, *, temperature, normalize):
    if normalize:
        h, table = l2_normalize(h), l2_normalize(table)
    logits = jnp.matmul(h, table.T, precision="highest")[:, 1:] / temperature
    return jnp.sum(
        weight * -jax.nn.log_softmax(logits)[jnp.arange(h.shape[0]), positive - 1]
    ) / jnp.sum(weight)


ROWS, ITEMS, WIDTH, NEGATIVES = 37, 23, 6, 9


def problem(seed=0):
    """Rows with weights of 0 among them and behind them, repeated negatives and collisions."""
    rng = np.random.default_rng(seed)
    h = jnp.asarray(rng.normal(size=(ROWS, WIDTH)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(ITEMS + 1, WIDTH)), jnp.float32)
    positive = jnp.asarray(rng.integers(1, ITEMS + 1, ROWS), jnp.int32)
    weight = rng.random(ROWS) * (rng.random(ROWS) > 0.2) * (np.arange(ROWS) < 30)
    negative = jnp.asarray(rng.integers(1, ITEMS + 1, (ROWS, NEGATIVES)), jnp.int32)
    return h, table, positive, jnp.asarray(weight, jnp.float32), negative


@pytest.mark.parametrize("chunk_rows", [1, 7, 16, 30, 37, 1000])
@pytest.mark.parametrize("kind", ["whole table", "gathered", "log_q", "full"])
def test_chunked_equals_unchunked(kind, chunk_rows, monkeypatch):
    """Values and gradients, of weights too, are those of the definition for any chunk and tail."""
    monkeypatch.setattr(xla, "whole_table_is_cheaper", lambda *_: kind != "gathered")
    h, table, positive, weight, negative = problem()
    log_q = jnp.log(jnp.arange(1.0, ITEMS + 2) / 300) if kind == "log_q" else None
    options = dict(temperature=0.3, l2_normalize=kind != "gathered", chunk_rows=chunk_rows)

    def ours(h, table, weight):
        if kind == "full":
            return softmax_loss(h, table, positive, weight, **options)[0]
        return softmax_loss(h, table, positive, weight, negative, log_q=log_q, **options)[0]

    def definition(h, table, weight):
        if kind == "full":
            return naive_full(h, table, positive, weight, temperature=0.3, normalize=True)
        return naive_sampled(
            h,
            table,
            positive,
            weight,
            negative,
            temperature=0.3,
            normalize=options["l2_normalize"],
            log_q=log_q,
        )

    found = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2)))(h, table, weight)
    expected = jax.jit(jax.value_and_grad(definition, argnums=(0, 1, 2)))(h, table, weight)
    golden.assert_close(found[0], np.asarray(expected[0]), 1e-6, "loss")
    counts = np.asarray(weight) > 0
    for name, a, b in zip(("h", "table", "weight"), found[1], expected[1], strict=True):
        b = (
            np.where(counts, b, 0) if name == "weight" else np.asarray(b)
        )  # a weight of 0 marks padding, whose gradient is defined as 0
        golden.assert_close(a, b, 1e-5, name)


@pytest.mark.parametrize("kind", ["whole table", "gathered", "full"])
def test_padding_may_hold_anything(kind, monkeypatch):
    """NaN and wild ids in rows of weight 0 change nothing, bit for bit."""
    monkeypatch.setattr(xla, "whole_table_is_cheaper", lambda *_: kind == "whole table")
    h, table, positive, weight, negative = problem()
    padding = weight == 0

    def run(h, positive, negative):
        options = dict(temperature=0.1, l2_normalize=True, chunk_rows=8)
        if kind == "full":
            return jax.value_and_grad(
                lambda h, e: softmax_loss(h, e, positive, weight, **options)[0], argnums=(0, 1)
            )(h, table)
        return jax.value_and_grad(
            lambda h, e: softmax_loss(h, e, positive, weight, negative, **options)[0],
            argnums=(0, 1),
        )(h, table)

    clean = run(h, positive, negative)
    dirty = run(
        jnp.where(padding[:, None], jnp.nan, h),
        jnp.where(padding, 10**6, positive),
        jnp.where(padding[:, None], -(10**6), negative),
    )
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_row_counts():
    h, table, positive, weight, negative = problem()
    options = dict(temperature=0.1, l2_normalize=True, chunk_rows=8)
    loss, grads = jax.value_and_grad(
        lambda h: softmax_loss(h, table, positive, 0 * weight, negative, **options)[0]
    )(h)
    assert loss == 0 and np.all(np.asarray(grads) == 0)


def test_zero_rows_have_finite_gradients():
    """The L2 norm of a row of zeros: its square root alone would give NaN."""
    grads = jax.grad(lambda x: jnp.sum(l2_normalize(x) ** 2 + l2_normalize(x)))(jnp.zeros((2, 4)))
    np.testing.assert_allclose(grads, 1e6, rtol=1e-6)
    h, table, positive, weight, negative = problem()
    options = dict(temperature=0.1, l2_normalize=True, chunk_rows=8)
    grads = jax.grad(
        lambda h, e: softmax_loss(h, e, positive, weight, negative, **options)[0], argnums=(0, 1)
    )(h.at[0].set(0), table.at[3].set(0))
    assert all(np.all(np.isfinite(g)) for g in grads)


def test_log_q_makes_sampled_tend_to_full():
    """Negatives of a skewed distribution estimate the full softmax with log_q, and not without."""
    rng = np.random.default_rng(1)
    h, table, positive, _, _ = problem()
    h, positive = h[:8], positive[:8]
    q = np.arange(1.0, ITEMS + 1)
    q /= q.sum()
    negative = jnp.asarray(rng.choice(ITEMS, size=(8, 100_000), p=q) + 1, jnp.int32)
    log_q = jnp.asarray(np.log(np.concatenate([[1.0], q])), jnp.float32)
    options = dict(temperature=0.5, l2_normalize=True, chunk_rows=4)
    full = softmax_loss(h, table, positive, jnp.ones(8), **options)[1]
    corrected = softmax_loss(h, table, positive, jnp.ones(8), negative, log_q=log_q, **options)[1]
    plain = softmax_loss(h, table, positive, jnp.ones(8), negative, **options)[1]
    np.testing.assert_allclose(corrected, full, atol=0.02)
    assert np.min(np.abs(plain - full)) > 1


def test_low_precision_inputs():
    h, table, positive, weight, negative = problem()
    options = dict(temperature=0.3, l2_normalize=True, chunk_rows=8)
    run = lambda h, table: softmax_loss(h, table, positive, weight, negative, **options)[0]  # noqa: E731
    rounded = h.astype(jnp.bfloat16)
    loss, (dh, dtable) = jax.value_and_grad(run, argnums=(0, 1))(rounded, table)
    assert loss.dtype == jnp.float32 and dh.dtype == jnp.bfloat16 and dtable.dtype == jnp.float32
    np.testing.assert_allclose(loss, run(rounded.astype(jnp.float32), table), rtol=2e-3)


def shapes_of(jaxpr):
    """Shapes of all values of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield from (
            v.aval.shape for v in equation.outvars if jnp.issubdtype(v.aval.dtype, jnp.floating)
        )
        for inner in jaxprs_in_params(equation.params):
            yield from shapes_of(inner)


@pytest.mark.parametrize("kind", ["whole table", "gathered", "full"])
def test_logits_never_exist_at_full_size(kind, monkeypatch):
    """The gradient's program has no float array [T, R] or [T, I]; memory does not grow with T."""
    monkeypatch.setattr(xla, "whole_table_is_cheaper", lambda *_: kind == "whole table")
    negatives, items, width, chunk = 32, 200, 4, 64

    def compiled(rows):
        def loss(h, table, positive, weight, negative):
            options = dict(temperature=0.1, l2_normalize=False, chunk_rows=chunk)
            if kind == "full":
                return softmax_loss(h, table, positive, weight, **options)[0]
            return softmax_loss(h, table, positive, weight, negative, **options)[0]

        def spec(dtype, *shape):
            return jax.ShapeDtypeStruct(shape, dtype)

        f32, i32 = jnp.float32, jnp.int32
        args = (
            spec(f32, rows, width),
            spec(f32, items + 1, width),
            spec(i32, rows),
            spec(f32, rows),
            spec(i32, rows, negatives),
        )
        traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(*args)
        sizes = [int(np.prod(shape)) for shape in shapes_of(traced.jaxpr.jaxpr)]
        assert max(sizes) <= max(
            rows * width, chunk * (items + 1), chunk * (negatives + 1) * width
        ), max(sizes)
        assert any(chunk in shape for shape in shapes_of(traced.jaxpr.jaxpr))
        return traced.lower().compile().memory_analysis().temp_size_in_bytes

    more_rows = 16384 - 4096
    logits = 4 * more_rows * (items if kind == "full" else negatives)
    assert compiled(16384) - compiled(4096) < logits / 2


def test_the_rule_that_chooses(monkeypatch):
    gathered_on = {}
    for platform in ("cpu", "gpu"):
        monkeypatch.setattr(device, "current", lambda p=platform: device.Device(p, p, None))
        # MovieLens-1M, MovieLens-20M, Amazon Books, and few items
        cases = ((3884, 128), (27279, 128), (695763, 512), (1000, 128))
        gathered_on[platform] = [not xla.whole_table_is_cheaper(*case) for case in cases]
    assert gathered_on == {"cpu": [True, True, True, False], "gpu": [False, True, True, False]}


@pytest.mark.parametrize(
    "bad", [dict(chunk_rows=0), dict(temperature=0.0), dict(temperature=float("nan"))]
)
def test_bad_options(bad):
    h, table, positive, weight, negative = problem()
    options = dict(temperature=0.1, l2_normalize=True, chunk_rows=8) | bad
    with pytest.raises(ValueError, match=next(iter(bad))):
        softmax_loss(h, table, positive, weight, negative, **options)
    with pytest.raises(ValueError, match=next(iter(bad))):
        softmax_loss(h, table, positive, weight, **options)
