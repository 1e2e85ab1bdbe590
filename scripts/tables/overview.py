"""What the README shows: six results, each linked to its page, and a walk through a small set."""

import itertools
import json
import re
from collections.abc import Callable

from experiments.record import Json
from scripts.tables import attention, context_parallel, retrieval, serving
from scripts.tables.records import load, markdown, mean_and_deviation, measured, short

WORKLOAD, WINDOWED = "causal_d128_8x8192", "4 x 16384 window 256"
HISTORY, CANDIDATES = 16384, 1024
HEADER = ["", "here", "beside", "on", "measured"]


def overview_table() -> str:
    """One line a result; what has no record is left out."""
    rows = [row for name, result in RESULTS.items() if (row := result(load(name)))]
    return markdown(HEADER, rows)


def accuracy(record: Json) -> list[str]:
    if not record:
        return []
    found = mean_and_deviation([run["best"]["hr@10"] for run in record["runs"]])
    public = retrieval.PUBLIC["published"]["ml1m_hstu"][retrieval.TRUE_ORDER]["hr@10"]
    what = f"HR@10 of HSTU on MovieLens-1M, {len(record['runs'])} seeds"
    beside = f"{short(public)}, public PyTorch code (quoted)"
    return [what, found, beside, record["device"], "[results](docs/results.md#movielens-1m)"]


def recipe(record: Json) -> list[str]:
    if not record:
        return []
    found = mean_and_deviation([run["best"]["hr@10"] for run in record["runs"]])
    public = retrieval.PUBLIC["validated"]["ml1m_hstu_large"][retrieval.RECTOOLS]["hr@10"]
    what = (
        f"HR@10 of our recipe on MovieLens-1M, epoch chosen before the test, {len(record['runs'])}"
    )
    beside = f"{short(public)}, RecTools (quoted)"
    link = "[results](docs/results.md#the-epoch-chosen-on-the-item-before-validated)"
    return [f"{what} seeds", found, beside, record["device"], link]


def kernel(record: Json) -> list[str]:
    rates = attention.attention_rates([r for r in record.get("records", []) if "tflops" in r])
    both = [
        " / ".join(attention.rate(rates[WORKLOAD, name, which]) for which in attention.PASSES)
        for name in ("mosaic", "meta_triton")
        if (WORKLOAD, name, "backward") in rates
    ]
    if len(both) < 2:
        return []
    what = "causal attention, 8 sequences of 8,192 rows, forward / backward, TFLOP/s"
    beside = f"{both[1]}, Meta's Triton kernel"
    return [what, both[0], beside, record["device"], "[results](docs/results.md#attention)"]


def layer(record: Json) -> list[str]:
    found = record.get("layers", {}).get(f"{WINDOWED}, none, training")
    if found is None:
        return []
    rate, other = found["TFLOP_a_second"], record["quoted"][WINDOWED]["Meta"]
    what = "a whole layer, 4 sequences of 16,384 rows, window of 256, forward and backward, TFLOP/s"
    beside = f"{other}, Meta's layer (quoted)"
    link = "[fused layer](docs/fused_layer.md#what-a-layer-costs)"
    return [what, f"{rate:.0f}", beside, record["device"], link]


def step(record: Json) -> list[str]:
    variants = record.get("variants", {})
    if not {"ultra", "plain_causal"} <= variants.keys():
        return []
    ultra, plain = (variants[name] for name in ("ultra", "plain_causal"))
    events = round(ultra["events_a_second"] * ultra["step_ms"] / 1000)
    link = "[encoder](docs/ultra_hstu.md)"
    what = f"training step, {events // HISTORY} histories of {HISTORY:,} events, ms"
    beside = f"{plain['step_ms']:.0f}, plain HSTU"
    return [what, f"{ultra['step_ms']:.0f}", beside, record["device"], link]


def length(record: Json) -> list[str]:
    found = record.get("variants", {}).get("causal/none", {})
    if not {"1", "8"} <= found.keys():
        return []
    ratio = f"{found['8']['longest'] / found['1']['longest']:.2f}"
    published = context_parallel.PUBLISHED
    beside = f"{published[8] / published[1]:.1f} (quoted from arXiv 2508.04711)"
    what = "longest sequence that fits 8 devices, over that of one"
    link = "[context parallelism](docs/context_parallel.md#the-longest-sequence)"
    device = record["compiled_for"].split(" (")[0]
    return [what, ratio, beside, f"compiled for {device}", link]


def served(record: Json) -> list[str]:
    if not record:
        return []
    cells = serving.by_place(record)
    cached = cells.get(("ultra", HISTORY, "cached", CANDIDATES, CANDIDATES))
    alone = cells.get(("ultra", HISTORY, "one_batch", CANDIDATES, CANDIDATES))
    if not (cached and alone):
        return []
    what = f"{CANDIDATES:,} candidates for a cached history of {HISTORY:,} events, ms"
    beside = f"{alone['p50_ms']:.1f} without the cache"
    link = "[cached scoring](docs/cached_scoring.md#what-it-costs)"
    return [what, f"{cached['p50_ms']:.1f}", beside, record["device"], link]


RESULTS: dict[str, Callable[[Json], list[str]]] = {
    "ml1m_best_validated_all": recipe,
    "ml1m_hstu_published": accuracy,
    attention.RECORD: kernel,
    "layer_h200": layer,
    "long_ultra_h200": step,
    "context_parallel_longest": length,
    serving.RECORD: served,
}


@measured("walkthrough")
def walkthrough(record: Json) -> str:
    """The commands that follow each other, and what they print."""
    lines = []
    for ran in record["steps"]:
        table = shown(ran["prints"])
        baselines = "evaluate" in ran["command"]  # training has shown them
        lines += [f"$ {ran['command']}", *(table[:5] if baselines else table)]
    address = "curl -s localhost:8000/recommend -H 'content-type: application/json'"
    lines.append(f"$ {record['serve']}  # and in another terminal:")
    lines.append(f"$ {address} -d '{json.dumps(record['request'])}'")
    response = json.dumps(record["response"], ensure_ascii=False)
    lines.append(response.replace(', {"item"', ',\n {"item"'))
    return "\n".join(["```console", *lines, "```"])


def shown(prints: list[str]) -> list[str]:
    """The last table that a command printed, without empty lines and what stands below it."""
    first = max(n for n, line in enumerate(prints) if re.search("protocol|recommendations:", line))
    lines = [line for line in prints[first:] if line]
    return list(itertools.takewhile(lambda line: not re.match(r" ?\w", line), lines))
