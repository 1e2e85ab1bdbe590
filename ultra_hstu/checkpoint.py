"""Checkpoints with Orbax: written in the background, whole or not at all; the newest ones and the best are kept."""

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

SELECTION_METRIC = "ndcg@10"

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run.

    A checkpoint holds `state` (a pytree of arrays), `position` (a JSON dict: where in the data and the run it was taken) and, where an
    evaluation went before it, that evaluation's metrics, by which the best is chosen.
    """

    def __init__(self, directory: Path, *, keep: int = 2, read_only: bool = False):
        self.directory = directory
        policy = preservation_policy.AnyPreservationPolicy(
            [
                preservation_policy.LatestN(keep),
                preservation_policy.BestN(
                    get_metric_fn=lambda metrics: metrics[SELECTION_METRIC], n=1, keep_checkpoints_without_metrics=False
                ),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            best_fn=lambda metrics: metrics[SELECTION_METRIC],
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
        )
        self._manager = ocp.CheckpointManager(directory, options=options, item_names=("state", "position"))

    def save(self, step: int, state: Any, position: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Starts writing; errors of this or the save before it surface here or in `wait`.

        Raises:
          OSError: if a checkpoint could not be written, naming the last good one.
        """
        if step in self._manager.all_steps():
            return
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position))
        try:
            self._manager.save(step, args=args, metrics=metrics, force=True)
        except Exception as error:
            raise self._not_written(error) from error

    def wait(self) -> None:
        """Returns when every started save is on disk. Raises OSError as `save`."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._not_written(error) from error

    def restore(self, abstract_state: Any, *, best: bool = False) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, state, position) of the newest (or best) readable checkpoint; None if there has never been one.

        One that cannot be read is reported and passed over for the one before it.

        Raises:
          ValueError: if there are checkpoints and none can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        if best and (best_step := self._manager.best_step()) is not None:
            steps = [best_step] + [step for step in steps if step != best_step]
        problems = []
        for step in steps:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), position=ocp.args.JsonRestore())
            try:
                restored = self._manager.restore(step, args=args)
                return step, restored.state, restored.position
            except Exception as error:  # whatever a damaged file makes Orbax raise
                problems.append(f"{self.directory / str(step)}: {type(error).__name__}: {str(error).splitlines()[0]}")
                log.warning("checkpoint %s cannot be read, trying the one before it", problems[-1])
        if problems:
            raise ValueError("no checkpoint can be read:\n  " + "\n  ".join(problems))
        return None

    def drop_after(self, step: int) -> None:
        """Removes checkpoints newer than `step`: those that `restore` could not read and that the run will write again."""
        for newer in [other for other in self._manager.all_steps() if other > step]:
            self._manager.delete(newer)

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def _not_written(self, error: Exception) -> OSError:
        whole = [step for step in self._manager.all_steps() if (self.directory / str(step)).is_dir()]
        last = f"the last good one is {self.directory / str(max(whole))}" if whole else "there is no earlier one"
        return OSError(
            f"a checkpoint could not be written to {self.directory} ({error}); {last}. Make room and start the same command again."
        )


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a pytree of arrays, as `restore` wants them."""
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
