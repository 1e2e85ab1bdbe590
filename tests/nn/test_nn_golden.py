"""Parity with the public PyTorch implementation.

The same weights and inputs give the same outputs and every gradient.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels.hstu_attention.api import hstu_attention
from kernels.hstu_attention.relative_bias import time_buckets
from kernels.mask import AttentionMask
from tests import golden
from ultra_hstu.nn.embeddings import InputEmbedding
from ultra_hstu.nn.hstu import HSTU
from ultra_hstu.nn.hstu_layer import ProductionLayer, ResearchLayer
from ultra_hstu.nn.norms import l2_normalize
from ultra_hstu.nn.relative_bias import RelativeBiasTables
from ultra_hstu.nn.sasrec import SASRec, SASRecLayer
from ultra_hstu.retrieval.batch import Batch

OUT, GRAD = 1e-5, 3e-5
ROWS = 32  # 20 valid rows and padding
LENGTH, WIDTH, HEADS = 21, 16, 2


def flat_batch(data: dict[str, np.ndarray]) -> Batch:
    """The golden users as a flat jagged batch; without timestamps all times are 0."""
    ids, lengths = data["past_ids"], data["lengths"]
    times = data.get("timestamps", np.zeros(ids.shape, np.int64)).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    flat = lambda x: jnp.asarray(golden.flatten(x, lengths, ROWS))  # noqa: E731
    return Batch(
        item_T=flat(ids),
        time_T=flat(times),
        next_time_T=flat(np.concatenate([times[:, 1:], times[:, -1:]], axis=1)),
        target_T=jnp.zeros(ROWS, jnp.int32),
        weight_T=jnp.ones(ROWS),
        offsets=jnp.asarray(offsets),
        last_row_B=jnp.asarray(offsets[1:] - 1),
    )


def embedding(data: dict[str, np.ndarray]) -> InputEmbedding:
    module = InputEmbedding(30, WIDTH, LENGTH, dropout_rate=0.0, rngs=nnx.Rngs(0))
    module.item_table[...] = jnp.asarray(data["weight/item_table"])
    module.position_table[...] = jnp.asarray(data["weight/pos_table"])
    return module


def check_model(data, variant, module, batch, names):
    """Compares x0, block0_out, out_pre, out and the gradients of `module(embedding, encoder)`.

    `names` maps golden names to (parameter, transform).
    """
    lengths, g_TD = data["lengths"], jnp.asarray(golden.flatten(data["g"], data["lengths"], ROWS))
    graph, params = nnx.split(module, nnx.Param)
    count = int(lengths.sum())

    def outputs(params):
        m = nnx.merge(graph, params)
        x0 = m.embedding(batch.item_T, batch.sequences)
        out_pre = m.encoder(x0, batch.sequences)
        found = {
            "x0": x0,
            "block0_out": m.first(x0, batch),
            "out_pre": out_pre,
            "out": l2_normalize(out_pre),
        }
        return jnp.sum(found["out"] * g_TD), found

    (_, found), grads = jax.jit(jax.value_and_grad(outputs, has_aux=True))(params)
    for name, value in found.items():
        golden.assert_close(
            value[:count],
            golden.flatten(data[f"{variant}/{name}"], lengths, count),
            OUT,
            f"{variant}/{name}",
        )
    grads = nnx.merge(graph, grads)
    wanted = [name for name in data if name.startswith(f"{variant}/grad/")]
    assert sorted(wanted) == sorted(f"{variant}/grad/{name}" for name in names)
    for name, read in names.items():
        golden.assert_close(
            read(grads), data[f"{variant}/grad/{name}"], GRAD, f"{variant}/grad/{name}"
        )
    assert np.all(np.asarray(grads.embedding.item_table[0]) == 0.0)


class Model(nnx.Module):
    def __init__(self, embedding, encoder):
        self.embedding, self.encoder = embedding, encoder

    def first(self, x_TD, batch):
        """The first layer alone."""
        whole, self.encoder.layers = self.encoder.layers, nnx.List(list(self.encoder.layers)[:1])
        out = self.encoder(x_TD, batch.sequences)
        self.encoder.layers = whole
        return out


@pytest.mark.parametrize("variant", ["base", "no_bias", "softmax"])
def test_research_hstu(variant):
    data = golden.load("research_hstu")
    layers, names = (
        [],
        {
            "item_table": lambda m: m.embedding.item_table[...],
            "pos_table": lambda m: m.embedding.position_table[...],
        },
    )
    for i in range(2):
        bias = None if variant == "no_bias" else RelativeBiasTables(LENGTH, 128, rngs=nnx.Rngs(0))
        layer = ResearchLayer(WIDTH, HEADS, 4, 8, bias=bias, rngs=nnx.Rngs(0))
        layer.uvqk[...] = jnp.asarray(data[f"weight/block{i}/uvqk"])
        layer.output[...] = jnp.asarray(data[f"weight/block{i}/o_weight"].T)
        layer.output_bias[...] = jnp.asarray(data[f"weight/block{i}/o_bias"])
        names[f"block{i}/uvqk"] = lambda m, i=i: m.encoder.layers[i].uvqk[...]
        names[f"block{i}/o_weight"] = lambda m, i=i: m.encoder.layers[i].output[...].T
        names[f"block{i}/o_bias"] = lambda m, i=i: m.encoder.layers[i].output_bias[...]
        if bias is not None:
            bias.position_table[...] = jnp.asarray(data[f"weight/block{i}/pos_w"])
            bias.time_table[...] = jnp.asarray(data[f"weight/block{i}/ts_w"])
            names[f"block{i}/pos_w"] = lambda m, i=i: m.encoder.layers[i].bias.position_table[...]
            names[f"block{i}/ts_w"] = lambda m, i=i: m.encoder.layers[i].bias.time_table[...]
        layers.append(layer)
    implementation = "xla" if variant == "base" else "reference"  # the latter compiles faster
    encoder = HSTU(
        layers,
        LENGTH,
        attention="softmax" if variant == "softmax" else "silu",
        implementation=implementation,
    )
    check_model(data, variant, Model(embedding(data), encoder), flat_batch(data), names)


def test_time_buckets_and_bias():
    data = golden.load("research_hstu")
    times = jnp.asarray(data["timestamps"].astype(np.int32))
    next_times = jnp.concatenate([times[:, 1:], times[:, -1:]], axis=1)
    buckets = time_buckets(next_times[:, :, None] - times[:, None, :], 129)
    used = np.tril(np.ones((LENGTH, LENGTH), bool))[None] & (
        np.arange(LENGTH)[None, :, None] < data["lengths"][:, None, None]
    )
    np.testing.assert_array_equal(np.asarray(buckets)[used], data["buckets"][used])
    for i in range(2):
        tables = RelativeBiasTables(LENGTH, 128, rngs=nnx.Rngs(0))
        tables.position_table[...] = jnp.asarray(data[f"weight/block{i}/pos_w"])
        tables.time_table[...] = jnp.asarray(data[f"weight/block{i}/ts_w"])
        bias = np.where(used, np.asarray(tables.padded(times, next_times)), 0)
        golden.assert_close(bias, data[f"base/bias_block{i}"], 1e-6, f"bias_block{i}")


def test_sasrec():
    data, variant = golden.load("sasrec"), "relu"
    layers, names = (
        [],
        {
            "item_table": lambda m: m.embedding.item_table[...],
            "pos_table": lambda m: m.embedding.position_table[...],
        },
    )
    places = {"in_proj": "qkv", "out_proj": "output", "ffn1": "ffn1", "ffn2": "ffn2"}
    for i in range(2):
        layer = SASRecLayer(WIDTH, HEADS, 24, LENGTH, rngs=nnx.Rngs(0))
        for theirs, ours in places.items():
            weight = data[f"weight/block{i}/{theirs}_weight"]
            getattr(layer, ours)[...] = jnp.asarray(weight.reshape(weight.shape[:2]).T)
            getattr(layer, f"{ours}_bias")[...] = jnp.asarray(
                data[f"weight/block{i}/{theirs}_bias"]
            )
            names[f"block{i}/{theirs}_weight"] = lambda m, i=i, a=ours, s=weight.shape: getattr(
                m.encoder.layers[i], a
            )[...].T.reshape(s)
            names[f"block{i}/{theirs}_bias"] = lambda m, i=i, a=ours: getattr(
                m.encoder.layers[i], f"{a}_bias"
            )[...]
        layers.append(layer)
    check_model(data, variant, Model(embedding(data), SASRec(layers)), flat_batch(data), names)


STU_PARAMETERS = {
    "input_norm_weight": "input_norm_weight",
    "input_norm_bias": "input_norm_bias",
    "uvqk_weight": "uvqk",
    "uvqk_bias": "uvqk_bias",
    "output_weight": "output",
    "output_norm_weight": "output_norm_weight",
    "output_norm_bias": "output_norm_bias",
}
STU_CASES = [
    "causal",
    "targets",
    "context",
    "context_targets",
    "window",
    "window_targets",
    "window_full",
    "window_full_targets",
    "window_context",
    "window_context_targets",
    "window_full_context_targets",
    "targets_alpha",
]


def test_stu_cases_are_complete():
    data = golden.load("stu_layer")
    assert {name.split("/")[1] for name in data if name.endswith("/out")} == set(STU_CASES)


@pytest.mark.parametrize("case", STU_CASES)
def test_production_layer(case):
    data, norm = golden.load("stu_layer"), "layer_norm"
    mask_case = "targets" if case == "targets_alpha" else case
    _, contextual, window, full_rows = (int(x) for x in data[f"{mask_case}/options"])
    batch = SimpleNamespace(
        **{
            k.split("/")[1]: jnp.asarray(v)
            for k, v in data.items()
            if k.startswith("context/" if contextual else "plain/")
        }
    )
    layer = ProductionLayer(
        16,
        2,
        8,
        4,
        alpha=float(data["targets_alpha/alpha"]) if case == "targets_alpha" else None,
        rngs=nnx.Rngs(0),
    )
    for theirs, ours in STU_PARAMETERS.items():
        prefix = f"{norm}/weight" if theirs.startswith("output_norm") else "weight"
        getattr(layer, ours)[...] = jnp.asarray(data[f"{prefix}/{theirs}"])

    def attend(q, k, v, *, alpha, bias):
        return hstu_attention(
            q,
            k,
            v,
            batch.offsets,
            mask=AttentionMask(window=window or None, full_rows=full_rows, context_sink=not window),
            num_targets=batch.num_targets if "targets" in case else None,
            num_contextual=jnp.full(5, contextual, jnp.int32) * (batch.lengths > 0)
            if contextual
            else None,
            alpha=alpha,
            scale=1.0 / 16,
            implementation="reference",
        )

    graph, params = nnx.split(layer, nnx.Param)

    def run(params, x):
        out = nnx.merge(graph, params)(x, attend)
        return jnp.sum(out * batch.g), out

    (_, out), (grads, dx) = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))(
        params, batch.x
    )
    golden.assert_close(out, data[f"{norm}/{case}/out"], OUT, "out")
    golden.assert_close(dx, data[f"{norm}/{case}/grad/x"], GRAD, "x")
    for theirs, ours in STU_PARAMETERS.items():
        golden.assert_close(
            getattr(nnx.merge(graph, grads), ours)[...],
            data[f"{norm}/{case}/grad/{theirs}"],
            GRAD,
            theirs,
        )
