"""A run's folder: what lies where, and whose it is.

config.json      the configuration; a run that differs from it is refused
catalog.npz      item ids and titles (the reverse map)
interactions.npz the events of a run that was trained on arrays
checkpoints/     Orbax, newest and best
metrics.jsonl    one line a record, the same values as TensorBoard's
tensorboard/
curves.png       loss and metrics over epochs
result.json      the numbers of a finished run
"""

import dataclasses
import fcntl
import json
import os
from pathlib import Path
from typing import IO, Any

from ultra_hstu.config import Config, from_config_dict
from ultra_hstu.data.interactions import ARRAYS, Interactions
from ultra_hstu.fields import difference

# Fields that may change between two starts of the same run: they say where and how long, not what
# is computed.
FREE_FIELDS = ("data.raw_dir", "data.data_dir", "train.epochs", "train.keep_checkpoints") + tuple(
    f"parallel.{name}:" for name in ("data", "context", "strategy", "layout", "fsdp")
)


class Workdir:
    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path).absolute()
        self.config = self.path / "config.json"
        self.data = self.path / "data.json"
        self.catalog = self.path / "catalog.npz"
        self.interactions = self.path / "interactions.npz"
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.curves = self.path / "curves.png"
        self.result = self.path / "result.json"
        self._lock: IO[str] | None = None

    def claim(self, config: Config) -> None:
        """Makes the folder this run's own, until `release` or the end of the process.

        Raises:
          ValueError: if another process trains in it, if it belongs to a run with another
            configuration (the difference is shown), or if it holds files of something else.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / ".lock", "a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._check_owner(dataclasses.asdict(self.with_groups(config)))
        except BlockingIOError:
            self.release()
            raise ValueError(
                f"another process is training in {self.path}: wait for it, or choose another "
                "--workdir"
            ) from None
        except ValueError:
            self.release()
            raise
        write_json(self.config, dataclasses.asdict(config))

    def with_groups(self, config: Config) -> Config:
        """The configuration with `parallel.groups` as the run in this folder has it, if left open.

        Raises:
          ValueError: if the mesh does not suit those groups.
        """
        parallel = config.parallel
        if parallel.groups is not None:
            return config
        groups = self.read_config().parallel.batch_groups if self.config.exists() else parallel.data
        if groups % parallel.data:
            raise ValueError(
                f"{self.path} packs its batches in parallel.groups={groups}, which "
                f"parallel.data={parallel.data} does not divide: choose another mesh. "
                "A run that is to go on in larger ones must start with --config.parallel.groups at "
                "the largest data."
            )
        return config.in_groups(groups)

    def _check_owner(self, new: dict[str, Any]) -> None:
        if self.config.exists():
            stored = self.with_groups(self.read_config())  # of a run from before there were meshes
            lines = difference(dataclasses.asdict(stored), new)
            if changed := [line for line in lines if not line.startswith(FREE_FIELDS)]:
                listed = "\n  ".join(changed)
                raise ValueError(
                    f"{self.path} belongs to a run with another configuration (stored -> asked "
                    f"for):\n  {listed}\n"
                    "Choose another --workdir, or delete this one to start over."
                )
            return
        entries = {entry.name for entry in self.path.iterdir()}
        if foreign := sorted(entries - {".lock", "config.json.partial"}):
            raise ValueError(
                f"{self.path} is no run's folder, yet it holds {foreign[0]!r}: choose an empty or "
                "new --workdir"
            )

    def claim_data(self, interactions: Interactions) -> None:
        """Writes down what the data is, with its catalogue, or does as `check_data`."""
        if self.data.exists():
            self.check_data(interactions)
        else:
            interactions.catalog.save(self.catalog)
            if self.read_config().data.source == ARRAYS:
                interactions.save(self.interactions)
            write_json(self.data, interactions.fingerprint())

    def check_data(self, interactions: Interactions) -> None:
        """Raises ValueError, with the difference, if the data is not what was trained on."""
        changed = difference(json.loads(self.data.read_text()), interactions.fingerprint())
        if changed:
            listed = "\n  ".join(changed)
            raise ValueError(
                f"the data is not what {self.path} was trained on (then -> now):\n  {listed}\n"
                "Point data.raw_dir at that data, or choose another --workdir."
            )

    def release(self) -> None:
        """Lets another process (or another run of this one) claim the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def read_config(self) -> Config:
        """The stored configuration.

        Raises:
          ValueError: if the folder holds no run, or its config.json cannot be read.
        """
        try:
            return from_config_dict(json.loads(self.config.read_text()))
        except FileNotFoundError:
            raise ValueError(
                f"{self.path} holds no run (no config.json): train one with experiments.train "
                f"--workdir={self.path}"
            ) from None
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{self.config}, line {error.lineno}: not JSON ({error.msg})"
            ) from None
        except ValueError as error:
            raise ValueError(f"{self.config}: {error}") from None

    def read_for_one_device(self, raw_dir: str | None = None) -> Config:
        """`read_config` as one device computes it; `raw_dir`: where the raw data is, if moved."""
        config = self.read_config().on_one_device()
        data = dataclasses.replace(config.data, raw_dir=raw_dir or config.data.raw_dir)
        return dataclasses.replace(config, data=data)


def write_json(path: Path, value: Any) -> None:
    """Writes the whole file or nothing."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes the whole file or nothing; a failed write leaves the old file as it was."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(
            f"{path} could not be written ({error}). Make room and start the same command again."
        ) from error
