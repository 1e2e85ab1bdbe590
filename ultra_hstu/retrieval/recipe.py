"""The pure functions of a retrieval run: `step.Steps` for histories."""

import dataclasses
import functools
from typing import assert_never

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Key

from ultra_hstu.data import signals
from ultra_hstu.entry_updates import ITEM_TABLE, Path
from ultra_hstu.nn.dropout import row_keys
from ultra_hstu.parallel.embedding_sharding import Entries
from ultra_hstu.parallel.parameters import ShardedLayers
from ultra_hstu.retrieval import negatives
from ultra_hstu.retrieval.batch import Batch
from ultra_hstu.retrieval.loss import softmax_loss
from ultra_hstu.retrieval.model import Recommender
from ultra_hstu.step import Params, Steps

# Rows of logits at one time: what fits the cache of a CPU, what fills a GPU (measured on
# MovieLens-1M, 128 negatives).
CHUNK_ROWS = {"cpu": 512, "accelerator": 4096}


@dataclasses.dataclass(frozen=True)
class Recipe(Steps[Recommender]):
    """Retrieval: every row predicts the item after it, among sampled or all items.

    Attributes:
      target_counts: how often each item is a target in training, entry 0 is padding: what in-batch
        negatives are corrected by. None where nothing is trained.
    """

    num_items: int
    target_counts: Int[np.ndarray, " I1"] | None = dataclasses.field(
        default=None, compare=False, repr=False
    )

    def build(self, seed: int) -> Recommender:
        sizes = signals.sizes(self.config.rank.signals)
        model = Recommender(
            self.config.model,
            self.num_items,
            self.config.data.max_history,
            signals=sizes,
            rngs=nnx.Rngs(seed),
        )
        if self.shards.devices > 1:
            model.encoder.run_layer = ShardedLayers(self.shards)
        return model

    @property
    def tables(self) -> tuple[Path, ...]:
        has_signals = bool(self.config.rank.signals)
        return ITEM_TABLE, *[("embedding", "signals", "table")] * has_signals

    def reads(self, model: Recommender, batch: Batch, key: jax.Array) -> dict[Path, Array]:
        """Of items: histories, targets, and negatives that are drawn from the catalogue."""
        shards, sequences = self.shards, batch.sequences.on(self.shards)
        items = jnp.concatenate([batch.item_T, batch.target_T])
        numbers = [shards.of_groups(jnp.where(items > 0, items, -1))]
        if self.config.loss.kind == "sampled":
            _, negative_key = jax.random.split(key)
            truncation = getattr(model.encoder, "truncation", None)
            kept = sequences if truncation is None else truncation.cut(sequences).sequences
            numbers.append(
                shards.of_devices(self._uniform(row_keys(negative_key, kept)).reshape(-1))
            )
        found = {ITEM_TABLE: jnp.concatenate(numbers)}
        if (embed := model.embedding.signals) is not None and batch.signal_TS is not None:
            number_n = embed.reads(batch.signal_TS).reshape(-1)
            found["embedding", "signals", "table"] = shards.of_groups(number_n)
        return found

    def _uniform(self, key_T: Key[Array, " t"]) -> Int[Array, "t R"]:
        """Negatives of this device's rows, drawn from the catalogue."""
        count = self.config.loss.negatives
        return negatives.uniform_negatives(key_T, key_T.shape[0], count, self.num_items)

    def loss(self, params: Params, batch: Batch, key: jax.Array) -> Float[Array, ""]:
        """Mean loss over the supervised rows of a batch; `key` draws dropout and negatives."""
        dropout_key, negative_key = jax.random.split(key)
        model = self.model(params)
        h_TD, cut = model.encode_kept(batch, shards=self.shards, key=dropout_key)
        # Rows that a truncation dropped have no output to train on.
        labels = (x if cut is None else cut.take(x) for x in (batch.target_T, batch.weight_T))
        target_T, weight_T = self.shards.local(tuple(labels))
        table_ID = model.all_items(self.shards)
        config, shards = self.config.loss, self.shards
        rows, negative_TR, log_q = h_TD.shape[0], None, None
        sequences = batch.sequences.on(shards) if cut is None else cut.sequences
        keys_T = row_keys(negative_key, sequences)
        match config.kind:
            case "sampled":
                negative_TR = self._uniform(keys_T)
            case "in_batch":
                pool = negatives.in_batch_pool(shards.of_groups(batch.target_T))
                negative_TR = negatives.in_batch_negatives(keys_T, pool, rows, config.negatives)
                log_q = jnp.asarray(self._log_q) if config.log_q else None
            case "full":
                pass
            case unknown:
                assert_never(unknown)
        if isinstance(entries := model.item_table[...], Entries):  # and so is `table_ID`
            assert negative_TR is not None  # a full softmax reads the whole table
            target_T, negative_TR = entries.places(target_T), entries.places(negative_TR)
            log_q = None if log_q is None else log_q.at[entries.dealt_U].get(mode="fill")
        return softmax_loss(
            h_TD,
            table_ID,
            target_T,
            weight_T,
            negative_TR,
            temperature=config.temperature,
            l2_normalize=config.l2_normalize,
            chunk_rows=config.chunk_rows or _chunk_rows(),
            log_q=log_q,
            total=shards.total(jnp.sum(weight_T)),
        )[0]

    @functools.cached_property
    def _log_q(self) -> Float32[np.ndarray, " I1"]:
        if self.target_counts is None:
            raise ValueError(
                "loss.kind='in_batch' with loss.log_q=True needs the counts of the training "
                "targets: give Recipe target_counts, or set loss.log_q=False"
            )
        return negatives.log_frequency(self.target_counts)


def _chunk_rows() -> int:
    return CHUNK_ROWS["cpu" if jax.default_backend() == "cpu" else "accelerator"]
