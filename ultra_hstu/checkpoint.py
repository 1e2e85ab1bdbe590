"""Checkpoints with Orbax: written in the background, whole or not at all; the newest ones and the best are kept."""

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint.checkpoint_managers import preservation_policy

from ultra_hstu.parallel import processes
from ultra_hstu.parallel.embedding_sharding import EmbeddingTable

BEST_STEP = "best_step"
ANSWER_SECONDS = 60  # after a process has read a checkpoint, the others have nearly done so

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, and the best.

    A checkpoint holds `state` (a pytree of arrays) and `position` (a JSON dict: where in the data and the run it was taken). Which step is
    the best stands in every position, not in Orbax's own metrics, so that no damaged file can hide the others.
    """

    def __init__(self, directory: Path, *, keep: int = 2, read_only: bool = False):
        self.directory = directory
        self._best: list[int] = []  # at most one step
        policy = _NewestAndBest(keep, self._best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
        )
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "position": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(directory, options=options, item_handlers=handlers)

    def save(self, step: int, state: Any, position: dict[str, Any], *, best: bool = False) -> None:
        """Starts writing; `best` says that no step so far did better. Errors of this or the save before it surface here or in `wait`.

        Raises:
          OSError: if a checkpoint could not be written, naming the last good one.
        """
        if step in self._manager.all_steps():
            return
        if best:
            self._best[:] = [step]
        saved_position = position | {BEST_STEP: list(self._best)}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(saved_position)
        )
        try:
            self._manager.save(step, args=args, force=True)
        except Exception as error:
            raise self._not_written(error) from error

    def wait(self) -> None:
        """Returns when every started save is on disk. Raises OSError as `save`."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._not_written(error) from error

    def restore(
        self, abstract_state: Any, *, best: bool = False
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, state, position) of the newest (or best) readable checkpoint; None if there has never been one.

        One that cannot be read is reported and passed over for the one before it.

        Raises:
          ValueError: if there are checkpoints and none can be read.
        """
        problems: list[str] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            if (found := self._read(step, abstract_state, problems)) is not None:
                position = found[2]
                self._best[:] = position.pop(BEST_STEP)
                if best and self._best and self._best != [step]:
                    better = self._read(self._best[0], abstract_state, problems)
                    if better is not None:
                        better[2].pop(BEST_STEP)
                        return better
                return found
        if problems:
            raise ValueError("no checkpoint can be read:\n  " + "\n  ".join(problems))
        return None

    def _read(
        self, step: int, abstract_state: Any, problems: list[str]
    ) -> tuple[int, Any, dict[str, Any]] | None:
        try:
            strict = not self._other_room(step, abstract_state)
            args = ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract_state, strict=strict),
                position=ocp.args.JsonRestore(),
            )
            restored = self._manager.restore(step, args=args)
            problem = None
        except Exception as error:  # whatever a damaged file makes Orbax raise
            problem = f"{self.directory / str(step)}: {type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
        self._require_agreement(step, problem)
        if problem is not None:
            problems.append(problem)
            log.warning("checkpoint cannot be read, trying the one before it: %s", problem)
            return None
        return step, restored.state, restored.position

    def _require_agreement(self, step: int, problem: str | None) -> None:
        """Every process has read the checkpoint or none, else they would go on from different ones. Raises ValueError."""
        try:
            all_problems = processes.of_all(problem, ANSWER_SECONDS)
        except (
            TimeoutError
        ) as error:  # those that could read it wait, inside Orbax, for those that could not
            all_problems = [problem, str(error)]
        if len({one is None for one in all_problems}) > 1:
            found = next(one for one in all_problems if one is not None)
            raise ValueError(
                f"some processes cannot read a checkpoint that others can ({found}): they must share its folder. If its files are damaged, delete "
                f"{self.directory / str(step)} to go on from the one before it."
            )

    def _other_room(self, step: int, abstract_state: Any) -> bool:
        """Whether tables have other numbers of rows than stored, and all other shapes are the same: a mesh fills its tables up with rows of zeros, and
        Orbax leaves them out or adds others where it is not strict.
        """
        stored, wanted = (
            _shapes(self._manager.item_metadata(step).state.tree),
            _shapes(abstract_state),
        )
        changed = [name for name, shape in wanted.items() if stored.get(name) != shape]
        tables = {
            name
            for name, _ in _named(
                abstract_state, is_leaf=lambda leaf: isinstance(leaf, EmbeddingTable)
            )
        }
        return bool(changed) and all(
            name.removesuffix(".value") in tables and stored.get(name, ())[1:] == wanted[name][1:]
            for name in changed
        )

    def drop_after(self, step: int) -> None:
        """Removes checkpoints newer than `step`: those that `restore` could not read and that the run will write again."""
        for newer in [other for other in self._manager.all_steps() if other > step]:
            self._manager.delete(newer)

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def let_go(self) -> None:
        """Ends the background work, whatever its outcome: for a run that another error ends. With several processes that would need the others."""
        if processes.several():
            return
        with contextlib.suppress(Exception):
            self._manager.wait_until_finished()
        with contextlib.suppress(Exception):
            self._manager.close()

    def last_good(self) -> str:
        """A sentence that names the newest whole checkpoint."""
        whole = [
            step for step in self._manager.all_steps() if (self.directory / str(step)).is_dir()
        ]
        return (
            f"The last good checkpoint is {self.directory / str(max(whole))}"
            if whole
            else "There is no checkpoint yet"
        )

    def _not_written(self, error: Exception) -> Exception:
        if processes.several() and isinstance(
            error, jax.errors.JaxRuntimeError
        ):  # not the disk: another process is missing
            return error
        return OSError(
            f"a checkpoint could not be written to {self.directory} ({error}). {self.last_good()}. Make room and start the same command again."
        )


class _NewestAndBest(preservation_policy.PreservationPolicy):
    def __init__(self, keep: int, best: list[int]):
        self.keep, self.best = keep, best

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [
            number >= len(checkpoints) - self.keep or info.step in self.best
            for number, info in enumerate(checkpoints)
        ]


def _named(tree: Any, is_leaf: Any = None) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in _named(tree)}


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a pytree of arrays, as `restore` wants them; what says nothing of its sharding goes to one device."""
    here = SingleDeviceSharding(jax.local_devices()[0])

    def describe(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here
        )

    return jax.tree.map(describe, tree)
