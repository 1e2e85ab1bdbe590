"""Compiled programs on the disk, so that a second start need not compile them.

This is JAX's persistent cache with files of our own: they are written whole and checked when they
are read, the oldest go when there are too many, and no trouble with them costs more than a warning.
"""

import contextlib
import hashlib
import logging
import os
import platform
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
from jax._src import compilation_cache  # JAX has no public name for another kind of files
from jax._src.compilation_cache_interface import CacheInterface

from ultra_hstu import paths

_log = logging.getLogger(__name__)
VARIABLE = "ULTRA_HSTU_COMPILATION_CACHE"
LIMIT = 2 * 2**30  # bytes of a folder, when a process begins to use it
LEAST_SECONDS = 0.1  # what compiles faster is not kept
DIGEST = hashlib.sha256().digest_size
SUFFIX = ".program"

_files: "ProgramFiles | None" = None


def use(given: str | None = None) -> None:
    """Keeps compiled programs in a folder from now on; processes that this one starts do so, too.

    Call it before anything is compiled.

    Args:
      given: the folder, or "off". None: what the variable ULTRA_HSTU_COMPILATION_CACHE says;
        without it JAX's own variable, JAX_COMPILATION_CACHE_DIR, is left to JAX, and without both
        the folder is `default_folder`.
    """
    global _files
    given = given or os.environ.get(VARIABLE)
    if given == "off":
        os.environ[VARIABLE] = given
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if given is None and "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        folder = default_folder() if given is None else Path(given).expanduser().absolute()
        _files = files = ProgramFiles(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        _log.warning(
            "compiled programs are not kept (%s): --compilation_cache=DIR names another folder, "
            "--compilation_cache=off keeps none",
            error,
        )
        return
    if given is not None:
        os.environ[VARIABLE] = str(folder)
    compilation_cache.get_file_cache = lambda path: (files, path)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # they have other files
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)


def files() -> "ProgramFiles | None":
    """Where programs are kept; None: nowhere, or where JAX alone does so."""
    return _files


def default_folder() -> Path:
    """A folder in the user's cache for this version of JAX and this kind of processor.

    Machines of several kinds may share a home, and machine code of one may not run on another.
    Raises RuntimeError where the user has no home.
    """
    cache = paths.user_folder("XDG_CACHE_HOME", ".cache")
    return cache / f"jax-{jax.__version__}-{processor()}"


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """A short hash of the processor's kind and features."""
    kinds = ("model name", "flags", "Features", "CPU part")
    with contextlib.suppress(OSError):  # there is such a file on Linux alone
        told = {line for line in cpuinfo.read_text().splitlines() if line.startswith(kinds)}
        return _short_hash("\n".join(sorted(told)))
    return _short_hash(f"{platform.machine()} {platform.processor()}")


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class ProgramFiles(CacheInterface):
    """A file for each compiled program: a hash, and what JAX wants to find again."""

    def __init__(self, folder: Path):
        """Makes the folder, and deletes the files that were not used for longest, down to LIMIT.

        Raises OSError where there can be no such folder.
        """
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # who writes there runs code here
        self._path = folder
        self._thread = threading.local()  # `seen`: contents of this thread
        self._warned = self._full = False
        used, left = [], LIMIT
        for path in folder.glob("*" + SUFFIX):
            with contextlib.suppress(OSError):  # another process may have deleted it
                used.append((path.stat().st_mtime, path.stat().st_size, path))
        for _, size, path in sorted(used, reverse=True):
            left -= size
            if left < 0:
                _delete(path)

    def get(self, key: str) -> bytes | None:
        path = self._file(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(error)
            return None
        digest, program = content[:DIGEST], content[DIGEST:]
        if hashlib.sha256(program).digest() != digest:
            _delete(path)
            self._warn(f"{path} is damaged; its program is compiled again")
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the time of its last use
        self._note(program)
        return program

    def put(self, key: str, value: bytes) -> None:
        self._note(value)
        if self._full:
            return
        try:
            descriptor, part = tempfile.mkstemp(suffix=SUFFIX, dir=self._path)
            try:
                with open(descriptor, "wb") as file:
                    file.write(hashlib.sha256(value).digest() + value)
                os.replace(part, self._file(key))
            except OSError:
                _delete(Path(part))
                raise
        except OSError as error:
            self._full = True  # or read-only: the next program would fare no better
            self._warn(f"{error}; new programs are not kept")

    @contextlib.contextmanager
    def seen(self) -> Iterator[list[bytes]]:
        """Collects the contents that this thread finds or gives inside the block."""
        self._thread.seen = []
        try:
            yield self._thread.seen
        finally:
            del self._thread.seen

    def _note(self, content: bytes) -> None:
        if hasattr(self._thread, "seen"):
            self._thread.seen.append(content)

    def _file(self, key: str) -> Path:
        return self._path / (key + SUFFIX)

    def _warn(self, what: OSError | str) -> None:
        """Warns once, since what happens to one file happens to many."""
        if not self._warned:
            _log.warning("the compilation cache in %s: %s", self._path, what)
        self._warned = True


def _delete(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
