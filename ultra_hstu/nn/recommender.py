"""The whole model of a run: item ids of a batch in, one vector a row out."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ultra_hstu.config import ModelConfig
from ultra_hstu.data.batching import Batch
from ultra_hstu.nn.dropout import KeyOrNone, split_key
from ultra_hstu.nn.embeddings import InputEmbedding
from ultra_hstu.nn.hstu import HSTU
from ultra_hstu.nn.sasrec import SASRec
from ultra_hstu.nn.truncation import Cut


class Recommender(nnx.Module):
    """Embeds a batch and encodes it. Scores are dot products (or cosines) of its output with `item_table`; see `losses` and `metrics`.

    Holds parameters only: dropout takes its key at the call.
    """

    def __init__(self, config: ModelConfig, num_items: int, max_history: int, *, rngs: nnx.Rngs):
        """
        Args:
          num_items: I; ids are 1..I.
          max_history: rows of the longest sequence. N, which attention is divided by, is `max_history + config.output_slots`.
        """
        length = max_history + config.output_slots
        self.embedding = InputEmbedding(
            num_items, config.width, length, dropout_rate=config.input_dropout, dtype=jnp.dtype(config.dtype), rngs=rngs
        )
        build = HSTU.from_config if config.kind == "hstu" else SASRec.from_config
        self.encoder = build(config, length, rngs=rngs)

    @property
    def item_table(self) -> nnx.Param:
        """Item embeddings [I + 1, D], float32; row 0 is padding."""
        return self.embedding.item_table

    def encode(self, batch: Batch, *, rngs: KeyOrNone = None) -> Float[Array, "T D"]:
        """The output of the encoder, before any L2 norm, in the dtype of the config.

        Args:
          batch: flat rows, jagged or padded; what its rows of padding hold does not matter, nor does what comes out there.
          rngs: a key turns dropout on and decides it; None leaves it out.
        """
        embedding_key, encoder_key = split_key(rngs, 2)
        return self.encoder(self.embedding(batch.item_T, batch.offsets, embedding_key), batch.sequences, encoder_key)

    def encode_kept(self, batch: Batch, *, rngs: KeyOrNone = None) -> tuple[Float[Array, "S D"], Cut | None]:
        """`encode` without the rows that an attention truncation drops, and which rows are left (None: all)."""
        if isinstance(self.encoder, SASRec):
            return self.encode(batch, rngs=rngs), None
        embedding_key, encoder_key = split_key(rngs, 2)
        return self.encoder.encode_kept(self.embedding(batch.item_T, batch.offsets, embedding_key), batch.sequences, encoder_key)
