"""HSTU's study of synthetic streams (arXiv 2402.17152, appendix C), and what can be reached at all.

python -m scripts.scaling.stream --workdir=runs/stream --record=experiments/results/stream_h200.json
    [--minutes=20] [--data_dir=FOLDER]
python -m scripts.scaling.stream --bound --record=experiments/results/stream_bound.json

Three models of three seeds learn from 900,000 records of 128 events, once. It is predicted to take
twenty minutes of one H200, and goes on with what is left when it is started again. --bound
trains nothing: it says what HR@10 and HR@50 are to be expected on the newest tenth of the records
of somebody who knows the prior and the concentration of every record, which no model can exceed.
"""

import functools
from pathlib import Path

import numpy as np
from absl import flags
from jaxtyping import Float64

from experiments import command
from experiments.configs import named
from experiments.record import Record
from scripts.scaling.sweep import Job, add_data, finished, sweep
from ultra_hstu import flops, tasks
from ultra_hstu.config import Config, SyntheticConfig
from ultra_hstu.data.interactions import load_interactions
from ultra_hstu.data.synthetic import draw_records, draw_stream
from ultra_hstu.fields import changed

MODELS = ("synthetic_hstu", "synthetic_hstu_softmax", "synthetic_transformer")
SEEDS = (42, 43, 44)
TFLOPS = 25.0  # a second, as `assistments_rank_hstu` ran, of small heads
START = 60.0  # seconds of a start, programs and evaluations
CUTS = (10, 50)

FLAGS = flags.FLAGS


def main(_: list[str]) -> None:
    console, record = command.progress_console(), Record(FLAGS.record, grows=True)
    base = changed(named(MODELS[0]), data={"data_dir": FLAGS.data_dir})
    if FLAGS.bound:
        for hides in (True, False):
            found = bound(base.data.synthetic, base.data.new_users_fraction, hides=hides)
            record.add(**{"history_hidden" if hides else "nothing_hidden": found})
            console.print(found)
        return
    interactions = load_interactions(base.data)
    add_data(record, {base.data.source: interactions.fingerprint()})
    left = sweep(
        [job_of(name, seed, FLAGS.data_dir) for seed in SEEDS for name in MODELS],
        Path(FLAGS.workdir),
        record,
        load=functools.partial(tasks.of, interactions=interactions),
        measure=lambda job, task, folder: {},
        minutes=FLAGS.minutes,
        console=console,
    )
    done = len(finished(record))
    console.print(f"{done} runs are in the record, {len(left)} are left for the same command")


def job_of(name: str, seed: int, data_dir: str | None) -> Job:
    config: Config = changed(named(name), data={"data_dir": data_dir}, train={"seed": seed})
    data = config.data
    cost = flops.count(config, data.max_history, items=data.synthetic.items)
    records = (1 - data.new_users_fraction) * data.synthetic.users * config.train.epochs
    seconds = START + cost.training * records / (1e12 * TFLOPS)
    about = {"model": name, "training": cost.training, "inference": cost.inference, "seed": seed}
    return Job(f"{name}_seed_{seed}", name, config, seconds, about)


def bound(settings: SyntheticConfig, fraction: float, *, hides: bool) -> dict[str, float]:
    """The expected HR of the last event of the newest records, for who knows how it is drawn.

    Args:
      fraction: share of the records.
      hides: items of the history are left out of the list, as under eval.repeats="hide".
    """
    users, num_categories = settings.users, settings.categories
    newest = slice(users - int(users * fraction), users)
    records = draw_records(settings, np.random.default_rng(settings.seed))
    history_BN = np.sort(draw_stream(settings)[newest, :-1], axis=1)
    first_BN = np.diff(history_BN, axis=1, prepend=-1) != 0  # of equal items
    category_BP, a_B = records.category[newest], records.concentration[newest]
    share_BP = np.diff(records.cumulative[newest], axis=1, prepend=0.0)
    events_BP, seen_BP = np.zeros((2, *category_BP.shape))
    for place, category_B in enumerate(category_BP.T):
        of_category_BN = history_BN % num_categories == category_B[:, None]
        events_BP[:, place] = of_category_BN.sum(1)
        seen_BP[:, place] = (of_category_BN & first_BN).sum(1)
    length = settings.length - 1
    available_BP = records.available(category_BP, num_categories, newest)
    chance_BP = (a_B[:, None] * share_BP + events_BP) / (a_B[:, None] + length) / available_BP
    items_BP = available_BP - (seen_BP if hides else 0)
    return {f"hr@{k}": float(_best(chance_BP, items_BP, k).mean()) for k in CUTS}


def _best(
    chance_BP: Float64[np.ndarray, "B P"], items_BP: Float64[np.ndarray, "B P"], k: int
) -> Float64[np.ndarray, " B"]:
    """The sum of the k largest chances, where so many items have each."""
    order_BP = np.argsort(-chance_BP, axis=1)
    items_BP = np.take_along_axis(items_BP, order_BP, axis=1)
    before_BP = np.cumsum(items_BP, axis=1) - items_BP
    taken_BP = np.clip(k - before_BP, 0, items_BP)
    return (np.take_along_axis(chance_BP, order_BP, axis=1) * taken_BP).sum(1)


if __name__ == "__main__":
    command.as_path(flags.DEFINE_string("workdir", "runs/stream", "folder of all runs"))
    flags.DEFINE_float("minutes", None, "train what is predicted to end by then", 0.0)
    command.as_path(flags.DEFINE_string("data_dir", None, "where prepared data goes"))
    flags.DEFINE_bool("bound", False, "compute what can be reached, and train nothing")
    command.define_record()
    command.run(main)
