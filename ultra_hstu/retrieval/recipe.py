"""The pure functions of a retrieval run: `step.Steps` for histories."""

import dataclasses
import functools
from typing import assert_never

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int, Key

from kernels.sampled_softmax import Negatives
from ultra_hstu.entry_updates import CODES, ITEM_TABLE, Path
from ultra_hstu.feature_config import FeatureConfig
from ultra_hstu.nn.dropout import row_keys
from ultra_hstu.nn.embeddings import NO_CODES, CodeSizes
from ultra_hstu.nn.item_features import ItemCodes, folded, with_ids, without_ids
from ultra_hstu.parallel.embedding_sharding import Entries
from ultra_hstu.parallel.parameters import ShardedLayers
from ultra_hstu.retrieval import negatives
from ultra_hstu.retrieval.batch import Batch
from ultra_hstu.retrieval.loss import softmax_loss
from ultra_hstu.retrieval.model import Recommender
from ultra_hstu.retrieval.mol import MixtureOfLogits
from ultra_hstu.retrieval.mol_loss import mixture_loss
from ultra_hstu.step import Params, Steps


@dataclasses.dataclass(frozen=True)
class Recipe(Steps[Recommender]):
    """Retrieval: every row predicts the item after it, among sampled or all items.

    Attributes:
      target_counts: how often each item is a target in training, entry 0 is padding: what in-batch
        negatives are corrected by. None where nothing is trained.
      code_sizes: how many codes there are of what a token holds beside its item.
      item_features: what is known of items beside their ids; None: nothing.
      trained_I: the items of training events. Others have no embedding beside their features, where
        there are such: it would stay as it was drawn. None where nothing is trained.
    """

    num_items: int
    target_counts: Int[np.ndarray, " I1"] | None = dataclasses.field(
        default=None, compare=False, repr=False
    )
    code_sizes: CodeSizes = NO_CODES
    item_features: ItemCodes | None = None
    trained_I: Bool[np.ndarray, " I1"] | None = dataclasses.field(
        default=None, compare=False, repr=False
    )

    @property
    def holds_data(self) -> bool:
        return self.target_counts is not None or self.item_features is not None

    def build(self, seed: int) -> Recommender:
        config = self.config
        model = Recommender(
            config.model,
            self.num_items,
            config.data.max_history * (1 + config.features.series),
            codes=self.code_sizes,
            item_features=self.item_features,
            hidden_width=config.features.hidden_width,
            mixture=self._mixture if config.loss.similarity == "mol" else None,
            rngs=nnx.Rngs(seed),
        )
        without_ids(model.embedding.item_table, self.item_features, self.trained_I)
        if self.shards.devices > 1:
            model.encoder.run_layer = ShardedLayers(self.shards)
        return model

    def _mixture(self, rngs: nnx.Rngs) -> MixtureOfLogits:
        config, loss = self.config, self.config.loss
        return MixtureOfLogits(
            config.mol,
            config.model.width,
            temperature=loss.temperature,
            l2_normalize=loss.l2_normalize,
            rngs=rngs,
        )

    @property
    def tables(self) -> tuple[Path, ...]:
        codes = {name: ("embedding", name, "table") for name in CODES}
        return ITEM_TABLE, *(path for name, path in codes.items() if getattr(self.code_sizes, name))

    def reads(self, model: Recommender, batch: Batch, key: jax.Array) -> dict[Path, Array]:
        """Of items: histories, targets, and negatives that are drawn from the catalogue."""
        shards, sequences = self.shards, batch.sequences.on(self.shards)
        items = jnp.concatenate(shards.whole((batch.item_T, batch.target_T)))
        numbers = [shards.of_groups(jnp.where(items > 0, items, -1))]
        if self.config.loss.kind == "sampled":
            _, negative_key = jax.random.split(key)
            truncation = getattr(model.encoder, "truncation", None)
            kept = sequences if truncation is None else truncation.cut(sequences).sequences
            drawn, _ = self._negatives(batch, row_keys(negative_key, kept))
            assert drawn is not None
            each = jax.tree.map(lambda row_t: row_t[:: drawn.rows_per_draw], drawn.rows)
            numbers.append(shards.of_devices(drawn.draw(each, drawn.shared).reshape(-1)))
        found = {ITEM_TABLE: jnp.concatenate(numbers)}
        if batch.signal_TS is not None:
            parts = self.code_sizes.parts(shards.whole(batch.signal_TS))
            for name, code_TX in zip(CODES, parts, strict=True):
                if (embed := getattr(model.embedding, name)) is not None:
                    number_n = embed.reads(code_TX).reshape(-1)
                    found["embedding", name, "table"] = shards.of_groups(number_n)
        return found

    def loss(self, params: Params, batch: Batch, key: jax.Array) -> Float[Array, ""]:
        """Mean loss over the supervised rows of a batch; `key` draws dropout and negatives."""
        dropout_key, negative_key = jax.random.split(key)
        model = self.model(params)
        with_id_I = with_ids(
            self.item_features, self.trained_I, self.config.features.id_dropout, key
        )
        h_TD, cut = model.encode_kept(
            batch, shards=self.shards, key=dropout_key, with_id_I=with_id_I
        )
        # Rows that a truncation dropped have no output to train on.
        labels = (batch.target_T, batch.weight_T)
        if cut is not None:
            labels = jax.tree.map(cut.take, self.shards.whole(labels))
        target_T, weight_T = self.shards.local(labels)
        table_ID = model.all_items(self.shards, with_id_I)
        config, shards = self.config.loss, self.shards
        sequences = batch.sequences.on(shards) if cut is None else cut.sequences
        negatives.check_draws(
            config.rows_per_draw,
            h_TD.shape[0] * shards.context,
            shards,
            self.config.parallel.batch_groups // shards.data,
        )
        drawn, log_q = self._negatives(batch, row_keys(negative_key, sequences))
        number_I = jnp.arange(len(table_ID), dtype=jnp.int32)
        if isinstance(entries := model.item_table[...], Entries):  # and so is `table_ID`
            assert drawn is not None  # a full softmax reads the whole table
            number_I = entries.dealt_U
            target_T, drawn = entries.places(target_T), negatives.among(entries, drawn)
            log_q = None if log_q is None else log_q.at[entries.dealt_U].get(mode="fill")
        num_items = None if batch.items_1 is None else batch.items_1[0]
        if model.mixture is not None:
            mixture_key, code_B = jax.random.fold_in(key, 3), model.user_codes(batch)
            return mixture_loss(
                model.mixture,
                h_TD,
                None if code_B is None else code_B[sequences.rows.segment],
                table_ID,
                number_I,
                target_T,
                weight_T,
                drawn,
                shards=shards,
                key=mixture_key,
                key_T=row_keys(mixture_key, sequences),
                log_q=log_q,
                num_items=num_items,
                chunk_rows=config.chunk_rows,
            )
        return softmax_loss(
            h_TD,
            table_ID,
            target_T,
            weight_T,
            drawn,
            temperature=config.temperature,
            l2_normalize=config.l2_normalize,
            chunk_rows=config.chunk_rows,
            log_q=log_q,
            num_items=num_items,
            total=shards.total(jnp.sum(weight_T)),
        )[0]

    def folded(self, params: Params) -> tuple["Recipe", Params]:
        """The same model for answers: one with ids alone, whose embeddings have features added.

        Tokens of series need features: such a model stays as it is.
        """
        if self.item_features is None or self.config.features.series:
            return self, params
        config = dataclasses.replace(self.config, features=FeatureConfig())
        table_ID = self.model(params).all_items()
        return dataclasses.replace(self, config=config, item_features=None), folded(
            params, table_ID
        )

    def _negatives(
        self, batch: Batch, key_T: Key[Array, " t"]
    ) -> tuple[Negatives | None, Float[Array, " I1"] | None]:
        """How negatives are drawn, None for all items, and what corrects for their frequency."""
        config = self.config.loss
        match config.kind:
            case "sampled":
                items = self.num_items if batch.items_1 is None else batch.items_1[0]
                return negatives.drawn_uniformly(
                    key_T, config.negatives, items, rows_per_draw=config.rows_per_draw
                ), None
            case "in_batch":
                target_T = self.shards.of_groups(self.shards.whole(batch.target_T))
                pool = negatives.in_batch_pool(target_T)
                return negatives.drawn_from(
                    pool, key_T, config.negatives, rows_per_draw=config.rows_per_draw
                ), jnp.asarray(self._log_q) if config.log_q else None
            case "full":
                return None, None
            case unknown:
                assert_never(unknown)

    @functools.cached_property
    def _log_q(self) -> Float32[np.ndarray, " I1"]:
        if self.target_counts is None:
            raise ValueError(
                "loss.kind='in_batch' with loss.log_q=True needs the counts of the training "
                "targets: give Recipe target_counts, or set loss.log_q=False"
            )
        return negatives.log_frequency(self.target_counts)


def there_are(items_1: Int[Array, " n"] | None, table_ID: Array) -> Bool[Array, " I1"] | None:
    """Which entries of a table are items, where it has room for more; None: all but padding."""
    if items_1 is None:
        return None
    item_I = jnp.arange(table_ID.shape[0], dtype=jnp.int32)
    return (item_I > 0) & (item_I <= items_1[0])
