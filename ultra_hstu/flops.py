"""Floating point operations of a configuration's products, from lengths and mask pairs.

A multiplication and an addition are two operations. Counted are matrix products: projections,
attention over the allowed (row, key) pairs of each layer's mask (scores and weighted values), the
head, and the scores of a retrieval loss. Not counted: norms, activations, the relative bias,
embedding look-ups, dropout, the optimizer; none has a product over the width, and together they are
a few per cent of a model of width 64 (see tests/test_flops.py).

The backward of a product is two products. Attention's backward is five over the pairs, since
kernels compute the scores again instead of keeping them: 2.5 times the forward where K = V, so
training is 3 x projections + 3.5 x attention, plus what `model.remat` and `model.chunk_rows`
compute a second time.

Where a head reads few rows (the targets of ranking; the newest row of retrieval, outside training),
the last layer makes queries, gates and outputs for these alone: see `nn.hstu.HSTU.rows`.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from kernels.mask import AttentionMask, layer_masks
from ultra_hstu.config import Config, ModelConfig
from ultra_hstu.nn.hstu import reads_few
from ultra_hstu.nn.item_features import ItemCodes

Lengths = int | Sequence[int] | Int[np.ndarray, "*n"]  # of all samples, or one each


class Flops(NamedTuple):
    """Operations of one sample, the mean over the samples that were counted."""

    projections: float  # forward, of all layers
    attention: float  # forward
    attention_backward: float
    recomputed: float  # forward work that training does again
    head: float = 0.0  # ranking: forward of the multi-task head
    loss: float = 0.0  # retrieval: scores of the loss, forward
    corpus: float = 0.0  # retrieval: scores of the whole catalogue for one user, at inference
    unread: float = 0.0  # retrieval: forward work on rows that are not read at inference
    features: float = 0.0  # of items, or their parts of a mixture: forward in training, once a step

    @property
    def inference(self) -> float:
        """One forward pass: the encoder, and the head or the scores of every item."""
        return self.projections + self.attention + self.head + self.corpus - self.unread

    @property
    def training(self) -> float:
        """Forward, backward and recomputation of the encoder and the head or loss."""
        return (
            3 * (self.projections + self.head + self.loss + self.features)
            + self.attention
            + self.attention_backward
            + self.recomputed
        )


def count(
    config: Config,
    history: Lengths,
    *,
    targets: Lengths = 0,
    contextual: Lengths = 0,
    channels: Mapping[str, Lengths] | None = None,
    items: int = 0,
    item_features: ItemCodes | None = None,
) -> Flops:
    """The mean over samples, one for each entry of `history`.

    Args:
      history: events of each sample's history, an int or int[n]; an interleaved input makes two
        rows of each.
      targets: events that each sample asks about, an int or int[n]; 0 for retrieval.
      contextual: contextual tokens of each sample.
      channels: of a mixture of transducers, each channel's history, by name, instead of `history`
        (whose values then only give n).
      items: size of the catalogue, for the loss and the scores of retrieval.
      item_features: what is known of items, if the model reads it. The vectors of all items are
        made once a step, whose samples share what they cost.

    Raises:
      ValueError: negative lengths, channels that are not those of the configuration, or lengths of
        different n.
    """
    wanted, channels = config.model.channels, channels or {}
    if set(channels) != set(wanted):
        raise ValueError(
            f"channels {sorted(channels)} are not those of model.channels, {sorted(wanted)}"
        )
    of_channels = {f"channels.{name}": lengths for name, lengths in channels.items()}
    history, targets, contextual, *parts = _lengths(
        history=history, targets=targets, contextual=contextual, **of_channels
    )
    models = [config.model.encoders[name] for name in channels] or [config.model]
    encoder = _target_attention if config.model.kind == "din" else _encoder
    encoders = [
        encoder(config, model, lengths, targets, contextual)
        for lengths, model in zip(parts or [history], models, strict=True)
    ]
    total = Flops(*map(sum, zip(*encoders, strict=True)))
    if config.rank.tasks:
        width = sum(model.width for model in models)
        hidden, output = _head(config, history, targets, width)
        again = hidden if config.model.chunk_rows is not None else 0.0
        total = total._replace(head=hidden + output, recomputed=total.recomputed + again)
    else:
        corpus = items * _of_pair(config)
        total = total._replace(loss=_loss(config, history, items), corpus=corpus)
        if config.loss.similarity == "mol":
            total = _with_mixture(config, total, history, items)
    return total if item_features is None else _with_features(config, total, item_features)


def cached(config: Config, history: int) -> tuple[float, float]:
    """Forward operations for ranking with a cached history: of the history, and of one candidate.

    The last layer of the history makes keys and values alone.
    """
    one, two = (count(config, history, targets=targets).inference for targets in (1, 2))
    return 2 * one - two, two - one


def cost_exponent(config: Config, max_length: int, *, items: int = 0) -> tuple[float, float]:
    """gamma, and the largest relative error, of `cost(l) = c * l^gamma` for l events of history.

    Fitted by least squares of log cost over log length at 64 lengths, equally spaced, up to
    `max_length`; with the targets of the configuration.

    Raises:
      ValueError: if `max_length` is below 2.
    """
    if max_length < 2:
        raise ValueError(f"{max_length=} must be at least 2: an exponent needs two lengths")
    length_N = np.unique(np.linspace(max(max_length // 64, 1), max_length, 64).astype(np.int64))
    targets = config.rank.targets if config.rank.tasks else 0
    channels = config.model.channels.items()
    cost_N = np.array(
        [
            count(
                config,
                int(n),
                targets=targets,
                contextual=len(config.rank.contextual),
                channels={name: min(int(n), one.max_history) for name, one in channels},
                items=items,
            ).training
            for n in length_N
        ]
    )
    gamma, log_c = np.polyfit(np.log(length_N), np.log(cost_N), 1)
    error = np.abs(np.exp(log_c) * length_N**gamma / cost_N - 1).max()
    return float(gamma), float(error)


def _lengths(**named: Lengths) -> list[np.ndarray]:
    arrays = {name: np.atleast_1d(np.asarray(value, np.int64)) for name, value in named.items()}
    for name, values in arrays.items():
        if (values < 0).any():
            raise ValueError(
                f"{name}={values.min()} must be at least 0: lengths are counts of events"
            )
    try:
        return list(np.broadcast_arrays(*arrays.values()))
    except ValueError:
        shapes = {name: values.shape for name, values in arrays.items()}
        raise ValueError(f"lengths must be numbers or arrays of one size, got {shapes}") from None


def _encoder(
    config: Config,
    model: ModelConfig,
    history: np.ndarray,
    targets: np.ndarray,
    contextual: np.ndarray,
) -> Flops:
    """Of an encoder that is made from `model`, and of what projects the embeddings to its width."""
    layers = model.layers
    # Equal samples cost the same; a set of users has far fewer different lengths than users.
    kind_K3, times_K = np.unique(
        np.stack([history, targets, contextual], axis=1), axis=0, return_counts=True
    )
    share_K = times_K / len(history)
    uvqk, output, hidden = _projection_widths(model)
    tokens = 2 if config.rank.tasks and config.rank.input == "interleaved" else 1
    masks = (
        layer_masks(vars(model), layers) if model.kind == "hstu" else (AttentionMask(),) * layers
    )
    read_K = kind_K3[:, 1] if config.rank.tasks else np.ones_like(kind_K3[:, 1])
    read = float(share_K @ read_K)

    def rows_of(limit: int | None) -> Int[np.ndarray, " K"]:
        kept_K = kind_K3[:, 0] if limit is None else np.minimum(kind_K3[:, 0], limit)
        return tokens * kept_K + kind_K3[:, 1] + kind_K3[:, 2]

    @functools.cache
    def forward(mask: AttentionMask, limit: int | None, few: bool) -> np.ndarray:
        """Operations before attention, after it, of a hidden layer, of scores and of values.

        `few`: for the rows that are read.
        """
        rows_K = rows_of(limit)
        pairs_K = [
            mask.row_pairs([rows], int(rows), [m], [c])[rows - asked :].sum()
            for rows, asked, (_, m, c) in zip(
                rows_K, read_K if few else rows_K, kind_K3, strict=True
            )
        ]
        rows = float(share_K @ rows_K)
        keys, asked = (rows / 2, read) if few else (0.0, rows)
        products = np.array([(keys + asked) * uvqk, asked * output, asked * hidden])
        widths = np.array(_attention_widths(model))
        return 2.0 * np.concatenate([products, float(share_K @ np.array(pairs_K)) * widths])

    whole = model.relative_bias and config.parallel.context > 1
    can_select = model.kind == "hstu" and model.attention == "silu" and not whole
    attention = backward = again = unread = projections = 0.0
    if model.width != config.model.width:
        projections += 2.0 * float(share_K @ rows_of(None)) * config.model.width * model.width
    for layer, mask in enumerate(masks):
        truncated = model.truncate_after is not None and layer >= model.truncate_after
        limit = model.truncate_length if truncated else None
        few = layer + 1 == layers and can_select and read > 0
        few = few and reads_few(read, float(share_K @ rows_of(limit)))
        first, last, inner, score, value = forward(mask, limit, few and bool(config.rank.tasks))
        if few and not config.rank.tasks:
            unread = float(forward(mask, limit, False).sum() - forward(mask, limit, True).sum())
        projections += first + last + inner
        attention += score + value
        backward += 3 * score + 2 * value
        # Nothing in the backward of a projection needs its result: q, k, v are computed again for
        # attention alone.
        if model.remat != "none":
            again += first
        # But the SiLU that the research layer puts on them does.
        if model.kind == "hstu" and model.preset == "research" and model.chunk_rows is not None:
            again += first
        # That of the product behind a hidden layer does.
        if model.remat != "none" or model.chunk_rows is not None:
            again += inner
    return Flops(float(projections), float(attention), float(backward), float(again), unread=unread)


def _target_attention(
    config: Config,
    model: ModelConfig,
    history: np.ndarray,
    targets: np.ndarray,
    contextual: np.ndarray,
) -> Flops:
    """DIN, `nn.din.TargetAttention`, over the pairs of a target and an event of its history.

    The backward of a pair's products is twice as much, and makes them again.
    """
    width, hidden = model.width, model.ffn_width
    rows = float((history + targets + contextual).mean())
    asked, pairs = float(targets.mean()), float((history * targets).mean())
    projections = 2.0 * (rows + asked) * width * hidden + 2.0 * asked * 5 * width * hidden
    attention = 2.0 * pairs * (width * hidden + hidden + width)
    return Flops(projections, attention, 2 * attention, attention)


def _projection_widths(model: ModelConfig) -> tuple[int, int, int]:
    """Operations / 2 a row of a layer's projections.

    They are those before attention, those after it, and of these the hidden layer of a feed-forward
    net by itself.
    """
    if model.kind == "sasrec":
        hidden = model.width * model.ffn_width
        return 3 * model.width**2, model.width**2 + hidden, hidden
    inner, hidden = model.heads * model.v_width, model.width * (model.feed_forward or 0)
    uvqk = model.width * 2 * (inner + model.heads * model.qk_width)
    output = (1 if model.preset == "research" else 3) * inner * model.width
    return uvqk, output + hidden, hidden


def _attention_widths(model: ModelConfig) -> tuple[int, int]:
    """Widths over all heads of scores and values."""
    if model.kind == "sasrec":
        return model.width, model.width
    return model.heads * model.qk_width, model.heads * model.v_width


def _head(
    config: Config, history: np.ndarray, targets: np.ndarray, width: int
) -> tuple[float, float]:
    """Forward operations of the hidden layer, over encoders that are so wide, and of the output."""
    rank = config.rank
    predicted = np.where((targets == 0) & (rank.supervise == "all"), history, targets)
    each = 2.0 * float(predicted.mean()) * rank.head_width
    return each * width, each * len(rank.tasks)


def _with_features(config: Config, total: Flops, codes: ItemCodes) -> Flops:
    """With the products that make the vectors of all items from their features."""
    width, hidden = config.model.width, config.features.hidden_width
    each = 2.0 * codes.entries * width if codes.as_matrix else 0.0
    numbers = codes.number_IN.shape[1]
    each += 2.0 * hidden * (numbers + width) if numbers else 0.0
    catalogue = each * codes.num_items
    total = total._replace(features=total.features + catalogue / config.data.batch_users)
    # Tokens of series need features when the model answers, too.
    return total._replace(corpus=total.corpus + catalogue * (config.features.series > 0))


def _of_pair(config: Config) -> float:
    """Operations of the score of a user and an item, from what was made of either."""
    mol = config.mol
    if config.loss.similarity == "dot":
        return 2.0 * config.model.width
    logits = mol.user_components * mol.item_components
    return 2.0 * logits * (mol.component_width + 2 * mol.gate_width + 1)


def _with_mixture(config: Config, total: Flops, history: np.ndarray, items: int) -> Flops:
    """With the products that make the parts of rows, and of all items once a step.

    Those of items are kept for answers.
    """
    mol, width = config.mol, config.model.width
    logits, gate = mol.user_components * mol.item_components, mol.gate_width
    of_gate = gate * (width + logits)
    components = (mol.user_components - bool(mol.user_ids)) * mol.component_width
    row = 2.0 * (mol.hidden_width * (2 * width + components) + of_gate)
    item = 2.0 * (width * mol.item_components * mol.component_width + of_gate)
    catalogue = item * (items + 1) / config.data.batch_users if items else 0.0
    return total._replace(
        loss=total.loss + row * _trained_rows(config, history),
        corpus=total.corpus + row * (items > 0),
        features=total.features + catalogue,
    )


def _trained_rows(config: Config, history: np.ndarray) -> float:
    """Rows of a sample that are trained on: those that reach the last layer."""
    limit = config.model.truncate_length
    return float((history if limit is None else np.minimum(history, limit)).mean())


def _loss(config: Config, history: np.ndarray, items: int) -> float:
    loss = config.loss
    # What is needed: an implementation may score more, where one large product takes less time.
    scored = items + 1 if loss.kind == "full" else loss.negatives + 1
    return _trained_rows(config, history) * scored * _of_pair(config) if items else 0.0
