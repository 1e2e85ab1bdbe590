"""Checkpoints with Orbax, written in the background: the newest ones and the best are kept.

Orbax restores flipped bits in silence, so a checkpoint holds a hash of each of its arrays and one
of its position. They are made before a checkpoint is written and compared after it is read: a pass
of one core of the host over the state, to where an accelerator copies it, shorter than Orbax's.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding
from jaxtyping import PyTree
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from ultra_hstu.behind import Behind
from ultra_hstu.criteria import Metrics
from ultra_hstu.digests import digests
from ultra_hstu.json_files import remedy_of
from ultra_hstu.parallel import processes
from ultra_hstu.parallel.embedding_sharding import EmbeddingTable
from ultra_hstu.workdir import Workdir

BEST_STEP, HASHES, SHA256 = "best_step", "hashes", "sha256"  # beside the position itself
ANSWER_SECONDS = 60  # after a process has read a checkpoint, the others have nearly done so
UNTRAINED = 0  # the step of `try_out`
COPIED_BYTES = 2**26  # a state up to this size is copied, and all of its saving is behind training

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Position:
    """Where a run stands; saved with every checkpoint."""

    epoch: int = 0
    batch: int = 0  # of the epoch: the next one to train on
    loss_sum: float = 0.0  # over the epoch's batches so far
    best_epoch: int = 0
    best_metric: float | None = None  # the criteria say which; None: nothing was evaluated yet
    evaluated_epoch: int = 0  # the newest epoch that was evaluated, and what came out
    last: Metrics = dataclasses.field(default_factory=dict)
    seconds: float = 0.0  # spent training and evaluating, without compilation
    compile_seconds: float = 0.0  # over all starts
    init_from: dict[str, Any] = dataclasses.field(default_factory=dict)  # the run that it began as

    @classmethod
    def of(cls, values: dict[str, Any], where: str) -> "Position":
        """The position that a checkpoint holds. Raises ValueError for one of another version."""
        if unknown := sorted(values.keys() - {field.name for field in dataclasses.fields(cls)}):
            raise ValueError(
                f"{where} holds {', '.join(unknown)}, which this version does not know: go on with "
                "the version that wrote it, or delete it to go on from the one before it"
            )
        return cls(**values)


class Restored(NamedTuple):
    step: int
    state: PyTree
    position: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, and the best.

    A checkpoint holds `state` (a pytree of arrays) and `position` (a JSON dict: where in the data
    and the run it was taken). Which step is the best stands in every position, not in Orbax's own
    metrics, so that no damaged file can hide the others. The hashes stand there, too.
    """

    def __init__(self, directory: Path, *, keep: int = 2, read_only: bool = False):
        self.directory = directory
        # The best step on the disk, and that of all saves: at most one each.
        self._best: list[int] = []
        self._best_saved: list[int] = []
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_NewestAndBest(keep, self._best),
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
        )
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "position": ocp.JsonCheckpointHandler(),
        }
        self._behind = Behind(keep + 1)  # the newest, beside the best
        self._manager = ocp.CheckpointManager(directory, options=options, item_handlers=handlers)

    def save(
        self, step: int, state: PyTree, position: dict[str, Any], *, best: bool = False
    ) -> None:
        """Starts writing; `best` says that no step so far did better.

        Errors of this or the saves before it surface here or in `wait`. Of small states that wait
        for the disk, the newest `keep` are written, and the best.

        Raises:
          OSError: if a checkpoint could not be written, naming the last good one.
        """
        if best:
            self._best_saved[:] = [step]
        saved_position = position | {BEST_STEP: list(self._best_saved)}
        if processes.several() or _bytes(state) > COPIED_BYTES:
            self._write(step, state, saved_position, best)
            return
        # Training goes on with the original meanwhile, and overwrites it.
        copy = jax.tree.map(jnp.copy, state)
        self._behind.put(lambda: self._write(step, copy, saved_position, best), lasting=best)

    def _write(self, step: int, state: PyTree, position: dict[str, Any], best: bool) -> None:
        if step in self._manager.all_steps():
            return
        if best:
            self._best[:] = [step]
        hashed = position | {HASHES: digests(state)}
        hashed[SHA256] = _sha256(hashed)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(hashed)
        )
        try:
            self._manager.save(step, args=args, force=True)
        except Exception as error:
            raise self._not_written(error) from error

    def wait(self) -> None:
        """Returns when every started save is on disk. Raises OSError as `save`."""
        self._behind.join()
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._not_written(error) from error

    def try_out(self, state: PyTree) -> PyTree:
        """The state, written, read back, and deleted: what cannot be restored shows early.

        Raises:
          ValueError: if it cannot be read back.
          OSError: as `save`.
        """
        self.save(UNTRAINED, state, {})
        self.wait()
        try:
            if (restored := self.restore(abstract(state))) is None:
                raise ValueError("it is not there")
            return restored.state
        except ValueError as error:
            raise ValueError(
                f"a checkpoint that was just written cannot be read back: choose another --workdir "
                f"({error})"
            ) from error
        finally:
            self._manager.delete(UNTRAINED)

    def restore(self, abstract_state: PyTree, *, best: bool = False) -> Restored | None:
        """The newest (or best) intact checkpoint; None if there has never been one.

        One that is damaged is reported and passed over for the one before it.

        Raises:
          ValueError: if there are checkpoints and none can be read.
        """
        self._behind.join()
        problems: list[str] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            found = self._read(step, abstract_state, problems, "trying the one before it")
            if found is not None:
                self._best[:] = found.position.pop(BEST_STEP)
                self._best_saved[:] = self._best
                if best and self._best and self._best != [step]:
                    newest = f"taking the newest, of step {step}, in place of the best"
                    better = self._read(self._best[0], abstract_state, problems, newest)
                    if better is not None:
                        better.position.pop(BEST_STEP)
                        return better
                return found
        if problems:
            raise ValueError("no checkpoint can be read:\n  " + "\n  ".join(problems))
        return None

    def _read(
        self, step: int, abstract_state: PyTree, problems: list[str], then: str
    ) -> Restored | None:
        folder, hashes = self.directory / str(step), None
        try:
            strict = not self._other_rows(step, abstract_state)
            args = ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract_state, strict=strict),
                position=ocp.args.JsonRestore(),
            )
            restored = self._manager.restore(step, args=args)
            hashes = _checked(restored.position)
            problem = None
        except Exception as error:  # whatever a damaged file makes Orbax raise
            message = (str(error) or "no message").splitlines()[0]
            problem = f"{folder}: {type(error).__name__}: {message}"
        self._require_agreement(step, problem)
        if problem is None and hashes is not None:
            found = digests(restored.state)
            changed = [name for name in found if found[name] != hashes.get(name)]
            if changed:
                problem = f"{folder}: {', '.join(changed[:3])} changed since they were written"
        if problem is not None:
            problems.append(problem)
            log.warning("checkpoint cannot be read, %s: %s", then, problem)
            return None
        if hashes is None:
            log.warning("%s is of an older version, without hashes that would show damage", folder)
        return Restored(step, restored.state, restored.position)

    def _require_agreement(self, step: int, problem: str | None) -> None:
        """Raises ValueError if some processes have read the checkpoint and others have not."""
        try:
            all_problems = processes.all_gather(problem, ANSWER_SECONDS)
        except TimeoutError as error:
            # Those that could read it wait, inside Orbax, for those that could not.
            all_problems = [problem, str(error)]
        if len({one is None for one in all_problems}) > 1:
            found = next(one for one in all_problems if one is not None)
            raise ValueError(
                f"some processes cannot read a checkpoint that others can ({found}): they must "
                "share its folder. If its files are damaged, delete "
                f"{self.directory / str(step)} to go on from the one before it."
            )

    def _other_rows(self, step: int, abstract_state: PyTree) -> bool:
        """Whether tables have other numbers of entries than stored, and nothing else differs.

        A mesh fills its tables up with zeros; Orbax drops or adds them where it is not strict.
        """
        stored = _shapes(self._manager.item_metadata(step).state.tree)
        wanted = _shapes(abstract_state)
        changed = [name for name, shape in wanted.items() if stored.get(name) != shape]
        tables = dict(_named(abstract_state, lambda leaf: isinstance(leaf, EmbeddingTable)))
        return bool(changed) and all(
            name.removesuffix(".value") in tables and stored.get(name, ())[1:] == wanted[name][1:]
            for name in changed
        )

    def drop_after(self, step: int) -> None:
        """Removes checkpoints newer than `step`, which `restore` could not read."""
        self._behind.join()
        for newer in self._manager.all_steps():
            if newer > step:
                self._manager.delete(newer)

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def let_go(self) -> None:
        """Ends the background work of a run that another error ends, whatever its outcome.

        With several processes that would need the others.
        """
        if processes.several():
            return
        with contextlib.suppress(Exception):
            self._behind.join()
        with contextlib.suppress(Exception):
            self._manager.wait_until_finished()
        with contextlib.suppress(Exception):
            self._manager.close()

    def last_good(self) -> str:
        """A sentence that names the newest whole checkpoint."""
        folders = [self.directory / str(step) for step in sorted(self._manager.all_steps())]
        whole = [folder for folder in folders if folder.is_dir()]
        return f"The last good checkpoint is {whole[-1]}" if whole else "There is no checkpoint yet"

    def _not_written(self, error: Exception) -> Exception:
        if processes.several() and isinstance(error, jax.errors.JaxRuntimeError):
            return error  # not the disk: another process is missing
        return OSError(
            f"a checkpoint could not be written to {self.directory} ({error}). {self.last_good()}. "
            f"{remedy_of(error)}"
        )


class _NewestAndBest(PreservationPolicy):
    def __init__(self, keep: int, best: list[int]):
        self.keep, self.best = keep, best

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        newest = [info.step for info in checkpoints[-self.keep :]]
        return [info.step in (*newest, *self.best) for info in checkpoints]


def _checked(position: dict[str, Any]) -> dict[str, str] | None:
    """Takes the hashes of the arrays out of a position; None in a checkpoint of an older version.

    Raises ValueError if the position is not what was written.
    """
    if HASHES not in position and SHA256 not in position:
        hashes = None
    else:
        sha256 = position.pop(SHA256, None)
        if sha256 != _sha256(position):
            raise ValueError("its position changed since it was written")
        hashes = position.pop(HASHES)
    if not isinstance(position.get(BEST_STEP), list):
        raise ValueError(f"its position has no {BEST_STEP}")
    return hashes


def _bytes(tree: PyTree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _sha256(position: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(position, sort_keys=True).encode()).hexdigest()


def _named(
    tree: PyTree, is_leaf: Callable[[PyTree], bool] | None = None
) -> list[tuple[str, PyTree]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in _named(tree)}


def abstract(tree: PyTree) -> PyTree:
    """Shapes, dtypes and shardings of a pytree of arrays, as `restore` wants them.

    What has no sharding goes to one device.
    """
    here = SingleDeviceSharding(jax.local_devices()[0])

    def describe(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here
        )

    return jax.tree.map(describe, tree)


@runtime_checkable
class MakesState(Protocol):
    """What makes the initial state of a run, which has `params`: a recipe."""

    def init(self, seed: int) -> Any: ...


def load_params(folder: Workdir, recipe: MakesState) -> tuple[int, Any]:
    """(step, parameters) of a run's best checkpoint, or of the newest where none was evaluated.

    Raises:
      ValueError: if the run has no checkpoint, none that can be read, or parameters that are not
        finite.
    """
    step, state, _ = load_state(folder, abstract(jax.eval_shape(lambda: recipe.init(0))))
    return step, state.params


def load_state(folder: Workdir, like: PyTree) -> Restored:
    """As `load_params`, with all of the state; `like` has its shapes, dtypes and shardings."""
    checkpoints = Checkpoints(folder.checkpoints, read_only=True)
    restored = checkpoints.restore(like, best=True)
    if restored is None and folder.result.exists() and folder.path.name.startswith("window_"):
        keep = folder.read_config().train.keep_checkpoints
        raise ValueError(
            f"{folder.path} has no checkpoint any more: the train.keep_checkpoints={keep} newest "
            "windows keep theirs"
        )
    if restored is None or restored.step == UNTRAINED:
        raise ValueError(
            f"{folder.path} has no checkpoint yet: train it first, "
            f"with experiments.train --workdir={folder.path}"
        )
    step, state, _ = restored
    params = state.params
    checkpoints.let_go()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not jnp.isfinite(leaf).all():
            raise ValueError(
                f"the checkpoint of step {step} in {folder.path} holds NaN or infinity in "
                f"{jax.tree_util.keystr(path)}: train again"
            )
    return restored
