"""The whole model of a run: item ids of a batch in, one vector a row out."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ultra_hstu.config import ModelConfig
from ultra_hstu.nn.dropout import KeyOrNone, split_key
from ultra_hstu.nn.embeddings import NO_CODES, CodeSizes, InputEmbedding
from ultra_hstu.nn.hstu import HSTU
from ultra_hstu.nn.item_features import ItemCodes
from ultra_hstu.nn.sasrec import SASRec
from ultra_hstu.nn.truncation import Kept
from ultra_hstu.parallel.embedding_sharding import Entries, whole_table
from ultra_hstu.parallel.shards import ONE, Shards
from ultra_hstu.retrieval.batch import Batch
from ultra_hstu.retrieval.mol import MixtureOfLogits
from ultra_hstu.sequences import Activations, Sequences

WithId = Bool[Array, " I1"] | None
ENCODERS: dict[str, type[HSTU] | type[SASRec]] = {"hstu": HSTU, "sasrec": SASRec}


class Recommender(nnx.Module):
    """Embeds a batch and encodes it.

    Scores are dot products (or cosines) of its output with `item_table`, or mixtures of logits of
    the two; see `loss`, `mol` and `metrics`.
    The module holds parameters only: dropout takes its key at the call. The mesh comes with the
    call too (`shards`); rows [T, D] are then those of this device.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_items: int,
        max_history: int,
        *,
        codes: CodeSizes = NO_CODES,
        item_features: ItemCodes | None = None,
        hidden_width: int = 0,
        mixture: Callable[[nnx.Rngs], MixtureOfLogits] | None = None,
        rngs: nnx.Rngs,
    ):
        """
        Args:
          num_items: I; ids are 1..I.
          max_history: rows of the longest sequence. N, which attention is divided by, is
            `max_history + config.output_slots`.
          codes: how many codes there are of what a token holds beside its item.
          item_features, hidden_width: what is known of items, as of `ItemFeatures`; None: nothing.
          mixture: makes what scores items; None: scores are products.
        """
        length = max_history + config.output_slots
        self.embedding = InputEmbedding(
            num_items,
            config.width,
            length,
            codes=codes,
            item_features=item_features,
            hidden_width=hidden_width,
            item_std=config.item_std,
            dropout_rate=config.input_dropout,
            dtype=jnp.dtype(config.dtype),
            rngs=rngs,
        )
        self.encoder = ENCODERS[config.kind].from_config(config, length, rngs=rngs)
        self.mixture = None if mixture is None else mixture(rngs)
        self.num_items = num_items

    @property
    def item_table(self) -> nnx.Param:
        """Item embeddings [I + 1, D], float32; entry 0 is padding.

        In a mesh this is the device's part of them, see `all_items`.
        """
        return self.embedding.item_table

    def all_items(self, shards: Shards = ONE, with_id_I: WithId = None) -> Float[Array, "I1 D"]:
        """The vectors that items are scored by: their embeddings, on all devices, and features."""
        table, features = self.item_table[...], self.embedding.item_features
        table_ID = whole_table(table, self.num_items + 1, shards)
        item_U = None
        if isinstance(table, Entries):  # the items that a step reads, and numbers of none
            item_U = jnp.minimum(table.dealt_U, self.num_items)
        if with_id_I is not None:
            with_id_I = with_id_I if item_U is None else with_id_I[item_U]
            table_ID = jnp.where(with_id_I[:, None], table_ID, 0.0)
        if features is None:
            return table_ID
        return table_ID + (features.all() if item_U is None else features(item_U))

    def users(self, batch: Batch, shards: Shards = ONE) -> Float[Array, "b D"]:
        """The vectors of the batch's users, the output of each one's last row.

        In a mesh they are divided as `Shards.part` divides them.
        """
        x_TD, sequences, _ = self._input(batch, shards)
        return self.encoder.rows(x_TD, sequences, batch.last_row_B)

    def queries(self, batch: Batch, shards: Shards = ONE) -> Float[Array, "b X"]:
        """What items are scored for: `users`, with the components of their ids behind them."""
        users_bD, code_B = self.users(batch, shards), self.user_codes(batch)
        if self.mixture is None or code_B is None:
            return users_bD
        of_id_bW = self.mixture.of_ids(shards.part(code_B), shards)
        return jnp.concatenate([users_bD.astype(jnp.float32), of_id_bW], axis=1)

    def user_codes(self, batch: Batch) -> Int[Array, " B"] | None:
        """Codes of the users' ids, 0 where a batch has none; None where the model reads none."""
        if self.mixture is None or self.mixture.user_table is None:
            return None
        if batch.user_B is None:
            return jnp.zeros(batch.offsets.shape[0] - 1, jnp.int32)
        return jnp.asarray(batch.user_B)

    def encode(self, batch: Batch, *, shards: Shards = ONE, key: KeyOrNone = None) -> Activations:
        """The output of the encoder, before any L2 norm, in the dtype of the config.

        Args:
          batch: flat rows, jagged or padded. What its rows of padding hold does not matter, nor
            does what comes out there.
          key: turns dropout on and decides it; None leaves it out.
        """
        return self.encoder(*self._input(batch, shards, key))

    def encode_kept(
        self,
        batch: Batch,
        *,
        shards: Shards = ONE,
        key: KeyOrNone = None,
        with_id_I: WithId = None,
    ) -> Kept:
        """`encode` without the rows that an attention truncation drops, and which rows are left.

        None stands for all of them.

        Args:
          with_id_I: the items that have an embedding beside their features; None: all.
        """
        return self.encoder.encode_kept(*self._input(batch, shards, key, with_id_I))

    def _input(
        self, batch: Batch, shards: Shards, key: KeyOrNone = None, with_id_I: WithId = None
    ) -> tuple[Activations, Sequences, KeyOrNone]:
        embedding_key, encoder_key = split_key(key, 2)
        sequences = batch.sequences.on(shards)
        x_TD = self.embedding(
            batch.item_T,
            sequences,
            embedding_key,
            signal_TS=batch.signal_TS,
            with_id_I=with_id_I,
            series=batch.series,
        )
        return x_TD, sequences, encoder_key
