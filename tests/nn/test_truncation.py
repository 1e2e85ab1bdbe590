"""Attention truncation against a definition that works on one sequence at a time, and its
properties on whole batches.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels.mask import AttentionMask
from tests.golden import assert_close
from tests.kernels.test_mask import allowed
from tests.nn import small_encoder
from tests.nn.small_encoder import LENGTH, ROWS, SEQUENCES, WIDTH, batch, inputs
from ultra_hstu.config import Config, DataConfig, LossConfig, ModelConfig
from ultra_hstu.nn.truncation import Truncation
from ultra_hstu.retrieval.batch import Events, HistoryGather
from ultra_hstu.retrieval.loss import softmax_loss
from ultra_hstu.retrieval.recipe import Recipe
from ultra_hstu.sequences import Sequences

KEEP = 5  # L'
LAYERS, SLOTS = 2, 5


def encoder(**options):
    return small_encoder.encoder(**{"truncate_after": 1, "truncate_length": KEEP} | options)


def kept_rows(cut):
    return np.asarray(cut.row_T) < cut.sequences.num_rows


def whole_encoder(**options):
    return small_encoder.encoder(**options)


def norm(x, weight, bias):
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return (
        centred / jnp.sqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-6) * weight[None]
        + bias[None]
    )


def dense_layer(layer, x, mask, c, h, m, divisor):
    """The production layer on one sequence [n, D], with a mask matrix filled in row by row."""
    n, heads = len(x), layer.heads
    seen = np.array(
        [[allowed(mask, p, k, c, h, m) for k in range(n)] for p in range(n)], np.float32
    ).reshape(n, n)
    uvqk = (
        norm(x, layer.input_norm_weight[...], layer.input_norm_bias[...]) @ layer.uvqk[...]
        + layer.uvqk_bias[...][None]
    )
    u, v, q, k = jnp.split(uvqk, np.cumsum([12, 12, 8]), axis=1)
    u, (q, k, v) = jax.nn.silu(u), (part.reshape(n, heads, -1) for part in (q, k, v))
    weight = jax.nn.silu(jnp.einsum("qhd,khd->hqk", q, k) / 2) * seen[None] / divisor
    a = jnp.einsum("hqk,khd->qhd", weight, v).reshape(n, -1)
    y = jnp.concatenate(
        [u, a, u * norm(a, layer.output_norm_weight[...], layer.output_norm_bias[...])], axis=1
    )
    return x + y @ layer.output[...]


def divided_by(divide_by, c, h, above, keep):
    """What attention is divided by in a sequence of so many rows."""
    if divide_by == "length":
        return max(c + h, 1)
    return keep + SLOTS if above and divide_by == "kept" else LENGTH


def by_sequence(built, x_TD, parts, masks, after, keep):
    """One sequence after another, cut by slicing lists; rows that are dropped give 0."""
    out_TD, start = jnp.zeros_like(x_TD), 0
    for c, h, m in parts:
        rows = np.arange(start, start + c + h + m)
        start += c + h + m
        x = x_TD[rows]
        for number, (layer, mask) in enumerate(zip(built.layers, masks, strict=True)):
            if number == after:
                left = [*range(c), *range(c, c + h)[-keep:], *range(c + h, c + h + m)]
                x, rows, h = x[np.array(left, int)], rows[left], min(h, keep)
            divisor = divided_by(built.divisor.by, c, h, number >= after, keep)
            x = dense_layer(layer, x, mask, c, h, m, divisor) if len(rows) else x
        out_TD = out_TD.at[rows].set(x)
    return out_TD


MASKS = {  # of the layer below the truncation, and of the one above
    "causal": {"window": (3, -1), "full_rows": (2, 0)},
    "window": {"window": (-1, 2), "prefix": (0, 0)},
    "full rows": {"window": (2,), "full_rows": (3,)},
    "prefix": {"window": (1,), "prefix": (0, 3)},
}
DIVISORS = {"window": "kept", "full rows": "length", "prefix": "length"}  # else constant


def masks_of(options):
    each = []
    for number in range(LAYERS):
        pick = {name: values[number if len(values) > 1 else 0] for name, values in options.items()}
        window = pick.get("window", -1)
        each.append(
            AttentionMask(
                None if window == -1 else window, pick.get("full_rows", 0), pick.get("prefix", 0)
            )
        )
    return each


def compare(built, parts, masks, after, keep):
    """Values and gradients (of the input and of every parameter) of the rows that are left."""
    x_TD, sequences = inputs(), batch(parts)
    graph, params = nnx.split(built, nnx.Param)
    g_TD = inputs(1)

    def ours(params, x_TD):
        out_TD = nnx.merge(graph, params)(x_TD, sequences)
        return jnp.sum(jnp.where(sequences.real_T[:, None], out_TD * g_TD, 0)), out_TD

    def theirs(params, x_TD):
        out_TD = by_sequence(nnx.merge(graph, params), x_TD, parts, masks, after, keep)
        return jnp.sum(out_TD * g_TD), out_TD

    (grads, out_TD), (wanted, wanted_TD) = (
        jax.jit(jax.grad(f, argnums=(0, 1), has_aux=True))(params, x_TD) for f in (ours, theirs)
    )
    count = int(sequences.offsets[-1])
    assert_close(out_TD[:count], np.asarray(wanted_TD[:count]), 4e-6, "out")
    for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(wanted), strict=True
    ):
        assert_close(got, np.asarray(want), 5e-5, jax.tree_util.keystr(path))


@pytest.fixture
def optimised():
    """Without optimisations LLVM adds up one by one, and rounds more than the tolerance leaves."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("name", MASKS)
def test_against_one_sequence_at_a_time(name):
    options = {"divide_by": DIVISORS.get(name, "constant"), "output_slots": SLOTS}
    built = encoder(**MASKS[name], **options)
    compare(built, SEQUENCES, masks_of(MASKS[name]), after=1, keep=KEEP)


@pytest.mark.parametrize("keep", [13, 1000])
def test_as_long_as_the_longest_history(keep):
    """Then everything stays, as without a truncation."""
    masks = {"window": (2,), "full_rows": (3,)}
    built, whole = encoder(truncate_length=keep, **masks), whole_encoder(**masks)
    sequences = batch(SEQUENCES)
    count = int(sequences.offsets[-1])
    np.testing.assert_array_equal(kept_rows(built.truncation.cut(sequences)), sequences.real_T)
    np.testing.assert_allclose(
        *(jax.jit(one)(inputs(), sequences)[:count] for one in (built, whole)), rtol=1e-5, atol=1e-6
    )


def test_kept_rows():
    """By hand: contextual tokens, targets and the newest history rows stay."""
    parts = [(1, 4, 2), (0, 0, 0), (2, 1, 0)]
    cut = Truncation(after=1, length=2).cut(batch(parts, rows=12, extra_rows=3))
    np.testing.assert_array_equal(kept_rows(cut), [1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0])
    assert cut.sequences.num_rows == 12  # never more than there were


def test_smaller_buffer():
    whole = batch([(1, 4, 2), (0, 0, 0), (2, 1, 0)], rows=20, extra_rows=3)
    cut = Truncation(after=1, length=2).cut(whole)
    assert cut.sequences.num_rows == 15
    np.testing.assert_array_equal(cut.sequences.offsets, [0, 5, 5, 8])
    np.testing.assert_array_equal(cut.sequences.time_T[:8], np.array([0, 3, 4, 5, 6, 7, 8, 9]) * 50)
    np.testing.assert_array_equal(cut.sequences.real_T, np.arange(15) < 8)
    np.testing.assert_array_equal(cut.row_T[:10], [0, 15, 15, 1, 2, 3, 4, 5, 6, 7])
    np.testing.assert_array_equal(
        cut.restore(cut.take(jnp.arange(20.0))), [0, 0, 0, 3, 4, 5, 6, 7, 8, 9] + [0] * 10
    )


def test_full_buffer():
    """Every sequence at its bounds: the smaller buffer is filled to the last row."""
    parts = [(2, 8, 3)] * 4
    cut = Truncation(after=1, length=KEEP).cut(batch(parts, rows=60))
    assert int(cut.sequences.offsets[-1]) == cut.sequences.num_rows == 40
    x_TD = inputs(rows=60)
    np.testing.assert_array_equal(
        cut.restore(cut.take(x_TD))[:52],
        np.where(np.tile([1, 1, *[0] * 3, *[1] * 8], 4)[:, None], x_TD[:52], 0),
    )


@pytest.mark.parametrize("truncated", [True, False])
def test_rows_are_those_of_the_whole_buffer(truncated):
    built = encoder() if truncated else whole_encoder()
    sequences = batch(SEQUENCES)
    rows_P = jnp.asarray([0, 17, 16, 2, 15, 17, ROWS, ROWS + 7], jnp.int32)
    whole_TD = jax.jit(built)(inputs(), sequences)
    rows_PD = jax.jit(built.rows)(inputs(), sequences, rows_P)
    np.testing.assert_allclose(rows_PD[:6], whole_TD[rows_P[:6]], rtol=1e-4, atol=1e-5)
    assert not np.any(np.asarray(rows_PD[6:]))
    assert np.any(np.asarray(rows_PD[3])) == (
        not truncated
    )  # row 2 is the oldest event of its history
    if truncated:
        kept_T = kept_rows(built.truncation.cut(sequences))
        np.testing.assert_array_equal(kept_T[rows_P[:6]], [True, True, True, False, True, True])


def test_gradients_flow_through_rows():
    built, sequences = encoder(), batch(SEQUENCES)
    rows_P = jnp.asarray([17, 2, 5], jnp.int32)
    g_PD = inputs(1)[:3]
    graph, params = nnx.split(built, nnx.Param)
    model = lambda: nnx.merge(graph, params)  # noqa: E731
    one = jax.jit(jax.grad(lambda x: jnp.sum(model().rows(x, sequences, rows_P) * g_PD)))(inputs())
    other = jax.jit(jax.grad(lambda x: jnp.sum(model()(x, sequences)[rows_P] * g_PD)))(inputs())
    assert_close(one, np.asarray(other), 1e-6, "gradient")


def test_padding_may_hold_nan():
    """Padding rows of NaN, in either buffer, reach neither outputs nor gradients."""
    built, sequences = encoder(), batch(SEQUENCES)
    real_T1 = sequences.real_T[:, None]
    graph, params = nnx.split(built, nnx.Param)
    value = jax.jit(
        jax.value_and_grad(
            lambda p, x: jnp.sum(jnp.where(real_T1, nnx.merge(graph, p)(x, sequences), 0) ** 2)
        )
    )
    clean, dirty = value(params, inputs()), value(params, jnp.where(real_T1, inputs(), jnp.nan))
    for one, other in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        np.testing.assert_array_equal(one, other)


def test_one_compilation_for_all_batches():
    graph, params = nnx.split(encoder(), nnx.Param)
    run = jax.jit(lambda params, x, sequences: nnx.merge(graph, params)(x, sequences))
    for parts in (SEQUENCES, [(0, 0, 0)] * 5, [(1, 1, 1)] * 5, [(0, 12, 0)] * 5):
        sequences = batch(parts)
        assert np.all(np.isfinite(run(params, inputs(), sequences)[: int(sequences.offsets[-1])]))
    assert run._cache_size() == 1


def test_padded_layout():
    """Real rows first, padding behind them in the sequence.

    The newest real rows are kept, and the smaller buffer is jagged.
    """
    histories, place = [7, 0, 9, 4], 12
    built = encoder(truncate_length=3, divide_by="length")
    jagged = batch([(0, h, 0) for h in histories])
    offsets = jnp.arange(5, dtype=jnp.int32) * place
    real_T = np.concatenate([np.arange(place) < h for h in histories] + [np.zeros(16, bool)])
    row_T = np.flatnonzero(real_T)
    time_T = jnp.zeros(ROWS, jnp.int32)
    padded = Sequences(offsets, jnp.asarray(real_T), time_T, time_T)
    jagged = dataclasses.replace(jagged, num_targets=None, num_contextual=None)
    count = sum(histories)
    x_TD = jnp.zeros((ROWS, WIDTH)).at[row_T].set(inputs()[:count])
    kept_p, kept_j = (kept_rows(built.truncation.cut(x)) for x in (padded, jagged))
    np.testing.assert_array_equal(kept_p[row_T], kept_j[:count])
    of_padded, of_jagged = jax.jit(built)(x_TD, padded), jax.jit(built)(inputs(), jagged)
    assert_close(of_padded[row_T], np.asarray(of_jagged[:count]), 1e-6, "out")


def test_room_for_targets_is_asked_for():
    with pytest.raises(ValueError, match="extra_rows=0 must be their number"):
        encoder()(inputs(), batch(SEQUENCES, extra_rows=0))
    with pytest.raises(ValueError, match="5 targets and contextual tokens, more than extra_rows=4"):
        encoder()(inputs(), batch(SEQUENCES, extra_rows=4))


def test_rows_without_room_are_not_lost_in_silence():
    """Traced counts cannot be refused: what does not fit makes everything NaN."""
    for extra_rows, fits in ((4, False), (5, True)):
        sequences = batch([(2, 8, 3)] * 4, rows=60, extra_rows=extra_rows)
        out = jax.jit(encoder())(inputs(rows=60), sequences)
        assert np.isfinite(out[:52]).all() == fits and np.isnan(out[:52]).any() != fits


def test_truncation_above_all_layers():
    with pytest.raises(ValueError, match="truncate_after=1 must be below model.layers=1"):
        encoder(layers=1)


def test_retrieval_trains_on_the_rows_that_are_left():
    """A truncated model's loss equals the loss of all its outputs with weight 0 on dropped rows."""
    model = ModelConfig(
        width=8,
        layers=2,
        heads=2,
        qk_width=4,
        v_width=4,
        relative_bias=False,
        truncate_after=1,
        truncate_length=3,
        input_dropout=0.0,
        linear_dropout=0.0,
    )
    config = Config(
        model=model, data=DataConfig(max_history=12), loss=LossConfig(kind="full", temperature=1.0)
    )
    recipe = Recipe(config, num_items=30)
    events = Events.from_arrays(np.random.default_rng(0).integers(1, 31, 40), np.arange(40))
    columns = {"start": np.array([0, 12, 13]), "stop": np.array([9, 12, 24])}
    made = HistoryGather(32)(events, columns, np)
    made = jax.tree.map(jnp.asarray, made)
    params = recipe.init(0).params
    loss = jax.jit(recipe.loss)(params, made, jax.random.key(0))
    whole = recipe.model(params)
    kept_T = kept_rows(whole.encoder.truncation.cut(made.sequences))
    assert int(kept_T.sum()) == 6
    options = dict(temperature=1.0, l2_normalize=True, chunk_rows=8)
    encoded_TD = jax.jit(whole.encode)(made)
    expected, _ = softmax_loss(
        encoded_TD, whole.item_table[...], made.target_T, made.weight_T * kept_T, **options
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_array_equal(encoded_TD[~kept_T], 0)
