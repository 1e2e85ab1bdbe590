"""The users of a prepared dataset, as `Interactions`."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, Shaped

from ultra_hstu.data.builder import CATALOG, CONTEXTS, InteractionsBuilder
from ultra_hstu.data.catalog import Catalog, few
from ultra_hstu.data.contexts import Contexts
from ultra_hstu.data.interactions import MIN_EVENTS, Interactions
from ultra_hstu.data.strings import STRINGS

_log = logging.getLogger(__name__)
_BATCH = 4096  # users read at once: one by one, every user decompresses its neighbours too


def read(prepared: InteractionsBuilder) -> Interactions:
    """Reads every user with enough events."""
    parts = list(read_parts(prepared))

    def joined(name: str) -> np.ndarray:
        return np.concatenate([part.pop(name) for part in parts])

    users, lengths = joined("users"), joined("lengths")
    described = described_users(prepared, users, lengths)
    return dataclasses.replace(
        described,
        items=joined("items"),
        timestamps=joined("timestamps") if prepared.TICKS else None,
        actions={name: joined(f"actions/{name}") for name in prepared.ACTIONS},
    )


def read_described(prepared: InteractionsBuilder) -> Interactions:
    """`described_users` of all, of whom no events are kept."""
    users, lengths = zip(
        *((part["users"], part["lengths"]) for part in read_parts(prepared)), strict=True
    )
    return described_users(prepared, np.concatenate(users), np.concatenate(lengths))


def described_users(
    prepared: InteractionsBuilder,
    users: Shaped[np.ndarray, " all"],
    lengths: Int64[np.ndarray, " all"],
) -> Interactions:
    """Users with enough events, and what is known of them and of the items; no events.

    Args:
        lengths: events of all users.

    Raises:
        ValueError: no user has enough.
    """
    enough = lengths >= MIN_EVENTS
    if not enough.all():
        _log.warning(
            "dropped %d of %d users with fewer than %d events: %s",
            (~enough).sum(),
            len(users),
            MIN_EVENTS,
            few(users[~enough]),
        )
    if not enough.any():
        raise ValueError(
            f"no user of {prepared.builder_config.name} has {MIN_EVENTS} events or more: nothing "
            "to learn from"
        )
    users = users[enough]
    contexts = Contexts.load(Path(prepared.data_path) / CONTEXTS)
    described_in = prepared.builder_config.context_files
    if contexts.codes and (unknown := ~np.isin(users, contexts.users)).any():
        _log.warning(
            "%d of %d users have no line in %s, so that their features are unknown: %s",
            unknown.sum(),
            len(users),
            ", ".join(described_in),
            few(users[unknown]),
        )
    return Interactions(
        users=users,
        items=np.zeros(0, np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths[enough])]),
        timestamps=np.zeros(0, np.int64) if prepared.TICKS else None,
        actions={name: np.zeros(0, dtype) for name, dtype in prepared.ACTIONS.items()},
        catalog=Catalog.load(Path(prepared.data_path) / CATALOG),
        contexts=contexts.of(users),
        context_values=contexts.values,
        missing_files=tuple(
            name for name in described_in if not (prepared.raw_dir / name).is_file()
        ),
    )


def read_parts(prepared: InteractionsBuilder) -> Iterator[dict[str, np.ndarray]]:
    """Columns of some thousand users after another, as `_batch`."""
    source = prepared.as_data_source("users")
    rows = range(len(source))
    for first_row in rows[::_BATCH]:
        yield _batch(prepared, source.__getitems__(rows[first_row : first_row + _BATCH]))


def _batch(
    prepared: InteractionsBuilder, examples: Sequence[dict[str, Any]]
) -> dict[str, np.ndarray]:
    """All users of these examples, the number of their events, and the events of those with
    enough."""
    users = [example["user"] for example in examples]
    batch = {
        "users": np.array([user.decode() for user in users], STRINGS)
        if prepared.STRING_USERS
        else np.array(users, np.int64),
        "lengths": np.array([len(example["items"]) for example in examples], np.int64),
    }
    columns = {"items": [example["items"] for example in examples]}
    if prepared.TICKS:
        columns["timestamps"] = [example["timestamps"] for example in examples]
    for name in prepared.ACTIONS:
        columns[f"actions/{name}"] = [example["actions"][name] for example in examples]
    kept_E = np.repeat(batch["lengths"] >= MIN_EVENTS, batch["lengths"])
    return batch | {name: np.concatenate(parts)[kept_E] for name, parts in columns.items()}
