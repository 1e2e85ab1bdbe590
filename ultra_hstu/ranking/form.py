"""The form of a ranking run: its channels, how requests are laid out, and sizes of its data.

A model is built from this and a configuration; the data itself is in `ranking.task`.
"""

import dataclasses

import numpy as np

from ultra_hstu.config import Config, Kind
from ultra_hstu.model_config import ChannelConfig
from ultra_hstu.ranking.batch import Form

EVERYTHING = "events"  # the one channel of a run without a mixture of transducers


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a ranking model must know of its data."""

    items: int
    signals: tuple[int, ...]  # codes of each, 0 (none) counted
    features: tuple[int, ...]
    contextual: tuple[int, ...]
    kinds: tuple[Kind, ...]  # of the tasks
    timestamps: bool


def channels(config: Config) -> dict[str, ChannelConfig]:
    """The transducers of a run: those of `model.channels`, or one over all events."""
    return dict(config.model.channels) or {
        EVERYTHING: ChannelConfig(max_history=config.data.max_history, layers=config.model.layers)
    }


def form(config: Config) -> Form:
    """How requests are laid out for serving.

    With `rank.supervise="all"` no item was trained with `max_history` events before it.
    """
    everywhere = config.rank.supervise == "all"
    return Form(
        contextual=len(config.rank.contextual),
        interleaved=config.rank.input == "interleaved",
        backwards=config.rank.positions == "backwards" and not everywhere,
        max_history=tuple(
            (name, channel.max_history - everywhere) for name, channel in channels(config).items()
        ),
    )


def num_rows[Count: (int, np.ndarray)](
    config: Config, history: Count, targets: int | Count
) -> Count:
    """Rows of a request with `history` events.

    They are contextual tokens, history (two rows an event if interleaved) and targets.
    """
    layout = form(config)
    return layout.contextual + layout.per_event * history + targets
