"""From the tokens of a ranking batch to the input of an encoder."""

import math
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ultra_hstu.nn import initializers
from ultra_hstu.nn.dropout import KeyOrNone, dropout, row_keys
from ultra_hstu.nn.embeddings import CodeEmbedding
from ultra_hstu.parallel.embedding_sharding import lookup
from ultra_hstu.parallel.shards import ONE, Shards
from ultra_hstu.ranking.batch import GAP_SIZE, Tokens
from ultra_hstu.ranking.source import Sizes


class TokenEmbedding(nnx.Module):
    """`dropout(sqrt(D) * (item + sum of signals + sum of features + contextual feature) + position + time gap)`.

    What a token does not have adds nothing: a target has no signals, an action token no item. Shared by all channels of a mixture.
    The sum of signals is the heterogeneous action encoding of ULTRA-HSTU (arXiv 2602.16986), whose exact list of fields is not published.
    """

    def __init__(
        self,
        sizes: Sizes,
        width: int,
        positions: int,
        *,
        dropout_rate: float,
        dtype: Any = jnp.float32,
        shards: Shards = ONE,
        rngs: nnx.Rngs,
    ):
        """
        Args:
          positions: the highest position of a token; it counts events.
        """
        self.item_table = initializers.table(
            initializers.truncated_normal_002, rngs, sizes.items + 1, width
        )
        self.signals = CodeEmbedding(sizes.signals, width, rngs=rngs) if sizes.signals else None
        self.features = CodeEmbedding(sizes.features, width, rngs=rngs) if sizes.features else None
        all_contextual = 1 + sum(size - 1 for size in sizes.contextual)
        self.contextual = (
            CodeEmbedding((all_contextual,), width, rngs=rngs) if sizes.contextual else None
        )
        self.position_table = initializers.table(
            initializers.truncated_normal_002, rngs, positions + 1, width
        )
        self.gaps = CodeEmbedding((GAP_SIZE,), width, rngs=rngs) if sizes.timestamps else None
        self.dropout_rate, self.dtype, self.shards = dropout_rate, dtype, shards

    def __call__(self, tokens: Tokens, key: KeyOrNone = None) -> Float[Array, "t D"]:
        """In a mesh: this device's rows of the T."""
        shards, rows = self.shards, tokens.item_T.shape[0]
        row_t, real_t = shards.rows(rows), shards.real(tokens.offsets, rows)
        item_t, position_t, gap_t = shards.local((tokens.item_T, tokens.position_T, tokens.gap_T))
        codes = [
            (self.signals, tokens.signal_TS),
            (self.features, tokens.feature_TF),
            (self.contextual, tokens.context_T[:, None]),
        ]
        item_tD = lookup(self.item_table[...], jnp.where(item_t > 0, item_t, -1), shards)
        content_tD = sum(
            (embed(shards.local(code_TS)) for embed, code_TS in codes if embed is not None), item_tD
        )
        x_tD = math.sqrt(self.item_table.shape[1]) * content_tD + lookup(
            self.position_table[...], jnp.where(real_t, position_t, -1), shards
        )
        if self.gaps is not None:
            x_tD += self.gaps(gap_t[:, None])
        keys_t = row_keys(
            key, tokens.offsets, row_t, shards.first_sequence(tokens.offsets.shape[0] - 1)
        )
        return jnp.where(real_t[:, None], dropout(x_tD, self.dropout_rate, keys_t), 0.0).astype(
            self.dtype
        )
