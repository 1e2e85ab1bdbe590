"""The whole model of a ranking run: requests in, one logit for each target and task out."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ultra_hstu.config import Config
from ultra_hstu.nn.dropout import KeyOrNone, split_key
from ultra_hstu.nn.heads import MultiTaskHead
from ultra_hstu.nn.hstu import HSTU
from ultra_hstu.parallel.shards import Shards
from ultra_hstu.ranking import source as rank_source
from ultra_hstu.ranking.batch import RankBatch
from ultra_hstu.ranking.source import Sizes
from ultra_hstu.ranking.tokens import TokenEmbedding


class Ranker(nnx.Module):
    """Embeds the tokens of every channel, encodes each channel with its own transducer, and joins what they say of a target in one head.

    With `model.channels` this is the mixture of transducers of ULTRA-HSTU (arXiv 2602.16986): each signal type has its own history, length
    and depth; candidates, contextual tokens and embedding tables are shared; the candidate's outputs are concatenated. Without it there is
    one channel, of all events. Holds parameters only: dropout takes its key at the call.
    """

    def __init__(self, config: Config, sizes: Sizes, *, rngs: nnx.Rngs):
        model, channels = config.model, rank_source.channels(config)
        self.form, self.sizes = rank_source.form(config), sizes
        if model.truncate_length is not None:  # events, and the encoder counts rows
            model = dataclasses.replace(
                model,
                truncate_length=rank_source.rows(
                    config, model.truncate_length, -len(config.rank.contextual)
                ),
            )
        self.shards = shards = Shards.of(config)
        positions = max(channel.max_history for channel in channels.values()) + 1
        self.embedding = TokenEmbedding(
            sizes,
            model.width,
            positions,
            dropout_rate=model.input_dropout,
            dtype=jnp.dtype(model.dtype),
            shards=shards,
            rngs=rngs,
        )
        self.encoders = nnx.Dict(
            {
                name: HSTU.from_config(
                    model,
                    rank_source.rows(config, channel.max_history, config.rank.targets),
                    layers=channel.layers,
                    extra_rows=rank_source.rows(config, 0, config.rank.targets),
                    contextual=len(config.rank.contextual),
                    shards=shards,
                    rngs=rngs,
                )
                for name, channel in channels.items()
            }
        )
        self.head = MultiTaskHead(
            len(channels) * model.width,
            config.rank.head_width,
            len(sizes.kinds),
            chunk_rows=model.chunk_rows,
            rngs=rngs,
        )

    def encode(self, batch: RankBatch, *, rngs: KeyOrNone = None) -> Float[Array, "P D"]:
        """What the encoders say of each predicted row, the channels side by side; input of `head`. Empty places hold anything.

        In a mesh: of this device's part of the predicted rows, as `Shards.part` divides their labels.

        Args:
          rngs: a key turns dropout on and decides it; None leaves it out.
        """
        outputs = []
        for (name, encoder), key in zip(
            sorted(self.encoders.items()), split_key(rngs, len(self.encoders)), strict=True
        ):
            tokens = batch.channels[name]
            embedding_key, encoder_key = split_key(key, 2)
            outputs.append(
                encoder.rows(
                    self.embedding(tokens, embedding_key),
                    tokens.sequences,
                    tokens.row_P,
                    encoder_key,
                )
            )
        return jnp.concatenate(outputs, axis=1)
