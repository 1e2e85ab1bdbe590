"""The folder of a source that is generated: made once, under a lock, with sums of its files."""

import hashlib
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from ultra_hstu import paths
from ultra_hstu.config import DataConfig
from ultra_hstu.data import sums
from ultra_hstu.data.raw import locked, say_left_behind

_log = logging.getLogger(__name__)


def folder(config: DataConfig, version: str, make: Callable[[Path], None]) -> Path:
    """The folder of these settings, which `make` fills where it is not there, or damaged.

    Args:
        version: of the program that makes it; what another version made is not read.

    Raises:
        ValueError: a raw_dir, a data_dir that cannot be written.
    """
    if config.raw_dir is not None:
        raise ValueError(
            f"{config.source} is generated: it reads no raw_dir, so {config.raw_dir!r} must be None"
        )
    home = place(config, version)
    if (damage := sums.damage(home)) is not None:
        say_left_behind(config)
        lock = paths.data_folder(config.data_dir) / f"{config.source}.lock"
        with locked(lock, f"the data must be prepared ({damage})"):
            if (damage := sums.damage(home)) is not None:  # not prepared by another run meanwhile
                _make(home, config.source, damage, make)
    return home


def place(config: DataConfig, version: str) -> Path:
    """The folder's path, whatever is there."""
    settings = getattr(config, config.source)
    key = hashlib.sha256(repr((version, settings)).encode()).hexdigest()
    return paths.data_folder(config.data_dir) / f"{config.source}-{key[:16]}"


def _make(home: Path, source: str, damage: str, make: Callable[[Path], None]) -> None:
    if (home / sums.SUMS).exists():
        _log.warning("%s: the data is prepared again", damage)
    if home.exists():
        shutil.rmtree(home)
    _log.info("preparing %s in %s", source, home)
    make(home)
    written = [str(path.relative_to(home)) for path in sorted(home.rglob("*")) if path.is_file()]
    sums.write(home, sums.checksums(home, written))  # last: now it is complete
