"""Times the generation of synthetic data, and its memory: each source in processes of its own.

python -m scripts.bench.generate [--configs=synthetic_hstu,synthetic_long_rank_hstu]
    [--folder=FOLDER] [--record=experiments/results/generate_cpu.json]

One process prepares the data, another one reads it. The files are deleted behind.
"""

import json
import subprocess
import sys
import tempfile

from absl import flags

from experiments import command
from experiments.configs import named
from experiments.record import Json, Record
from scripts.bench.terminal import show

# Prepares what is not there, and reads it.
MEASURE = """
import json, resource, sys, time
from experiments.configs import named
from ultra_hstu.data.interactions import load_interactions
from ultra_hstu.fields import changed
def cpu():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
config = changed(named(sys.argv[1]).data, data_dir=sys.argv[2])
started, cpu_before = time.perf_counter(), cpu()
data = load_interactions(config)
print(json.dumps({
    "users": data.num_users, "items": data.num_items, "events": data.num_events,
    "seconds": time.perf_counter() - started, "cpu_seconds": cpu() - cpu_before,
    "peak_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
}))
"""

FLAGS = flags.FLAGS


def main(_: list[str]) -> None:
    record = Record(FLAGS.record)
    found: dict[str, Json] = {}
    for name in FLAGS.configs:
        source = named(name).data.source
        with tempfile.TemporaryDirectory(dir=FLAGS.folder or None) as folder:
            made, read = measured(name, folder), measured(name, folder)
        found[source] = made | {"load_seconds": read["seconds"], "load_peak_MiB": read["peak_MiB"]}
        record.add(sources=found)
    columns = "users items events seconds cpu_seconds peak_MiB load_seconds load_peak_MiB"
    show(found, columns.split())


def measured(name: str, folder: str) -> Json:
    """What a process measures that loads the data of a configuration."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, name, folder], capture_output=True, text=True
    )
    if done.returncode:
        raise ValueError(f"{name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


if __name__ == "__main__":
    flags.DEFINE_list(
        "configs",
        ["synthetic_hstu", "synthetic_long_rank_hstu"],
        "configurations whose data is made",
    )
    flags.DEFINE_string("folder", "", "where the files are written; empty: the usual one")
    command.define_record()
    command.run(main)
