"""What all tfds builders share: raw files -> one array_record example a user, and a catalogue.

TensorFlow is never imported: tfds writes and reads array_record without it.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from ultra_hstu.config import DataConfig, SyntheticConfig
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.data.contexts import Contexts
from ultra_hstu.data.download import Download, checksums, obtain
from ultra_hstu.data.events import RawEvents

_log = logging.getLogger(__name__)
CATALOG = "catalog.npz"
CONTEXTS = "contexts.npz"


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

    # 1.1.0 added the features of users; what an older version prepared is not read.
    VERSION = tfds.core.Version("1.1.0")
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
        catalog.save(Path(self.data_path) / CATALOG)
        self.read_contexts().save(Path(self.data_path) / CONTEXTS)
        return {"users": self._generate_examples(events, catalog)}

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
        bounds = np.cumsum(np.bincount(codes))[:-1]

        def by_user(column: np.ndarray) -> list[np.ndarray]:
            return np.split(column[order], bounds)

        columns = {"items": by_user(events.items)}
        if events.timestamps is not None:
            columns["timestamps"] = by_user(events.timestamps // self.TICKS)
        actions = {name: by_user(values) for name, values in events.actions.items()}
        for row, user in enumerate(users):
            example: dict[str, Any] = {name: parts[row] for name, parts in columns.items()}
            if actions:
                example["actions"] = {name: parts[row] for name, parts in actions.items()}
            yield row, {"user": user.item(), **example}


def prepare(builder: type[InteractionsBuilder], config: DataConfig) -> InteractionsBuilder:
    """The builder of a prepared dataset: found in `config.data_dir`, or built there.

    It is built from `config.raw_dir`, or from a download where that is None.

    The folder is named after a fingerprint of the content of the raw files, the settings of a
    generated source and the builder's version, so that a changed file is prepared afresh. A build
    that is killed leaves nothing that is read.

    Raises:
        ValueError: files missing from raw_dir, or bad input in them.
        ConnectionError: the publisher cannot be reached.
    """
    variant: SourceConfig = builder.builder_configs[config.source]
    data_dir, raw_dir = Path(config.data_dir), config.raw_dir
    settings = builder.settings_of(config)
    with locked(data_dir, variant.name):
        folder, sums = None, {}
        if variant.files and raw_dir is not None:
            folder = Path(raw_dir)
            wanted = variant.files + variant.context_files
            there = [name for name in wanted if (folder / name).is_file()]
            if missing := [name for name in variant.files if name not in there]:
                raise ValueError(
                    f"raw_dir {raw_dir!r} lacks {', '.join(missing)}: {variant.name} is read from "
                    f"{', '.join(variant.files)}"
                )
            sums = checksums(folder, there)
        elif variant.files:
            folder = data_dir / "raw" / variant.name
            sums = obtain(variant.downloads, variant.files + variant.context_files, folder)
        elif raw_dir is not None:
            raise ValueError(
                f"{variant.name} is generated: it reads no raw_dir, so {raw_dir!r} must be None"
            )
        made_from = (
            variant.name,
            str(builder.VERSION),
            sorted(sums.items()),
            sorted(settings.items()),
        )
        key = hashlib.sha256(repr(made_from).encode()).hexdigest()
        home = data_dir / f"{variant.name}-{key[:16]}"
        made = builder(raw_dir=folder, data_dir=home, config=variant.name, **settings)
        for killed in Path(made.data_path).parent.glob("incomplete.*"):
            shutil.rmtree(killed)
        if not Path(made.data_path).exists():
            _log.info("preparing %s in %s", variant.name, made.data_path)
            with _quiet():
                made.download_and_prepare()
        return made


@contextlib.contextmanager
def locked(data_dir: Path, source: str) -> Iterator[None]:
    """Two runs never build the same source at once. Makes the folder."""
    data_dir.mkdir(parents=True, exist_ok=True)
    with open(data_dir / f"{source}.lock", "w") as file:
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
