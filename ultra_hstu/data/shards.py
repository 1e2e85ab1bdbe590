"""Events on the disk: array_record files, of which batches read the users that they hold.

This is `data.placement="shards"`, for more events than memory. A record is one user, whose events
lie in it one after another, from oldest to newest. What stays in memory is a few numbers a user.
An epoch has the order of all other placements, and a batch the same bits, since any record can be
read at any time: no window is shuffled in place of the whole.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jax.sharding import Mesh
from jaxtyping import Int, Shaped

from ultra_hstu.config import Config, DataConfig
from ultra_hstu.data import generated, sources
from ultra_hstu.data.interactions import ARRAYS, Interactions, load_interactions
from ultra_hstu.data.packing import HostColumns
from ultra_hstu.data.raw import locked
from ultra_hstu.data.table import prepared as table
from ultra_hstu.sequences import SECONDS_RANGE

_log = logging.getLogger(__name__)
SHARD_BYTES = 2**27  # of events, before they are compressed
USERS = 4096  # read at one time where all events pass by
INDEX, FILES = "index.npz", "shards.json"
OPTIONS = "group_size:1,zstd:1"  # a record can be read without its neighbours
INDICES = {"start", "stop", "hide_from"}  # columns of examples that are numbers of events
AS_THEY_ARE = {"user"}  # other columns that batches read

Columns = Mapping[str, Shaped[np.ndarray, " E"]]  # by name, of some events


class ShardedInteractions(Interactions):
    """The users, the catalogue, and where the events are.

    What needs all events in memory raises NotImplementedError.
    """

    def __init__(self, folder: Path):
        """Opens what `write` wrote.

        Raises:
          ValueError: a file that is missing, cut off or damaged, by its name.
        """
        index = Interactions.load(folder / INDEX)
        for field in dataclasses.fields(index):
            if field.name not in ("items", "timestamps", "actions"):
                object.__setattr__(self, field.name, getattr(index, field.name))
        written = _read_files(folder)
        self._keep("dtype", _dtype(index))
        self._keep("first_time", written["first_time"])
        self._keep("known", written["fingerprint"])
        paths = [_checked(folder / name, size) for name, size in written["files"].items()]
        with _named(folder):
            self._keep("source", grain.sources.ArrayRecordDataSource([str(p) for p in paths]))
        self._keep("folder", folder)
        if len(self.source) != len(self.users):
            raise ValueError(
                f"{folder} holds {len(self.source)} users, and its {INDEX} {len(self.users)}: "
                "delete the folder, which is written again"
            )

    source: grain.sources.ArrayRecordDataSource
    dtype: np.dtype
    folder: Path
    first_time: int
    known: dict[str, Any]

    def _keep(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _absent(self) -> NoReturn:
        raise NotImplementedError(
            "data.placement='shards' keeps the events on the disk, and this needs all of them in "
            "memory: use --config.data.placement=stream"
        )

    @property
    def items(self) -> NoReturn:
        self._absent()

    @property
    def timestamps(self) -> NoReturn:
        self._absent()

    @property
    def actions(self) -> NoReturn:
        self._absent()

    @property
    def timed(self) -> bool:
        return "timestamps" in (self.dtype.names or ())

    @property
    def action_names(self) -> list[str]:
        return sorted({*(self.dtype.names or ())} - {"items", "timestamps"})

    @property
    def num_events(self) -> int:
        return int(self.offsets[-1])

    def column(self, name: str) -> Iterator[np.ndarray]:
        for first in range(0, self.num_users, USERS):
            yield self.read(np.arange(first, min(first + USERS, self.num_users)))[name]

    def fingerprint(self) -> dict[str, Any]:
        return self.known

    def read(self, user_n: Int[np.ndarray, " n"]) -> Columns:
        """The events of some users, one user after another.

        Raises:
          ValueError: a record that cannot be read, with the folder and the users.
        """
        with _named(self.folder):
            records = self.source.__getitems__(user_n.tolist())
        events = np.frombuffer(b"".join(records), self.dtype)
        wanted = int((self.offsets[user_n + 1] - self.offsets[user_n]).sum())
        if len(events) != wanted:
            raise ValueError(
                f"{self.folder}: users {user_n.min()} to {user_n.max()} have {len(events)} events, "
                f"not {wanted}: delete the folder, which is written again"
            )
        return {name: events[name] for name in self.dtype.names or ()}


@dataclasses.dataclass(frozen=True, eq=False)
class ShardStore[Events]:
    """An `EventStore` that reads the users of a batch from shards.

    Args:
      make: what batches are gathered from, of the columns of some users.
    """

    interactions: ShardedInteractions
    make: Callable[[Columns], Events]

    @property
    def nbytes(self) -> int:
        """Of all events."""
        return self.interactions.num_events * self.interactions.dtype.itemsize

    @property
    def host(self) -> NoReturn:
        self.interactions._absent()

    def on(self, mesh: Mesh | None) -> NoReturn:
        self.interactions._absent()

    def of(self, parts: Sequence[HostColumns]) -> tuple[Events, list[HostColumns]]:
        """Events of the users of some batches, read together, and the columns in their numbers."""
        column_X = {
            name: np.concatenate([part[name] for part in parts]).astype(np.int64)
            for name in parts[0]
        }
        if unknown := column_X.keys() - INDICES - AS_THEY_ARE:
            raise NotImplementedError(f"data.placement='shards' has no columns {sorted(unknown)}")
        offsets, start_X = self.interactions.offsets, column_X["start"]
        real_X = column_X["stop"] > 0  # the others are empty places
        user_n = np.searchsorted(offsets, start_X[real_X], side="right") - 1
        # A batch of empty places needs an event to point to, too.
        read_n = user_n if len(user_n) else np.zeros(1, np.int64)
        data = self.make(self.interactions.read(read_n))
        length_n = offsets[user_n + 1] - offsets[user_n]
        shift_X = np.zeros(len(start_X), np.int64)
        shift_X[real_X] = np.cumsum(length_n) - length_n - offsets[user_n]
        ends = np.cumsum([len(part["start"]) for part in parts])[:-1]
        columns = {
            name: np.split(np.where(real_X, column + shift_X, 0).astype(np.int32), ends)
            if name in INDICES
            else np.split(column.astype(np.int32), ends)
            for name, column in column_X.items()
        }
        return data, [{name: columns[name][i] for name in columns} for i in range(len(parts))]


# --- writing ---


def check(config: Config) -> None:
    """Raises NotImplementedError for what needs all events in memory, if they are on the disk."""
    rank, data, protocol = config.rank, config.data, config.train.protocol
    cut = data.stochastic_length is not None and data.subsequence != "recent"
    needs = {
        "rank.tasks": (rank.tasks, rank.tasks != ()),
        "rank.features": (rank.features, rank.features != ()),
        "rank.contextual": (rank.contextual, rank.contextual != ()),
        "features.merge": (config.features.merge, config.features.series > 0),
        "train.protocol": (protocol, protocol in ("temporal", "new_users", "windows")),
        "data.subsequence": (data.subsequence, cut),
    }
    for field, (value, in_memory) in needs.items():
        if in_memory and data.placement == "shards":
            raise NotImplementedError(
                f"{field}={value!r} needs all events in memory, and data.placement='shards' keeps "
                "them on the disk: use --config.data.placement=stream"
            )


def load(config: DataConfig) -> ShardedInteractions:
    """The events of a source, written as shards beside its prepared data where they are not yet.

    Raises:
      ValueError: as `load_interactions`; events that a program had in memory.
    """
    if config.source == ARRAYS:
        raise ValueError(
            "data.placement='shards' is for data that is prepared on the disk, and these events "
            "were given in memory: use 'stream'"
        )
    sources.check(config.source)
    if config.source in sources.GENERATED:
        from ultra_hstu.data import synthetic, synthetic_long  # the first takes a second

        versions = {
            sources.SYNTHETIC: str(synthetic.Synthetic.VERSION),
            sources.SYNTHETIC_LONG: synthetic_long.VERSION,
        }
        home = generated.place(config, versions[config.source])
    else:
        home = table.prepare(config, table.open_source(config))
    order = config.ties if config.ties == "stable" else f"{config.ties}-{config.ties_seed}"
    folder = home.with_name(f"{home.name}-shards-{order}")
    return open_or_write(folder, lambda: [load_interactions(config)])


def open_or_write(folder: Path, parts: Callable[[], Iterable[Interactions]]) -> ShardedInteractions:
    """The shards in a folder; written where they are not, or not whole."""
    if folder.exists():
        try:
            return ShardedInteractions(folder)
        except ValueError as error:
            _log.warning("%s: the shards are written again", error)
            shutil.rmtree(folder)
    with locked(folder.with_name(folder.name + ".lock"), f"{folder} must be written"):
        if not folder.exists():
            write(folder, parts())
    return ShardedInteractions(folder)


def write(folder: Path, parts: Iterable[Interactions]) -> None:
    """Writes users, in ascending order, part after part; the folder appears whole or not at all.

    Raises:
      ValueError: no users, or times that span more than a batch can hold.
    """
    _log.info("writing the events as shards in %s", folder)
    made = folder.with_name(folder.name + ".incomplete")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    described: list[Interactions] = []
    early, late = 2**62, -(2**62)
    with _Writer(made) as writer:
        for part in parts:
            events = _records(part)
            for start, stop in itertools.pairwise(part.offsets.tolist()):
                writer.write(events[start:stop].tobytes())
            if part.timestamps is not None and part.num_events:
                early = min(early, int(part.timestamps.min()))
                late = max(late, int(part.timestamps.max()))
            described.append(_without_events(part))
    if not described:
        raise ValueError(f"there are no users to write to {folder}")
    if late - early > SECONDS_RANGE:
        raise ValueError(
            f"times run from {early} to {late}: more than 2^31 - 1 seconds. Give seconds, not "
            "milliseconds."
        )
    _joined(described).save(made / INDEX)
    first_time = early if early <= late else 0
    files = {path.name: path.stat().st_size for path in sorted(made.glob("*.array_record"))}
    _write_files(made, {"files": files, "first_time": first_time, "fingerprint": None})
    # What all events hash to, as if they were in memory: by it a run knows its data.
    fingerprint = Interactions.fingerprint(ShardedInteractions(made))
    _write_files(made, {"files": files, "first_time": first_time, "fingerprint": fingerprint})
    made.rename(folder)


class _Writer:
    """Appends records to shards, one file after another."""

    def __init__(self, folder: Path):
        self.folder, self.count, self.left = folder, 0, 0
        self._open = contextlib.ExitStack()
        self._file: ArrayRecordWriter | None = None

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def write(self, record: bytes) -> None:
        if self._file is None or self.left <= 0:
            self._open.close()
            path = self.folder / f"events-{self.count:05}.array_record"
            self._file = ArrayRecordWriter(str(path), OPTIONS)
            self._open.callback(self._file.close)
            self.count, self.left = self.count + 1, SHARD_BYTES
        self._file.write(record)
        self.left -= len(record)


def _dtype(interactions: Interactions) -> np.dtype:
    """Of an event in a record."""
    fields: list[tuple[str, np.dtype]] = [("items", np.dtype(np.int32))]
    if interactions.timestamps is not None:
        fields.append(("timestamps", np.dtype(np.int64)))
    fields += [(name, column.dtype) for name, column in interactions.actions.items()]
    return np.dtype(fields)


def _records(part: Interactions) -> Shaped[np.ndarray, " E"]:
    events = np.empty(part.num_events, _dtype(part))
    events["items"] = part.items
    if part.timestamps is not None:
        events["timestamps"] = part.timestamps
    for name, column in part.actions.items():
        events[name] = column
    return events


def _without_events(part: Interactions) -> Interactions:
    none = {name: column[:0] for name, column in part.actions.items()}
    times = None if part.timestamps is None else part.timestamps[:0]
    return dataclasses.replace(part, items=part.items[:0], timestamps=times, actions=none)


def _joined(parts: list[Interactions]) -> Interactions:
    """Users of several parts, without their events."""
    lengths = np.concatenate([part.lengths for part in parts])
    return dataclasses.replace(
        parts[0],
        users=np.concatenate([part.users for part in parts]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        contexts={
            name: np.concatenate([part.contexts[name] for part in parts])
            for name in parts[0].contexts
        },
    )


def _write_files(folder: Path, values: dict[str, Any]) -> None:
    (folder / FILES).write_text(json.dumps(values, indent=1))


def _read_files(folder: Path) -> dict[str, Any]:
    """Sizes of the shards, and the fingerprint; raises ValueError where they are not readable."""
    try:
        values = json.loads((folder / FILES).read_text())
        wanted = {"files": dict, "first_time": int, "fingerprint": dict | None}
        if all(isinstance(values[name], kind) for name, kind in wanted.items()):
            return values
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{folder / FILES} is missing or damaged")


def _checked(path: Path, size: int) -> Path:
    """Raises ValueError for a shard that is not what was written."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    if (found := path.stat().st_size) != size:
        raise ValueError(f"{path} has {found} bytes, and {size} were written")
    return path


@contextlib.contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Names the folder in what array_record says of a damaged file."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{folder} is damaged ({str(error).splitlines()[0]}): delete it, and it is written "
            "again"
        ) from error
