"""The files of a public set, of a copy or downloaded once; and the lock of what is prepared."""

import contextlib
import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

from ultra_hstu import paths
from ultra_hstu.config import DataConfig
from ultra_hstu.data import sums
from ultra_hstu.data.download import Download, obtain
from ultra_hstu.data.sums import Sums
from ultra_hstu.data.text import stored

_log = logging.getLogger(__name__)
Raw = tuple[Path, Sums]  # the folder of a set's files, and their sums


@runtime_checkable
class Published(Protocol):
    """A public set, as far as its files go."""

    @property
    def name(self) -> str: ...
    @property
    def files(self) -> tuple[str, ...]:
        """Those that a copy must have."""

    @property
    def context_files(self) -> tuple[str, ...]:
        """Those that a copy may lack."""

    @property
    def downloads(self) -> tuple[Download, ...]: ...


def slug(source: str) -> str:
    """The name of a source as a part of the names of files."""
    return source.replace("/", "-")


def raw_files(public: Published, config: DataConfig) -> Raw:
    """The files of a set, downloaded under a lock where they are not there.

    Raises:
        ValueError: files missing from raw_dir, a damaged download, a data_dir that cannot be
            written.
        ConnectionError: the publisher cannot be reached.
    """
    if config.raw_dir is not None:
        return _copy(public, paths.local(config.raw_dir), config.raw_dir)
    folder, names = downloads_of(public, config), public.files + public.context_files
    known = sums.read(folder) or {}
    if set(names) <= set(known) and sums.damage(folder, names) is None:
        return folder, {name: known[name] for name in names}
    path = paths.data_folder(config.data_dir) / f"{slug(public.name)}.download.lock"
    with locked(path, f"the files of {public.name} must be downloaded"):
        return folder, obtain(public.downloads, names, folder)


def _copy(public: Published, folder: Path, given: str) -> Raw:
    names = public.files + public.context_files
    found = {name: path.name for name in names if (path := stored(folder, name))}
    if missing := [name for name in public.files if name not in found]:
        raise ValueError(
            f"raw_dir {given!r} lacks {', '.join(missing)}: {public.name} is read from "
            f"{', '.join(public.files)}"
        )
    return folder, sums.checksums(folder, found.values())


def downloads_of(public: Published, config: DataConfig) -> Path:
    """The folder of a set's downloads.

    Unfinished ones lie beside it, so a set among many of a publisher has its own folder for them.
    """
    folder = paths.data_folder(config.data_dir) / "raw" / slug(public.name)
    return folder / "files" if "/" in public.name else folder


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
