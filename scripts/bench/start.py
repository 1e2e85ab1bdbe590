"""Times a start of training, from the command to its first step: the first start, and later ones.

python -m scripts.bench.start --config=ml100k_hstu [--config.data.raw_dir=PATH]
    [--record=experiments/results/NAME.json]

`experiments.train` runs in processes of its own with an empty folder of compiled programs, which
later starts find. Seconds are those at which it says that a part is done: the code is loaded and
JAX is started (`device`), the data is read (`data`), the step is known (`model`: the state is made,
a checkpoint is tried out, the step is traced or found) and its program is there (`compile`), where
the first step begins. `cpu` is what the process has computed by then: on a machine with other work
the better measure. Data is prepared before. A record has a key for each configuration.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import flags

from experiments import command
from experiments.record import Json, Record
from scripts.bench.terminal import show
from ultra_hstu import tasks
from ultra_hstu.config import from_config_dict

FLAGS = flags.FLAGS
PARTS = ("device", "data", "model", "compile")


def main(_: list[str]) -> None:
    config = from_config_dict(FLAGS.config)
    record = Record(FLAGS.record, grows=True)
    tasks.load(config)
    given = [word for word in sys.argv[1:] if word.startswith("--config")]
    with tempfile.TemporaryDirectory() as folder:
        starts = {"first": start(given, Path(folder), "first", last_step=True)}
        later = [start(given, Path(folder), f"later{i}") for i in range(FLAGS.repeats)]
        starts["later"] = min(later, key=lambda found: found["compile"])
    show(starts, (*PARTS, "cpu"), config.name)
    record.add(**{config.name: starts})


def start(given: list[str], folder: Path, name: str, *, last_step: bool = False) -> Json:
    """Seconds at which each part of a start was done.

    Args:
      given: flags of the configuration.
      last_step: go on to the end of an epoch, behind which all programs are kept.
    """
    run = [
        *(sys.executable, "-u", "-m", "experiments.train", *given, "--config.train.epochs=1"),
        *(f"--workdir={folder / name}", f"--compilation_cache={folder / 'programs'}"),
    ]
    found: Json = {}
    said = []
    began, before = time.perf_counter(), cpu_of_children()
    with subprocess.Popen(
        run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            said.append(line)
            label = line.split(" ", 1)[0]
            if label in PARTS and " so far" not in line:
                found[label] = time.perf_counter() - began
            if label == "compile" and label in found and not last_step:
                child.kill()
    if "compile" not in found or (last_step and child.returncode):
        raise RuntimeError(f"{' '.join(run)} did not start:\n{''.join(said)}")
    if not last_step:
        found["cpu"] = cpu_of_children() - before
    return found


def cpu_of_children() -> float:
    """Seconds that processes have computed which this one has started and which have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    command.define_config()
    flags.DEFINE_integer("repeats", 3, "later starts, of which the fastest counts")
    command.define_record()
    command.run(main)
