"""From the tokens of a ranking batch to the input of an encoder."""

import math

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ultra_hstu.nn.dropout import KeyOrNone, dropout, row_keys
from ultra_hstu.nn.embeddings import CodeEmbedding
from ultra_hstu.nn.initializers import table, truncated_normal, truncated_normal_002
from ultra_hstu.nn.item_features import ItemCodes, ItemFeatures
from ultra_hstu.parallel.embedding_sharding import lookup
from ultra_hstu.parallel.shards import ONE, Shards
from ultra_hstu.ranking.batch import GAP_SIZE, Tokens
from ultra_hstu.ranking.form import Sizes


class TokenEmbedding(nnx.Module):
    """`dropout(sqrt(D) * (item + signals + features + contextual feature) + position + time gap)`.

    Signals and features are summed; features of an item are part of the item. What a token does not
    have adds nothing: a target has no signals, an action token no item. All channels of a mixture
    share the module. The sum of signals is the heterogeneous action encoding of ULTRA-HSTU (arXiv
    2602.16986), whose list of fields is not published.
    """

    def __init__(
        self,
        sizes: Sizes,
        width: int,
        positions: int,
        *,
        item_features: ItemCodes | None = None,
        hidden_width: int = 0,
        item_std: float = 0.02,
        dropout_rate: float,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """
        Args:
          positions: the highest position of a token; it counts events.
          item_features, hidden_width: what is known of items, as of `ItemFeatures`; None: nothing.
          item_std: as of `InputEmbedding`.
        """
        self.item_table = table(truncated_normal(item_std), rngs, sizes.items + 1, width)

        def codes(*columns: int) -> CodeEmbedding | None:
            return CodeEmbedding(columns, width, rngs=rngs) if columns else None

        self.signals, self.features = codes(*sizes.signals), codes(*sizes.features)
        all_contextual = 1 + sum(size - 1 for size in sizes.contextual)
        self.contextual = codes(all_contextual) if sizes.contextual else None
        self.position_table = table(truncated_normal_002, rngs, positions + 1, width)
        self.gaps = codes(GAP_SIZE) if sizes.timestamps else None
        self.item_features = (
            None
            if item_features is None
            else ItemFeatures(item_features, width, hidden_width=hidden_width, rngs=rngs)
        )
        self.dropout_rate, self.dtype = dropout_rate, dtype

    def __call__(
        self,
        tokens: Tokens,
        key: KeyOrNone = None,
        shards: Shards = ONE,
        with_id_I: Bool[Array, " I1"] | None = None,
    ) -> Float[Array, "t D"]:
        """This device's rows of the T.

        Args:
          with_id_I: the items that have a vector of their own beside their features; None: all.
        """
        sequences = tokens.sequences.on(shards)
        real_t = sequences.rows.real
        item_t, position_t, gap_t = shards.local((tokens.item_T, tokens.position_T, tokens.gap_T))
        signal_tS, feature_tF, context_t = shards.local(
            (tokens.signal_TS, tokens.feature_TF, tokens.context_T)
        )
        codes = [
            (self.signals, signal_tS),
            (self.features, feature_tF),
            (self.contextual, context_t[:, None]),
        ]
        has_id_t = item_t > 0 if with_id_I is None else (item_t > 0) & with_id_I[item_t]
        content_tD = lookup(self.item_table[...], jnp.where(has_id_t, item_t, -1), shards)
        if self.item_features is not None:
            content_tD = content_tD + self.item_features(item_t)
        for embed, code_tS in codes:
            if embed is not None:
                content_tD = content_tD + embed(code_tS)
        position_t = jnp.where(real_t, position_t, -1)
        position_tD = lookup(self.position_table[...], position_t, shards)
        x_tD = math.sqrt(self.item_table.shape[1]) * content_tD + position_tD
        if self.gaps is not None:
            x_tD += self.gaps(gap_t[:, None])
        x_tD = dropout(x_tD, self.dropout_rate, row_keys(key, sequences))
        return jnp.where(real_t[:, None], x_tD, 0.0).astype(self.dtype)
