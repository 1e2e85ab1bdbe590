"""How sparse stochastic length makes histories: the grid of HSTU's tables 3, 14 and 15, counted.

python -m scripts.stochastic_length --record=experiments/results/stochastic_length.json
    [--raw_dirs=assistments-2017=PATH,ml-1m=PATH] [--data_dir=PATH]

Nothing is trained: a count on the host, a minute. What each cell costs in NE is trained by
`scripts.study --study=stochastic_length`, on a GPU.

A history of n events counts as its newest min(n, N). Of u histories, k_i of history i kept,

    sparsity = 1 - sum_i E[k_i] / (u N)        of the rows that a step has
    s2       = 1 - sum_i E[k_i^2] / (u N^2)    of the pairs of attention

with E over the draws of equation 4, exact. The paper (arXiv 2402.17152) shows both and defines
neither in what could be had of it; at N = 1024, where nearly all of its histories are N long, these
give its numbers: 37.5 and 56.2 % for alpha 1.8. Under alpha 2 nothing is cut, and what remains is
that histories are shorter than N; `dropped` leaves that out: 1 - sum E[k] / sum n, and for pairs.

Which events stay changes no count. `age` says how far back they reach: the mean age of a kept event
of histories that alpha 1.6 cuts, over that of all their events, by number of events and by time.
"""

import numpy as np
from absl import flags
from jaxtyping import Float, Int

from experiments import command
from experiments.record import Json, Record
from ultra_hstu import report, sampling
from ultra_hstu.config import DataConfig
from ultra_hstu.data.interactions import Interactions, load_interactions

FLAGS = flags.FLAGS
ALPHAS, LENGTHS = (1.6, 1.7, 1.8, 1.9, 2.0), (1024, 2048, 4096, 8192)
KINDS: tuple[sampling.Subsequence, ...] = ("recent", "random", "weighted")
# Mean and deviation of the paper's histories, which follow from its table 14 at alpha 2, N = 8192:
# 57.6 % and 80.6 %.
PAPER_MEAN, PAPER_DEVIATION, LONGEST = 3473, 980, 8192
SYNTHETIC = "synthetic, to 8,192"


def expected(
    length_U: Int[np.ndarray, " U"], most: int, alpha: float
) -> tuple[Float[np.ndarray, " U"], Float[np.ndarray, " U"]]:
    """E[k] and E[k^2] of the kept events of each history, whose newest `most` count."""
    n_U = np.minimum(length_U, most)
    cut = sampling.threshold(most, alpha)
    whole_U = np.minimum(sampling.keep_probability(n_U, most, alpha), 1.0)
    whole_U = np.where(n_U > cut, whole_U, 1.0)
    first, second = (whole_U * n_U**p + (1 - whole_U) * float(cut) ** p for p in (1, 2))
    return first, second


def grid(length_U: Int[np.ndarray, " U"]) -> list[Json]:
    """One entry for each alpha and N."""
    cells = []
    for alpha in ALPHAS:
        for most in LENGTHS:
            kept_U, square_U = expected(length_U, most, alpha)
            n_U = np.minimum(length_U, most).astype(np.float64)
            cells.append(
                {
                    "alpha": alpha,
                    "N": most,
                    "threshold": sampling.threshold(most, alpha),
                    "sparsity": 1 - float(kept_U.mean()) / most,
                    "s2": 1 - float(square_U.mean()) / most**2,
                    "dropped_events": 1 - float(kept_U.sum() / n_U.sum()),
                    "dropped_pairs": 1 - float(square_U.sum() / (n_U**2).sum()),
                }
            )
    return cells


def ages(data: Interactions, most: int, alpha: float) -> Json:
    """How old the kept events of cut histories are, over how old all their events are."""
    rng, cut = np.random.default_rng(0), sampling.threshold(most, alpha)
    sums = {kind: np.zeros(2) for kind in KINDS}
    totals = np.zeros(2)
    for first, last in zip(data.offsets[:-1], data.offsets[1:], strict=True):
        first = max(first, last - most)
        if (n := int(last - first)) <= cut:
            continue
        times_n = None if data.timestamps is None else data.timestamps[first:last]
        of_time_n = np.zeros(n) if times_n is None else times_n[-1] - times_n
        age_n2 = np.stack([np.arange(n)[::-1], of_time_n], axis=1)
        totals += age_n2.mean(0)
        for kind in KINDS:
            sums[kind] += age_n2[sampling.subsequence(kind, n, cut, rng, times_n)].mean(0)
    known = ("events", "time") if totals[1] > 0 else ("events",)  # without times all are 0
    return {
        kind: {name: sums[kind][i] / totals[i] for i, name in enumerate(known)} for kind in KINDS
    }


def main(_: list[str]) -> None:
    console = report.make_console()
    raw = dict(given.split("=", 1) for given in FLAGS.raw_dirs)
    record, sets = Record(FLAGS.record, alphas=ALPHAS, lengths=LENGTHS), {}
    drawn = np.random.default_rng(0).normal(PAPER_MEAN, PAPER_DEVIATION, 100_000)
    sets[SYNTHETIC] = describe(np.clip(np.round(drawn), 1, LONGEST).astype(np.int64))
    for source in FLAGS.sources:
        config = DataConfig(source=source, raw_dir=raw.get(source), data_dir=FLAGS.data_dir)
        data = load_interactions(config)
        most = min(int(data.lengths.max()), LONGEST)
        sets[source] = describe(data.lengths) | {"age": ages(data, most, 1.6)}
    for name, found in sets.items():
        console.print(f"{name}: {found['histories']} histories, mean {found['mean']:.0f}")
    record.add(sets=sets)


def describe(length_U: Int[np.ndarray, " U"]) -> Json:
    return {
        "histories": len(length_U),
        "mean": float(length_U.mean()),
        "longest": int(length_U.max()),
        "grid": grid(length_U),
    }


if __name__ == "__main__":
    flags.DEFINE_list("sources", ["assistments-2017", "ml-1m"], "data whose histories are counted")
    flags.DEFINE_list("raw_dirs", [], "SOURCE=PATH of copies that are read instead of a download")
    flags.DEFINE_string("data_dir", None, "where prepared data goes; None: the default")
    command.define_record()
    command.run(main)
