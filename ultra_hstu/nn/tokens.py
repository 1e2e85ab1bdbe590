"""From the tokens of a ranking batch to the input of an encoder."""

import math
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ultra_hstu.data.rank_source import Sizes
from ultra_hstu.data.ranking import GAP_SIZE, Tokens
from ultra_hstu.nn import initializers
from ultra_hstu.nn.dropout import KeyOrNone, dropout
from ultra_hstu.nn.embeddings import CodeEmbedding


class TokenEmbedding(nnx.Module):
    """`dropout(sqrt(D) * (item + sum of signals + sum of features + contextual feature) + position + time gap)`.

    What a token does not have adds nothing: a target has no signals, an action token no item. Shared by all channels of a mixture.
    The sum of signals is the heterogeneous action encoding of ULTRA-HSTU (arXiv 2602.16986), whose exact list of fields is not published.
    """

    def __init__(self, sizes: Sizes, width: int, positions: int, *, dropout_rate: float, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        """
        Args:
          positions: the highest position of a token; it counts events.
        """
        self.item_table = initializers.param(initializers.truncated_normal_002, rngs, sizes.items + 1, width)
        self.signals = CodeEmbedding(sizes.signals, width, rngs=rngs) if sizes.signals else None
        self.features = CodeEmbedding(sizes.features, width, rngs=rngs) if sizes.features else None
        all_contextual = 1 + sum(size - 1 for size in sizes.contextual)
        self.contextual = CodeEmbedding((all_contextual,), width, rngs=rngs) if sizes.contextual else None
        self.position_table = initializers.param(initializers.truncated_normal_002, rngs, positions + 1, width)
        self.gaps = CodeEmbedding((GAP_SIZE,), width, rngs=rngs) if sizes.timestamps else None
        self.dropout_rate, self.dtype = dropout_rate, dtype

    def __call__(self, tokens: Tokens, key: KeyOrNone = None) -> Float[Array, "T D"]:
        width = self.item_table.shape[1]
        item_TD = jnp.where((tokens.item_T > 0)[:, None], self.item_table[...][tokens.item_T], 0.0)
        codes = (self.signals, tokens.signal_TS), (self.features, tokens.feature_TF), (self.contextual, tokens.context_T[:, None])
        content_TD = sum((embed(code_TS) for embed, code_TS in codes if embed is not None), item_TD)
        x_TD = math.sqrt(width) * content_TD + self.position_table[...][tokens.position_T]
        if self.gaps is not None:
            x_TD += self.gaps(tokens.gap_T[:, None])
        real_T = jnp.arange(x_TD.shape[0]) < tokens.offsets[-1]
        return jnp.where(real_T[:, None], dropout(x_TD, self.dropout_rate, key), 0.0).astype(self.dtype)
