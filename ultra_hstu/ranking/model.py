"""The whole model of a ranking run: requests in, one logit for each target and task out."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from ultra_hstu.config import Config
from ultra_hstu.nn.din import DIN
from ultra_hstu.nn.dropout import KeyOrNone, split_key
from ultra_hstu.nn.heads import MultiTaskHead
from ultra_hstu.nn.hstu import HSTU
from ultra_hstu.nn.initializers import param, xavier_uniform
from ultra_hstu.nn.item_features import ItemCodes
from ultra_hstu.parallel.shards import ONE, Shards
from ultra_hstu.ranking import form
from ultra_hstu.ranking.batch import RankBatch, Tokens
from ultra_hstu.ranking.tokens import TokenEmbedding

ENCODERS: dict[str, type[HSTU] | type[DIN]] = {"hstu": HSTU, "din": DIN}


class Ranker(nnx.Module):
    """Embeds the tokens of every channel, encodes each channel, and joins the outputs in one head.

    With `model.channels` this is the mixture of transducers of ULTRA-HSTU (arXiv 2602.16986): each
    signal type has its own history and encoder; candidates, contextual tokens and embedding tables
    are shared; the candidate's outputs are concatenated. An encoder of another width than theirs
    gets the embeddings through a matrix. Without a mixture there is one channel, of all events. The
    module holds parameters only: dropout takes its key at the call.
    """

    def __init__(
        self,
        config: Config,
        sizes: form.Sizes,
        item_features: ItemCodes | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        """
        Args:
          item_features: what is known of items beside their ids; None: nothing.
        """
        model, rank, channels = config.model, config.rank, form.channels(config)
        self.form, self.sizes = form.form(config), sizes
        self.max_targets, self.max_contextual = rank.targets, len(rank.contextual)
        self.embedding = TokenEmbedding(
            sizes,
            model.width,
            positions=max(channel.max_history for channel in channels.values()) + 1,
            item_features=item_features,
            hidden_width=config.features.hidden_width,
            item_std=model.item_std,
            dropout_rate=model.input_dropout,
            dtype=jnp.dtype(model.dtype),
            rngs=rngs,
        )

        made = dict(zip(channels, model.encoders.values(), strict=True))
        self.inputs = nnx.Dict(
            {
                name: param(xavier_uniform, rngs, model.width, own.width)
                for name, own in made.items()
                if own.width != model.width
            }
        )
        special = self.max_contextual + self.max_targets

        def encoder(name: str) -> HSTU | DIN:
            own, per_event = made[name], self.form.per_event
            if own.truncate_length is not None:  # events, and the encoder counts rows
                own = dataclasses.replace(own, truncate_length=per_event * own.truncate_length)
            own = dataclasses.replace(own, output_slots=special)
            length = form.num_rows(config, channels[name].max_history, self.max_targets)
            return ENCODERS[own.kind].from_config(own, length, rngs=rngs)

        self.encoders = nnx.Dict({name: encoder(name) for name in channels})
        self.head = MultiTaskHead(
            sum(own.width for own in made.values()),
            rank.head_width,
            len(sizes.kinds),
            chunk_rows=model.chunk_rows,
            rngs=rngs,
        )

    def input(
        self,
        channel: str,
        tokens: Tokens,
        key: KeyOrNone = None,
        shards: Shards = ONE,
        with_id_I: Bool[Array, " I1"] | None = None,
    ) -> Float[Array, "t D"]:
        """What enters the encoder of a channel; arguments as of `TokenEmbedding`."""
        x_tD = self.embedding(tokens, key, shards, with_id_I)
        if channel not in self.inputs:
            return x_tD
        return x_tD @ self.inputs[channel][...].astype(x_tD.dtype)

    def encode(
        self,
        batch: RankBatch,
        *,
        shards: Shards = ONE,
        key: KeyOrNone = None,
        with_id_I: Bool[Array, " I1"] | None = None,
    ) -> Float[Array, "P D"]:
        """What the encoders say of each predicted row, the channels side by side; input of `head`.

        Empty places hold anything. In a mesh the rows are this device's part of the predicted ones,
        as `Shards.part` divides their labels.

        Args:
          key: turns dropout on and decides it; None leaves it out.
          with_id_I: the items that have an embedding beside their features; None: all.
        """
        outputs = []
        keys = split_key(key, len(self.encoders))
        for (name, encoder), channel_key in zip(sorted(self.encoders.items()), keys, strict=True):
            tokens = batch.channels[name]
            embedding_key, encoder_key = split_key(channel_key, 2)
            x_TD = self.input(name, tokens, embedding_key, shards, with_id_I)
            sequences = dataclasses.replace(
                tokens.sequences,
                shards=shards,
                max_targets=self.max_targets,
                max_contextual=self.max_contextual,
            )
            outputs.append(encoder.rows(x_TD, sequences, tokens.row_P, encoder_key))
        return jnp.concatenate(outputs, axis=1)
