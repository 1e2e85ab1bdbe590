"""A run's folder: what lies where, and whose it is.

config.json      the configuration; once there is a checkpoint, a run that differs is refused
data.json        counts and a hash of the data
catalog.npz      item ids and titles (the reverse map)
interactions.npz the events of a run that was trained on arrays
checkpoints/     Orbax, newest and best
metrics.jsonl    one line a record, the same values as TensorBoard's
tensorboard/
curves.png       loss and metrics over epochs
result.json      the numbers of a finished run
vocabulary.json  values of features of events and of users, where a run reads such
profile/         a trace of some steps, where `--profile` asked for one
run.json         every start of the run: command, commit, versions, device, dates, seconds

The folder of `experiments.train --seeds=...` holds one such folder for each seed, seed_N.
"""

import dataclasses
import fcntl
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from ultra_hstu import paths
from ultra_hstu.config import Config, from_config_dict
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.data.interactions import ARRAYS, Interactions
from ultra_hstu.fields import difference
from ultra_hstu.json_files import not_written, read_object, write_json

# Fields that may change between two starts of the same run: they say where and how long, not what
# is computed.
FREE_FIELDS = (
    *(f"data.{name}:" for name in ("raw_dir", "data_dir", "table.items_file", "table.users_file")),
    *(f"train.{name}:" for name in ("epochs", "keep_checkpoints", "checkpoint_minutes")),
    "windows.count:",
    "model.chunk_rows:",  # more devices have shorter shards
    *(f"parallel.{name}:" for name in ("data", "context", "strategy", "layout", "fsdp")),
    *(f"parallel.{name}:" for name in ("batches", "exchange_rows")),
)
# Orbax finds the files of a checkpoint by patterns that begin with its path, and takes /gs/NAME for
# gs://NAME.
PATTERN_CHARACTERS, BUCKET_FOLDERS = set("*?[\\"), {"gs", "s3", "az", "hf"}
# What these files hold at least. (Sections that came later are missing in older folders.)
CONFIG_FIELDS = {"name": str} | dict.fromkeys(("data", "model", "loss", "optim", "train"), dict)
DATA_FIELDS = {"users": int, "items": int, "events": int, "sha256": str}

log = logging.getLogger(__name__)


class Workdir:
    """The files of a run.

    Raises:
      ValueError: a path that is not local, or from which checkpoints could not be read.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = paths.local(path).absolute()
        unfit = PATTERN_CHARACTERS & set(str(self.path)) | BUCKET_FOLDERS & {*self.path.parts[1:2]}
        if unfit:
            raise ValueError(
                f"{self.path}: checkpoints cannot be read from a path with "
                f"{' '.join(sorted(unfit))} in it: choose another --workdir, or rename the folder"
            )
        self.config = self.path / "config.json"
        self.data = self.path / "data.json"
        self.catalog = self.path / "catalog.npz"
        self.interactions = self.path / "interactions.npz"
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.profile = self.path / "profile"
        self.curves = self.path / "curves.png"
        self.result = self.path / "result.json"
        self.starts = self.path / "run.json"
        self.vocabulary = self.path / "vocabulary.json"
        self._lock: IO[str] | None = None

    @property
    def seeds(self) -> dict[int, "Workdir"]:
        """The runs that this folder holds for several seeds, by seed; mostly none."""
        return self._inside("seed_")

    @property
    def windows(self) -> dict[int, "Workdir"]:
        """The models of a run under protocol `windows`, one a window, by number; mostly none."""
        return self._inside("window_")

    def _inside(self, prefix: str) -> dict[int, "Workdir"]:
        """The folders of runs that this one holds under names that end in a number."""
        found = {
            int(number): path
            for path in self.path.glob(f"{prefix}*[0-9]")
            if (number := path.name.removeprefix(prefix)).isdigit()
            and (path / "config.json").exists()
        }
        return {number: Workdir(found[number]) for number in sorted(found)}

    @property
    def is_trained(self) -> bool:
        """Whether there is something to lose: a checkpoint, or the numbers of a finished run."""
        steps = self.checkpoints.glob("[1-9]*")  # step 0 is written and deleted, as a trial
        trained = self.result.exists() or any(step.name.isdigit() for step in steps)
        return trained or any(folder.is_trained for folder in self.windows.values())

    def claim(self, config: Config, *, overwrite: bool = False) -> None:
        """Makes the folder this run's own, until `release` or the end of the process.

        What a run left that has no checkpoint is removed; a warning says so where its configuration
        was another one.

        Args:
          overwrite: remove the run that is there, whatever it has.

        Raises:
          ValueError: if another process trains in it, if it belongs to a run with another
            configuration (the difference is shown), or if it holds files of something else.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / ".lock", "a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            config = self.with_groups(config, overwrite=overwrite)
            self._give_way(self.check_owner(config, overwrite=overwrite), overwrite)
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

    def with_groups(self, config: Config, *, overwrite: bool = False) -> Config:
        """The configuration with `parallel.groups` as the run in this folder has it, if left open.

        A run that has no checkpoint, or is to be overwritten, leaves them open.

        Raises:
          ValueError: if the mesh does not suit those groups.
        """
        parallel = config.parallel
        if parallel.groups is not None:
            return config
        stays = self.is_trained and not overwrite and self.config.exists()
        groups = self.read_config().parallel.batch_groups if stays else parallel.data
        if groups % parallel.data:
            raise ValueError(
                f"{self.path} packs its batches in parallel.groups={groups}, which "
                f"parallel.data={parallel.data} does not divide: choose another mesh. "
                "A run that is to go on in larger ones must start with --config.parallel.groups at "
                "the largest data."
            )
        return config.in_groups(groups)

    def check_owner(self, config: Config, *, overwrite: bool = False) -> list[str]:
        """Raises ValueError where `claim` would, but for another process; writes nothing.

        Returns the lines in which the configuration differs from that of a run which gives way.
        """
        if not self.config.exists():
            if self.seeds:
                raise ValueError(f"{self.path} {self._several()}")
            entries = {entry.name for entry in self.path.glob("*")}
            if foreign := sorted(entries - {".lock", "config.json.partial"}):
                raise ValueError(
                    f"{self.path} is no run's folder, yet it holds {foreign[0]!r}: choose an empty "
                    "or new --workdir"
                )
            return []
        if overwrite:
            read_object(self.config, CONFIG_FIELDS, "this is no run: delete it by hand")
            return []
        new = dataclasses.asdict(self.with_groups(config))
        stored = self.with_groups(self.read_config())  # of a run from before there were meshes
        lines = difference(dataclasses.asdict(stored), new)
        changed = [line for line in lines if not line.startswith(FREE_FIELDS)]
        if changed and self.is_trained:
            listed = "\n  ".join(changed)
            raise ValueError(
                f"{self.path} belongs to a run with another configuration (stored -> given):\n"
                f"  {listed}\nChoose another --workdir, or start over in this one with --overwrite."
            )
        return changed

    def _give_way(self, changed: list[str], overwrite: bool) -> None:
        """Removes a run that has no checkpoint, or is to be overwritten."""
        if changed:
            log.warning(
                "%s has no checkpoint of the run that was started there, and takes the new "
                "configuration (stored -> given):\n  %s",
                self.path,
                "\n  ".join(changed),
            )
        if self.config.exists() and (overwrite or not self.is_trained):
            self._remove(but=None if overwrite else self.starts)

    def _several(self) -> str:
        """What to say where one run is meant, and there are those of several seeds."""
        names = [folder.path.name for folder in self.seeds.values()]
        return (
            f"holds runs of {len(names)} seeds ({', '.join(names)}): name one of them, such as "
            f"--workdir={self.path / names[0]}"
        )

    def _remove(self, but: Path | None = None) -> None:
        """Removes what a run writes, and nothing else; the configuration last."""
        files = [self.data, self.catalog, self.interactions, self.metrics, self.curves]
        files += [self.vocabulary, self.result]
        try:
            inside = [folder.path for folder in self.windows.values()]
            for path in (self.checkpoints, self.tensorboard, self.profile, *inside):
                if path.exists():
                    shutil.rmtree(path)
            for path in (*files, self.starts, self.config):
                if path != but:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise OSError(f"{path} could not be removed ({error}): remove it yourself") from error

    def claim_data(self, interactions: Interactions) -> None:
        """Writes down what the data is, or does as `check_data`, and its catalogue if it is not
        there.

        Raises:
          OSError: if it cannot be written.
        """
        is_new = not self.data.exists()
        if not is_new:
            self.check_data(interactions)
            try:
                if np.array_equal(self.read_catalog().raw_ids, interactions.catalog.raw_ids):
                    return
            except ValueError as error:
                log.warning("the catalogue is written again from the data: %s", error)
        try:
            interactions.catalog.save(self.catalog)
            config = self.read_config()  # (windows share the data of their run)
            if config.data.source == ARRAYS and config.windows.number is None:
                interactions.save(self.interactions)
        except OSError as error:
            raise not_written(self.catalog, error) from error
        if is_new:
            write_json(self.data, interactions.fingerprint())

    def check_data(self, interactions: Interactions) -> None:
        """Raises ValueError, with the difference, if the data is not what was trained on.

        A run from before there were features of items reads none.
        """
        stored, now = self.read_data(), interactions.fingerprint()
        if "item_features" not in stored:
            now.pop("item_features", None)
        changed = difference(stored, now)
        if changed:
            listed = "\n  ".join(changed)
            raise ValueError(
                f"the data is not what {self.path} was trained on (then -> now):\n  {listed}\n"
                "Point data.raw_dir at that data. To learn from new events, train into another "
                "--workdir or with --overwrite; to recommend after them, give --history."
            )

    def newest(self) -> "Workdir":
        """The folder of the model of the newest finished window; else this one."""
        done = [folder for folder in self.windows.values() if folder.result.exists()]
        return done[-1] if done else self

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
        if not self.config.exists():
            if self.seeds:
                raise ValueError(f"{self.path} {self._several()}")
            raise ValueError(
                f"{self.path} holds no run (no config.json): train one with experiments.train "
                f"--workdir={self.path}"
            )
        values = read_object(self.config, CONFIG_FIELDS, "put this run's own file back")
        try:
            return from_config_dict(values)
        except ValueError as error:
            raise ValueError(f"{self.config}: {error}") from None

    def read_data(self) -> dict[str, Any]:
        """Counts and a hash of the data that was trained on. Raises ValueError naming the file."""
        remedy = "delete it, and the same training command writes it again from the data"
        return read_object(self.data, DATA_FIELDS, remedy)

    def read_catalog(self) -> Catalog:
        """The catalogue that was trained on.

        Raises ValueError naming the file if it is missing, damaged, or another one.
        """
        catalog, items = Catalog.load(self.catalog), self.read_data()["items"]
        if catalog.num_items != items:
            raise ValueError(
                f"{self.catalog} has {catalog.num_items} items, the run was trained on {items}: "
                "the same training command writes it again from the data"
            )
        return catalog

    def read_for_one_device(self, raw_dir: str | None = None) -> Config:
        """`read_config` as one device computes it; `raw_dir`: where the raw data is, if moved.

        Raises ValueError as it does, and for the folder of several windows.
        """
        config = self.read_config().on_one_device()
        if config.train.protocol == "windows" and config.windows.number is None:
            raise ValueError(
                f"{self.path} holds the models of {len(self.windows)} windows: name one of them, "
                f"such as --workdir={self.newest().path}"
            )
        data = dataclasses.replace(config.data, raw_dir=raw_dir or config.data.raw_dir)
        return dataclasses.replace(config, data=data)


def require_same(runs: Sequence[Workdir]) -> None:
    """Raises ValueError, with the difference, for runs that differ in more than their seeds."""
    first, *others = (dataclasses.asdict(folder.read_config()) for folder in runs)
    for folder, config in zip(runs[1:], others, strict=True):
        config["train"]["seed"] = first["train"]["seed"]
        if lines := [one for one in difference(first, config) if not one.startswith(FREE_FIELDS)]:
            listed = "\n  ".join(lines)
            raise ValueError(
                f"{folder.path} has another configuration than {runs[0].path}, so that no mean is "
                f"taken:\n  {listed}\nName one of them with --workdir."
            )
