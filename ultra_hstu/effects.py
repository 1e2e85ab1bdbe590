"""Which fields of a configuration have no effect, and why.

A configuration may hold them, as one that was made from another does; that somebody sets one is a
mistake. (Not of `parallel`: a command with its flags may go on with a run on fewer devices, even on
one.) `Config.validate` refuses fields that contradict each other in any case.
"""

import dataclasses
from collections.abc import Iterator

from ultra_hstu.config import Config
from ultra_hstu.feature_config import Spelled
from ultra_hstu.model_config import CHANNEL_OPTIONS
from ultra_hstu.sections import GENERATED
from ultra_hstu.table_config import RULES

TARGETS = ("input", "targets", "train_targets", "requests", "positions", "supervise", "head_width")
FRACTIONS = ("validation_fraction", "test_fraction")


def without_effect(config: Config) -> dict[str, str]:
    """The whole names of fields and sections that nothing reads: name -> why, and what to do."""
    return dict(_data(config)) | dict(_model(config)) | dict(_others(config))


def require_effect(config: Config, field: str) -> None:
    """Raises ValueError for a field that was set, such as "model.layers", and has no effect."""
    for name, why in without_effect(config).items():
        if field == name or field.startswith(f"{name}."):
            raise ValueError(f"--config.{field} has no effect {why}")


def _data(config: Config) -> Iterator[tuple[str, str]]:
    data, table = config.data, config.data.table
    if config.model.channels and not data.load_balance:
        yield "data.max_history", _of_channels(config, "max_history")
    if data.ties != "random":
        yield "data.ties_seed", f"under data.ties={data.ties}: set data.ties=random"
    if config.train.protocol != "temporal":
        why = f"under train.protocol={config.train.protocol}"
        yield "data.temporal_test_fraction", f"{why}: 'temporal' reads it"
    if config.train.protocol != "new_users":
        why = f"under train.protocol={config.train.protocol}"
        yield "data.new_users_fraction", f"{why}: 'new_users' reads it"
    if config.train.protocol != "windows":
        yield "windows", f"under train.protocol={config.train.protocol}: 'windows' reads it"
    elif config.rank.tasks:
        yield "windows.targets", "for ranking, which asks about all events of a window"
    if data.stochastic_length is None:
        yield "data.subsequence", "without data.stochastic_length, which cuts histories"
    if not data.load_balance:
        yield "data.recalibrate_every", "without data.load_balance"
    why = f"under data.source={data.source}"
    for generated in GENERATED:
        if data.source != generated:
            yield f"data.{generated}", why
    if data.source in GENERATED:
        yield "data.table", why
    elif data.source != "table":  # a public set, whose files and columns are known
        for field in dataclasses.fields(table):
            if field.name not in RULES:
                yield f"data.table.{field.name}", why
    if table.sample_users == 1:
        yield "data.table.sample_seed", "without data.table.sample_users"
    if table.items_file is None and data.source == "table":
        for name in ("item_title", "item_separator", "unlisted_items"):
            yield f"data.table.{name}", "without data.table.items_file"


def _model(config: Config) -> Iterator[tuple[str, str]]:
    model = config.model
    for (why, remedy), fields in model.without_effect(config.data.layout).items():
        for name in fields:
            yield f"model.{name}", f"under {why}: {remedy}"
    if model.channels:
        yield "model.layers", _of_channels(config, "layers")
        for name in CHANNEL_OPTIONS[1:]:  # the embeddings have the width of the model
            values = [getattr(channel, name) for channel in model.channels.values()]
            if all(value not in ((), None) for value in values):
                yield f"model.{name}", _of_channels(config, name)
    if model.kind != "hstu":
        names = ("qk_width", "v_width", "preset", "attention", "relative_bias", "time_buckets")
        lacks = () if model.kind == "sasrec" else ("layers", "heads", "output_slots")
        for name in (*names, "implementation", *lacks):
            yield f"model.{name}", f"under model.kind={model.kind}: use hstu"
        return
    instead = "use sasrec, din for ranking, or model.feed_forward"
    yield "model.ffn_width", f"under model.kind=hstu: {instead}"
    if model.attention != "silu":
        yield "model.implementation", f"under model.attention={model.attention}: use silu"
    if not model.relative_bias:
        yield "model.time_buckets", "under model.relative_bias=False"


def _others(config: Config) -> Iterator[tuple[str, str]]:
    loss = config.loss
    if config.rank.tasks:
        yield "loss", "for ranking, whose tasks have losses without options"
        for name in ("hide", "repeats"):
            yield f"eval.{name}", "for ranking, which hides nothing of a history"
    else:
        for name in (*TARGETS, *FRACTIONS):
            yield f"rank.{name}", "without rank.tasks: retrieval asks for the next item"
    if loss.similarity == "dot":
        yield "mol", "under loss.similarity=dot: set loss.similarity=mol"
    elif not config.mol.user_ids:
        for name in ("user_dropout", "user_penalty"):
            yield f"mol.{name}", "without mol.user_ids"
    if loss.kind == "full":
        for name in ("negatives", "rows_per_draw"):
            yield f"loss.{name}", "under loss.kind=full, which scores all items"
    if loss.kind != "in_batch":
        yield "loss.log_q", f"under loss.kind={loss.kind}: in_batch reads it"
    if not config.features.items:
        for name in ("merge", "max_values", "id_dropout"):
            yield f"features.{name}", "without features.items: name columns"
    if not any(Spelled.of(name).mlp for name in config.features.items):
        yield "features.hidden_width", "without a column[mlp] in features.items"
    if config.optim.tables == "same":
        why = "under optim.tables=same: set rowwise_adagrad or lazy_adam"
        yield "optim.tables_learning_rate", why
    if config.rank.supervise == "all":
        yield "rank.positions", "under rank.supervise=all, whose positions are forwards"
        yield "rank.train_targets", "under rank.supervise=all, which has no targets in training"


def _of_channels(config: Config, name: str) -> str:
    """What to set in place of a field that each channel has."""
    own = " or ".join(f"model.channels.{channel}.{name}" for channel in config.model.channels)
    return f"beside model.channels: set {own}"
