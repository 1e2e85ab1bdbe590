"""What can be reached at all in HSTU's study of synthetic streams (arXiv 2402.17152, appendix C).

python -m scripts.scaling.stream --record=experiments/results/stream_bound.json

Nothing is trained; the models are `scripts.study --study=stream`. It says what HR@10 and HR@50 are
to be expected on the newest tenth of the records of somebody who knows the prior and the
concentration of every record, which no model can exceed.
"""

import numpy as np
from absl import flags
from jaxtyping import Float64

from experiments import command
from experiments.configs.scaling import STREAM
from experiments.record import Record
from ultra_hstu.config import SyntheticConfig
from ultra_hstu.data.synthetic import draw_records, draw_stream

CUTS = (10, 50)

FLAGS = flags.FLAGS


def main(_: list[str]) -> None:
    console, record = command.progress_console(), Record(FLAGS.record, grows=True)
    for hides in (True, False):
        found = bound(STREAM.data.synthetic, STREAM.data.new_users_fraction, hides=hides)
        record.add(**{"history_hidden" if hides else "nothing_hidden": found})
        console.print(found)


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
    command.define_record()
    command.run(main)
