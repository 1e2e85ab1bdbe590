"""Downloads: resumed where they were cut, checked, and set aside where they are corrupt."""

import dataclasses
import http.client
import logging
import os
import shutil
import ssl
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import rich.progress
from rich.progress import Progress
from tensorflow_datasets.core.download import ExtractMethod, iter_archive

from ultra_hstu.data import sums

_log = logging.getLogger(__name__)
_CHUNK = 1 << 18
_NETWORK_ERRORS = (
    urllib.error.URLError,
    http.client.HTTPException,
    ssl.SSLError,
    ConnectionError,
    TimeoutError,
)


@dataclasses.dataclass(frozen=True)
class Download:
    """A file that a publisher offers.

    Attributes:
        url: where it is.
        checksum: "md5:..." or "sha256:..." as published, or None where the publisher gives none:
            the checksums of the files are then recorded at the first download and verified at every
            later use.
        name: the name to keep it under; None: the last part of the URL. A .zip or .tar.gz is
            unpacked.
    """

    url: str
    checksum: str | None = None
    name: str | None = None

    @property
    def filename(self) -> str:
        return self.name or self.url.rsplit("/", 1)[-1]


def obtain(
    downloads: Sequence[Download], names: Sequence[str], folder: Path, *, pause: int | float = 1.0
) -> dict[str, str]:
    """Downloads and unpacks the files `names` into `folder`; returns their sha256.

    The folder appears whole or not at all. A cut download continues with the next call.

    Raises:
        ConnectionError: a URL cannot be reached; says what to fetch by hand.
        ValueError: a corrupt download or a file that has changed since; the file is set aside under
            "*.corrupt", so that the next call starts over.
    """
    known = sums.read(folder) or {}
    # A folder may be of a time when fewer of the publisher's files were read.
    if known and set(names) <= set(known):
        if problem := sums.damage(folder, names, "downloaded"):
            raise _set_aside(folder, problem)
        return {name: known[name] for name in names}
    fresh = folder.with_name(folder.name + ".incomplete")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        for download in downloads:
            try:
                path = fetch(download, folder.parent, pause=pause)
            except ConnectionError as error:
                raise ConnectionError(
                    f"{error}. On a machine without this access, fetch "
                    f"{', '.join(d.url for d in downloads)} by hand, "
                    "and point raw_dir (--config.data.raw_dir=...) at a folder with the files "
                    f"{', '.join(names)}"
                ) from error
            _unpack(path, names, fresh)
        found = sums.checksums(fresh, names)
        sums.write(fresh, found)
        if folder.is_dir():
            shutil.rmtree(folder)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    for download in downloads:  # unpacked and checked: no longer needed
        (folder.parent / download.filename).unlink()
    return found


def fetch(download: Download, folder: Path, *, attempts: int = 5, pause: int | float = 1.0) -> Path:
    """Downloads one file into `folder`, continuing a partial one (*.part), and checks it.

    Returns its path.

    Raises:
        ConnectionError: unreachable, or cut `attempts` times; what was received is kept for the
            next call.
        ValueError: the checksum is wrong; the file is set aside.
    """
    path = folder / download.filename
    if path.exists():
        _check(path, download)
        return path
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    for attempt in range(1, attempts + 1):
        try:
            _receive(download.url, part)
            break
        except urllib.error.HTTPError as error:
            reason = f"{download.url} answered {error.code} {error.reason}"
            error.close()
            if error.code < 500:
                raise ConnectionError(f"cannot download: {reason}") from error
        except _NETWORK_ERRORS as error:
            reason = f"{download.url}: {error}"
        if attempt == attempts:
            raise ConnectionError(
                f"cannot download {reason} (tried {attempts} times; run again to continue)"
            )
        _log.warning("download interrupted, %s; continuing from byte %d", reason, _size(part))
        time.sleep(pause * attempt)
    part.rename(path)
    _check(path, download)
    return path


def _set_aside(path: Path, problem: str) -> ValueError:
    """Renames a bad file or folder to "*.corrupt" (in place of an older one); the error for it."""
    aside = path.with_name(path.name + ".corrupt")
    if aside.is_dir():
        shutil.rmtree(aside)
    os.replace(path, aside)
    return ValueError(f"{problem}. It was moved to {aside}; run again to download it afresh")


def _receive(url: str, part: Path) -> None:
    """Appends to `part` what is missing of the file."""
    have = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing behind what we have: whole already, or another file
            raise
        error.close()
        part.unlink()
        return _receive(url, part)
    with response:
        start = have if response.status == 206 else 0
        if start and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise ConnectionError(
                f"asked for bytes from {start}, got {response.headers.get('Content-Range')!r}"
            )
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        columns = (
            *Progress.get_default_columns(),
            rich.progress.DownloadColumn(),
            rich.progress.TransferSpeedColumn(),
        )
        with (
            Progress(*columns) as progress,
            open(part, "ab" if start else "wb") as file,
        ):
            task = progress.add_task(url.rsplit("/", 1)[-1], total=total, completed=start)
            while block := response.read(_CHUNK):
                file.write(block)
                progress.advance(task, len(block))
    if total is not None and _size(part) != total:
        raise ConnectionError(f"the connection was cut after {_size(part)} of {total} bytes")


def _check(path: Path, download: Download) -> None:
    if download.checksum is None:
        return
    kind, expected = download.checksum.split(":")
    found = sums.digest(path, kind)
    if found != expected:
        raise _set_aside(
            path,
            f"{path} is corrupt: expected {kind} {expected}, found {found}, from {download.url}",
        )


def _unpack(path: Path, names: Sequence[str], folder: Path) -> None:
    """Puts the files `names` of an archive, or the file itself, into `folder`."""
    try:
        if not path.name.endswith((".zip", ".tar.gz")):
            shutil.copyfile(path, folder / path.name)
            return
        kind = ExtractMethod.ZIP if path.suffix == ".zip" else ExtractMethod.TAR_GZ_STREAM
        with open(path, "rb") as archive:  # a path would be opened with TensorFlow
            for member, content in iter_archive(archive, kind):
                if (name := os.path.basename(member)) in names:
                    with open(folder / name, "wb") as target:
                        shutil.copyfileobj(content, target)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error) as error:
        raise _set_aside(path, f"{path} is no whole archive ({error})") from error
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}: it is not the publisher's archive")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
