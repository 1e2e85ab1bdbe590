"""What all tfds builders share: raw files -> one array_record example a user, and a catalogue.

TensorFlow is never imported: tfds writes and reads array_record without it.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import itertools
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import tensorflow_datasets as tfds

from ultra_hstu import paths
from ultra_hstu.config import DataConfig, SyntheticConfig
from ultra_hstu.data import sums
from ultra_hstu.data.catalog import Catalog, first
from ultra_hstu.data.contexts import Contexts
from ultra_hstu.data.download import Download, obtain
from ultra_hstu.data.events import RawEvents
from ultra_hstu.data.sums import Sums
from ultra_hstu.data.text import stored

_log = logging.getLogger(__name__)
CATALOG = "catalog.npz"
CONTEXTS = "contexts.npz"
_MAX_SPAN = 2**31 - 1  # of the times of a source, in seconds: batches hold them as int32


@dataclasses.dataclass(kw_only=True)
class SourceConfig(tfds.core.BuilderConfig):
    """A variant of a source.

    Attributes:
        files: the publisher's files that are read; raw_dir must hold them.
        context_files: those that describe the users; raw_dir may lack them, and the data then has
            no features of users.
        downloads: where the publisher offers all of them.
    """

    files: tuple[str, ...] = ()
    context_files: tuple[str, ...] = ()
    downloads: tuple[Download, ...] = ()


class InteractionsBuilder(tfds.core.GeneratorBasedBuilder):
    """A source of interactions. Subclasses say which columns they have and read them.

    An example is one user: `user` (raw id), `items` (dense ids, int32), `timestamps` (int64
    seconds, where the source has them) and one column an action, all in the order of the files.
    Users are in the order of their raw ids.
    """

    # 1.1.0 added the features of users, 1.2.0 strings of any length, 1.3.0 features of items; what
    # an older version prepared is not read.
    VERSION = tfds.core.Version("1.3.0")
    # where tfds would look for its own kind of checksums, with a package that it does not install
    code_path = None
    STRING_USERS: ClassVar[bool] = False
    TICKS: ClassVar[int] = 1  # a second in the unit of the source's timestamps; 0: it has none
    ACTIONS: ClassVar[dict[str, type[np.generic]]] = {}
    ITEMS_FILE: ClassVar[str] = "the catalogue"  # for the error about an item that it lacks

    def __init__(self, *, raw_dir: str | os.PathLike | None, **kwargs: Any):
        self.raw_dir = Path(raw_dir or "")  # a generated source reads nothing
        super().__init__(file_format="array_record", **kwargs)

    @classmethod
    def settings_of(cls, config: DataConfig) -> dict[str, SyntheticConfig]:
        """Keyword arguments of the builder: what a generated source is made from."""
        return {}

    def read(self) -> tuple[RawEvents, Catalog]:
        """Reads `self.raw_dir` (checked: it holds the files of the configuration)."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is read")

    def read_contexts(self) -> Contexts:
        """The features of users, from the `context_files` that `self.raw_dir` holds."""
        return Contexts()

    def _info(self) -> tfds.core.DatasetInfo:
        def column(dtype: type[np.generic]) -> tfds.features.Tensor:
            return tfds.features.Tensor(shape=(None,), dtype=dtype)

        features: dict[str, Any] = {
            "user": tfds.features.Text() if self.STRING_USERS else np.int64,
            "items": column(np.int32),
        }
        if self.TICKS:
            features["timestamps"] = column(np.int64)
        if self.ACTIONS:
            features["actions"] = {name: column(dtype) for name, dtype in self.ACTIONS.items()}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        events, catalog = self.read()
        self._check_span(events)
        catalog.save(Path(self.data_path) / CATALOG)
        self.read_contexts().save(Path(self.data_path) / CONTEXTS)
        return {"users": self._generate_examples(events, catalog)}

    def _check_span(self, events: RawEvents) -> None:
        if events.timestamps is None or not len(events.timestamps):
            return
        seconds = events.timestamps // self.TICKS
        early, late = int(seconds.argmin()), int(seconds.argmax())
        if seconds[late] - seconds[early] > _MAX_SPAN:
            raise ValueError(
                f"{events.place(late)}: time {seconds[late]} is more than 2^31 - 1 seconds after "
                f"time {seconds[early]} of {events.place(early)}: a model takes 68 years"
            )

    def _generate_examples(
        self, events: RawEvents, catalog: Catalog
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        events = dataclasses.replace(events, items=events.encode(catalog, self.ITEMS_FILE))
        users, codes = np.unique(events.users, return_inverse=True)
        if events.timestamps is not None and self.TICKS > 1:
            # The order within a second is known here for the last time.
            order = np.lexsort((events.timestamps, codes))
        else:
            order = np.argsort(codes, kind="stable")
        bounds = np.concatenate([[0], np.cumsum(np.bincount(codes))]).tolist()
        columns = {"items": events.items[order]}
        if events.timestamps is not None:
            columns["timestamps"] = events.timestamps[order] // self.TICKS
        actions = {name: values[order] for name, values in events.actions.items()}
        for row, (start, stop) in enumerate(itertools.pairwise(bounds)):
            example: dict[str, Any] = {name: column[start:stop] for name, column in columns.items()}
            if actions:
                example["actions"] = {name: column[start:stop] for name, column in actions.items()}
            yield row, {"user": first(users[row:]), **example}


Raw = tuple[Path, Sums]  # the folder of a source's files, and their sums


@runtime_checkable
class Published(Protocol):
    """A source, as far as its files go; see `SourceConfig`."""

    @property
    def name(self) -> str: ...
    @property
    def files(self) -> tuple[str, ...]: ...
    @property
    def context_files(self) -> tuple[str, ...]: ...
    @property
    def downloads(self) -> tuple[Download, ...]: ...


def slug(source: str) -> str:
    """The name of a source as a part of the names of files."""
    return source.replace("/", "-")


def raw_files(variant: Published, config: DataConfig) -> Raw:
    """The raw files of a source, downloaded under a lock where they are not there.

    Raises as `prepare`.
    """
    if config.raw_dir is not None:
        config = dataclasses.replace(config, raw_dir=str(paths.local(config.raw_dir)))
    if (raw := _raw(variant, config)) is not None:
        return raw
    path = paths.data_folder(config.data_dir) / f"{slug(variant.name)}.download.lock"
    with locked(path, f"the files of {variant.name} must be downloaded"):
        return _obtained(variant, config)


def _obtained(variant: Published, config: DataConfig) -> Raw:
    folder = _downloads(variant, config)
    return folder, obtain(variant.downloads, variant.files + variant.context_files, folder)


def prepare(builder: type[InteractionsBuilder], config: DataConfig) -> InteractionsBuilder:
    """The builder of a prepared dataset: found in `config.data_dir`, or built there.

    It is built from `config.raw_dir`, or from a download where that is None.

    The folder is named after a fingerprint of the content of the raw files, the settings of a
    generated source and the builder's version, so that a changed file is prepared afresh. A build
    that is killed leaves nothing that is read, and what was damaged since is prepared again. Where
    all is there, nothing is written and no lock is taken.

    Raises:
        ValueError: files missing from raw_dir, or bad input in them; a data_dir that cannot be
            written.
        ConnectionError: the publisher cannot be reached.
    """
    variant: SourceConfig = builder.builder_configs[config.source]
    if config.raw_dir is not None:
        config = dataclasses.replace(config, raw_dir=str(paths.local(config.raw_dir)))
    raw, problem = _raw(variant, config), f"the files of {variant.name} must be downloaded"
    if raw is not None:
        if (damage := sums.damage(_home(builder, config, raw))) is None:
            return _opened(builder, config, raw)
        problem = f"the data must be prepared ({damage})"
    say_left_behind(config)
    with locked(paths.data_folder(config.data_dir) / f"{variant.name}.lock", problem):
        if raw is None:
            raw = _obtained(variant, config)
        if sums.damage(_home(builder, config, raw)) is None:  # prepared by another run meanwhile
            return _opened(builder, config, raw)
        return _built(builder, config, raw)


def _downloads(variant: Published, config: DataConfig) -> Path:
    """Unfinished downloads lie beside it, so a source among many of a publisher has its own
    folder for them."""
    folder = paths.data_folder(config.data_dir) / "raw" / slug(variant.name)
    return folder / "files" if "/" in variant.name else folder


def _raw(variant: Published, config: DataConfig) -> Raw | None:
    """The raw files; None where they have to be downloaded.

    Raises ValueError for files missing from raw_dir, and for a raw_dir that nothing is read from.
    """
    wanted = variant.files + variant.context_files
    if not variant.files:
        if config.raw_dir is not None:
            raise ValueError(
                f"{variant.name} is generated: it reads no raw_dir, so {config.raw_dir!r} must be "
                "None"
            )
        return Path(), {}
    if config.raw_dir is None:
        folder = _downloads(variant, config)
        known = sums.read(folder) or {}
        whole = set(wanted) <= set(known) and sums.damage(folder, wanted) is None
        return (folder, {name: known[name] for name in wanted}) if whole else None
    folder = Path(config.raw_dir)
    found = {name: path.name for name in wanted if (path := stored(folder, name))}
    if missing := [name for name in variant.files if name not in found]:
        raise ValueError(
            f"raw_dir {config.raw_dir!r} lacks {', '.join(missing)}: {variant.name} is read from "
            f"{', '.join(variant.files)}"
        )
    return folder, sums.checksums(folder, found.values())


def _home(builder: type[InteractionsBuilder], config: DataConfig, raw: Raw) -> Path:
    """The folder of the prepared dataset."""
    settings = builder.settings_of(config)
    made_from = (
        config.source,
        str(builder.VERSION),
        sorted(raw[1].items()),
        sorted(settings.items()),
    )
    key = hashlib.sha256(repr(made_from).encode()).hexdigest()
    return paths.data_folder(config.data_dir) / f"{config.source}-{key[:16]}"


def _opened(
    builder: type[InteractionsBuilder], config: DataConfig, raw: Raw
) -> InteractionsBuilder:
    return builder(
        raw_dir=raw[0],
        data_dir=_home(builder, config, raw),
        config=config.source,
        **builder.settings_of(config),
    )


def _built(builder: type[InteractionsBuilder], config: DataConfig, raw: Raw) -> InteractionsBuilder:
    home = _home(builder, config, raw)
    if (home / sums.SUMS).exists():
        _log.warning("%s: the data is prepared again", sums.damage(home))
    if home.exists():
        shutil.rmtree(home)
    made = _opened(builder, config, raw)
    _log.info("preparing %s in %s", config.source, home)
    with _quiet():
        made.download_and_prepare()
    written = [path.relative_to(home) for path in sorted(home.rglob("*")) if path.is_file()]
    sums.write(home, sums.checksums(home, map(str, written)))  # last: now it is complete
    return made


def say_left_behind(config: DataConfig) -> None:
    """Says that ./data, which was the default once, holds data of this source."""
    old = Path("data")
    there = (old / "raw" / config.source).exists() or any(old.glob(f"{config.source}-*"))
    if config.data_dir is None and there:
        _log.warning(
            "%s holds data of %s, which is not read: prepared data lies in %s now. Move it there, "
            "or read it where it is with --config.data.data_dir=data",
            old.absolute(),
            config.source,
            paths.data_folder(None),
        )


@contextlib.contextmanager
def locked(path: Path, why: str = "the data must be prepared") -> Iterator[None]:
    """Two runs never build the same source at once. The folder of the lock is made.

    Raises ValueError where it cannot be written, which says why it has to be.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")
    except OSError as error:
        raise ValueError(
            f"{why}, and {path.parent} cannot be written ({error}): choose another folder with "
            "--config.data.data_dir"
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """tfds prints several lines and draws several bars for a build of seconds."""
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
