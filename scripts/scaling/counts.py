"""What needs no training: the floor of long histories, and what every run of the grid computes.

python -m scripts.scaling.counts --record=experiments/results/scaling_counts.json [--raw_dir=FOLDER]
    [--data_dir=FOLDER]

The floor is exact, of the settings of `synthetic_long_rank_hstu`. Operations are those of
`ultra_hstu.flops`, a request, over the requests that the runs learn from and are tested on.
"""

from absl import flags

from experiments import command
from experiments.configs.scaling import LONG
from experiments.record import Json, Record
from scripts.scaling import grid, run
from ultra_hstu.config import SyntheticLongConfig
from ultra_hstu.data import best_prediction

LENGTHS = (0, *(2**n for n in range(4, 16)))

FLAGS = flags.FLAGS


def main(_: list[str]) -> None:
    console, record = command.progress_console(), Record(FLAGS.record)
    record.add(**floors(LONG.data.synthetic_long))
    data, missing = run.read_sets(list(grid.SETS), FLAGS.raw_dir, FLAGS.data_dir)
    jobs = run.jobs_of(data)
    told = ("data", "model", "length", "layers", "seed", "training", "inference", "events")
    runs = {
        job.name: {name: job.about[name] for name in told}
        | {"steps": job.config.train.steps, "seconds": job.seconds}
        for job in jobs
    }
    record.add(data={name: one.fingerprint() for name, one in data.items()}, runs=runs)
    minutes = sum(job.seconds for job in jobs) / 60
    console.print(f"{len(jobs)} runs, predicted to take {minutes:.0f} minutes of one H200")
    if missing:
        raise ValueError("; ".join(missing))


def floors(settings: SyntheticLongConfig) -> Json:
    """The best possible NE by length, and of endless histories."""
    of_length = {str(length): best_prediction.floor(settings, length) for length in LENGTHS}
    return {"floor": of_length, "lowest": best_prediction.lowest(settings)}


if __name__ == "__main__":
    command.as_path(flags.DEFINE_string("raw_dir", None, "a copy of ASSISTments 2017"))
    command.as_path(flags.DEFINE_string("data_dir", None, "where prepared data goes"))
    command.define_record()
    command.run(main)
