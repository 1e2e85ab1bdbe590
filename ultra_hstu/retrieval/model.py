"""The whole model of a run: item ids of a batch in, one vector a row out."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ultra_hstu.config import ModelConfig
from ultra_hstu.nn.dropout import KeyOrNone, split_key
from ultra_hstu.nn.embeddings import InputEmbedding
from ultra_hstu.nn.hstu import HSTU
from ultra_hstu.nn.sasrec import SASRec
from ultra_hstu.nn.truncation import Cut
from ultra_hstu.parallel.embedding_sharding import whole_table
from ultra_hstu.parallel.shards import ONE, Shards
from ultra_hstu.retrieval.batch import Batch


class Recommender(nnx.Module):
    """Embeds a batch and encodes it. Scores are dot products (or cosines) of its output with `item_table`; see `losses` and `metrics`.

    Holds parameters only: dropout takes its key at the call.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_items: int,
        max_history: int,
        *,
        signals: tuple[int, ...] = (),
        shards: Shards = ONE,
        rngs: nnx.Rngs,
    ):
        """
        Args:
          num_items: I; ids are 1..I.
          signals: how many codes each signal of a token has, 0 (none) counted; without any a token is its item alone.
          max_history: rows of the longest sequence. N, which attention is divided by, is `max_history + config.output_slots`.
          shards: the mesh in which it runs; rows [T, D] are then those of this device.
        """
        length = max_history + config.output_slots
        options: dict[str, Any] = dict(
            dropout_rate=config.input_dropout,
            dtype=jnp.dtype(config.dtype),
            shards=shards,
            rngs=rngs,
        )
        self.embedding = InputEmbedding(num_items, config.width, length, signals=signals, **options)
        build = HSTU.from_config if config.kind == "hstu" else SASRec.from_config
        self.encoder = build(config, length, shards=shards, rngs=rngs)
        self.num_items, self.shards = num_items, shards

    @property
    def item_table(self) -> nnx.Param:
        """Item embeddings [I + 1, D], float32; row 0 is padding. In a mesh this device's part of them, see `all_items`."""
        return self.embedding.item_table

    def all_items(self) -> Float[Array, "I1 D"]:
        """The item embeddings of all devices."""
        return whole_table(self.item_table[...], self.num_items + 1, self.shards)

    def users(self, batch: Batch) -> Float[Array, "b D"]:
        """The vectors of the batch's users, as `Shards.part` divides them: the output of each one's last row."""
        if isinstance(self.encoder, SASRec):
            return self.encode(batch)[batch.last_row_B]
        return self.encoder.rows(self.embed(batch), batch.sequences, batch.last_row_B)

    def encode(self, batch: Batch, *, rngs: KeyOrNone = None) -> Float[Array, "T D"]:
        """The output of the encoder, before any L2 norm, in the dtype of the config.

        Args:
          batch: flat rows, jagged or padded; what its rows of padding hold does not matter, nor does what comes out there.
          rngs: a key turns dropout on and decides it; None leaves it out.
        """
        embedding_key, encoder_key = split_key(rngs, 2)
        return self.encoder(self.embed(batch, embedding_key), batch.sequences, encoder_key)

    def embed(self, batch: Batch, key: KeyOrNone = None) -> Float[Array, "T D"]:
        """The input of the encoder."""
        return self.embedding(batch.item_T, batch.offsets, key, signal_TS=batch.signal_TS)

    def encode_kept(
        self, batch: Batch, *, rngs: KeyOrNone = None
    ) -> tuple[Float[Array, "S D"], Cut | None]:
        """`encode` without the rows that an attention truncation drops, and which rows are left (None: all)."""
        if isinstance(self.encoder, SASRec):
            return self.encode(batch, rngs=rngs), None
        embedding_key, encoder_key = split_key(rngs, 2)
        return self.encoder.encode_kept(
            self.embed(batch, embedding_key), batch.sequences, encoder_key
        )
