"""The section of the encoder, and of the encoders of a mixture."""

import dataclasses
from typing import Annotated, Literal

from ultra_hstu.fields import BelowOne, Limit, NotNegative, Positive, Section
from ultra_hstu.sections import Count

MASKS, CUTS = ("window", "full_rows", "prefix"), ("truncate_after", "truncate_length")
CHANNEL_OPTIONS = ("width", *MASKS, *CUTS)  # of a model, which a channel may have of its own
Rows = tuple[NotNegative[int], ...]
Windows = tuple[Annotated[int, Limit(lambda value: value >= -1, "at least -1")], ...]


@dataclasses.dataclass(frozen=True)
class ChannelConfig(Section):
    """One transducer of a mixture, with a history and an encoder of its own.

    Its history is the newest events whose signal is at least a value. What it leaves out is as
    `model` says.
    """

    signal: str = ""  # an action of the data; "": every event
    at_least: float = 1.0  # of the signal
    max_history: Count = 200  # newest such events kept in front of a target
    layers: Count = 2  # depth of its encoder
    # Of its encoder, to which embeddings are projected; None: model.width, that of the embeddings.
    width: Count | None = None
    # Semi-local attention: one value, or one a layer. (): that of the model; (-1,): none.
    window: Windows = ()
    full_rows: Rows = ()  # (): those of the model; (0,): none
    prefix: Rows = ()  # (): that of the model; (0,): none
    # Attention truncation; None: that of the model.
    truncate_after: Count | None = None
    truncate_length: Count | None = None  # events; None: that of the model


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section):
    # The encoder. Baselines: sasrec of retrieval, din (target attention) of ranking.
    kind: Literal["hstu", "sasrec", "din"] = "hstu"
    width: Count = 50  # D, of an event's embedding and of every layer
    layers: Count = 2  # depth of the encoder
    heads: Count = 1  # H
    qk_width: Count = 50  # K, per head
    v_width: Count = 50  # V, per head
    ffn_width: Count = 50  # of the feed-forward nets of SASRec and DIN
    # The HSTU layer of the published research code, or the production layer.
    preset: Literal["research", "production"] = "research"
    # Hidden width of a feed-forward block behind every HSTU layer; None: none, as published.
    feed_forward: Count | None = None
    # The paper's ablation: softmax as its public code has it, for plain causal retrieval alone;
    # masked_softmax over the keys that a row sees, under any mask and for ranking.
    attention: Literal["silu", "softmax", "masked_softmax"] = "silu"
    relative_bias: bool = True  # position and time-bucket bias inside the SiLU
    # Of that bias, beside bucket 0; 0: it knows no times.
    time_buckets: NotNegative[int] = 128
    # The published padding behind the history: N = max_history + output_slots divides attention.
    output_slots: NotNegative[int] = 11
    # Standard deviation of the initial vectors of items, a normal law that is cut at two of it.
    item_std: Positive[float] = 0.02
    # That of the initial u, v, q and k projections of the research layer; Xavier's is
    # sqrt(2 / (width + their widths)), 0.09 for 50 and four times 50.
    uvqk_std: Positive[float] = 0.02
    input_dropout: BelowOne[float] = 0.2  # of the embedded events
    linear_dropout: BelowOne[float] = 0.2  # inside every layer
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters are float32
    implementation: str | None = None  # of kernels.hstu_attention; None: the best for the device
    # Production layer: factor on the scores. None: 1 / sqrt(qk_width).
    alpha: Positive[float] | None = None
    # Semi-local attention, see kernels.mask: one value for all layers, or one a layer. An event
    # sees so many before it; -1: all.
    window: Windows = ()
    full_rows: Rows = ()  # so many newest events, and all targets, see everything before them
    # So many oldest positions are seen by everything behind them.
    prefix: Rows = ()
    # Attention truncation: so many layers work on the whole sequence, the others on its newest end.
    truncate_after: Count | None = None
    truncate_length: Count | None = None  # events of that end
    # Attention is divided by N. kept: above a truncation by the most rows that it leaves, as the
    # published L2STU. length: by the rows of each sequence, without targets.
    divide_by: Literal["constant", "kept", "length"] = "constant"
    # Mixture of transducers, by name; empty: one transducer over all events, with `layers`.
    channels: dict[str, ChannelConfig] = dataclasses.field(default_factory=dict)
    # Precision of the uvqk and output projections in the forward; "same" follows dtype.
    projection: Literal["same", "fp8"] = "same"
    # Of the products that make gradients of the inputs of those projections; fp8 needs
    # projection="fp8".
    projection_gradient: Literal["same", "fp8"] = "same"
    # Of kernels.norm_linear and kernels.gated_linear; None: the best for the device.
    layer_implementation: str | None = None
    # What the backward computes again instead of keeping it.
    remat: Literal["none", "selective"] = "none"
    # Mini-sequences: rows that token-wise parts work on at one time; None: all.
    chunk_rows: Count | None = None

    @property
    def encoders(self) -> dict[str, "ModelConfig"]:
        """What the encoder of each channel is made from; of a run without channels one, by ""."""
        if not self.channels:
            return {"": self}
        return {name: self._of_channel(channel) for name, channel in self.channels.items()}

    def _of_channel(self, channel: ChannelConfig) -> "ModelConfig":
        given = {name: getattr(channel, name) for name in CHANNEL_OPTIONS}
        own = {name: value for name, value in given.items() if value not in ((), None)}
        return dataclasses.replace(self, layers=channel.layers, channels={}, **own)

    def check(self, layout: str) -> None:
        """Raises ValueError for options that do not fit together, or that only some encoders have.

        Args:
          layout: `data.layout`.
        """
        if self.kind == "sasrec" and self.width % self.heads:
            raise ValueError(
                f"model.width={self.width} must be a multiple of model.heads={self.heads} for "
                "SASRec"
            )
        for channel, encoder in self.encoders.items():
            self._check_layers(channel, encoder)
        if self.divide_by == "kept" and not any(
            encoder.truncate_after for encoder in self.encoders.values()
        ):
            raise ValueError(
                "model.divide_by='kept' divides by what a truncation leaves, and there is none: "
                "set model.truncate_after and model.truncate_length, or use 'constant' or 'length'"
            )
        for (why, remedy), names in self.without_effect(layout).items():
            self._check_idle(names, f"does nothing under {why}: {remedy}, or leave it out")

    def without_effect(self, layout: str) -> dict[tuple[str, str], tuple[str, ...]]:
        """The fields that do nothing here, by why and by what to do."""
        without: dict[tuple[str, str], tuple[str, ...]] = {}
        if self.kind != "hstu":
            of_layer = ("alpha", "projection", "projection_gradient", "layer_implementation")
            saves = () if self.kind == "sasrec" else ("remat", "chunk_rows")
            lacks = (*MASKS, *CUTS, "divide_by", *of_layer, "feed_forward", "uvqk_std", *saves)
            without[f"model.kind={self.kind!r}", "use 'hstu'"] = lacks
        if self.projection == "same":
            why = "model.projection='same', whose gradients follow dtype"
            without[why, "use projection='fp8'"] = ("projection_gradient",)
        if self.attention == "softmax":
            without["model.attention='softmax', which is plain causal", "use 'masked_softmax'"] = (
                MASKS
            )
        if self.attention != "silu":
            why = f"model.attention={self.attention!r}, whose weights sum to 1"
            without[why, "use 'silu'"] = ("divide_by",)
        if self.preset == "production":
            why = "model.preset='production', whose projections start from Xavier's values"
            without[why, "use 'research'"] = ("uvqk_std",)
        if self.preset == "research":
            why = "model.preset='research', whose scores have no factor"
            without[why, "use 'production'"] = ("alpha",)
        if layout == "padded":
            why = "data.layout='padded', whose newest rows are padding"
            without[why, "use 'jagged'"] = ("full_rows",)
        return without

    def _check_idle(self, names: tuple[str, ...], why: str) -> None:
        """Raises ValueError for a field that is given, of the model or of a channel."""
        channels = {f"channels.{name}.": channel for name, channel in self.channels.items()}
        for place, section in ({"": self} | channels).items():
            for name in names:
                value = getattr(section, name, None)
                nothing = isinstance(value, tuple) and set(value) <= {0}
                if not nothing and value != getattr(type(section)(), name, None):
                    raise ValueError(f"model.{place}{name}={value!r} {why}")

    def _check_layers(self, channel: str, encoder: "ModelConfig") -> None:
        """Values of an encoder that do not suit its depth."""
        own = self.channels.get(channel)

        def field(name: str) -> str:
            given = own is not None and (name == "layers" or getattr(own, name) not in ((), None))
            return f"model.{f'channels.{channel}.' if given else ''}{name}={getattr(encoder, name)}"

        after, length, layers = encoder.truncate_after, encoder.truncate_length, encoder.layers
        if (after is None) != (length is None):
            cut = " and ".join(map(field, CUTS))
            raise ValueError(f"{cut}: give both, or neither")
        for name in MASKS:
            if len(getattr(encoder, name)) not in (0, 1, layers):
                each = f"one value, or one for each of {field('layers')}"
                raise ValueError(f"{field(name)} must hold {each}")
        if after is not None and after >= layers:
            raise ValueError(f"{field('truncate_after')} must be below {field('layers')}")
