"""The tables of the softmax losses: their cost, and what shared negatives do to a model."""

from experiments.record import Json
from scripts.bench.loss import KINDS
from scripts.tables.records import load, markdown, mean_and_deviation, measured, origin
from scripts.tables.retrieval import METRICS

CASES = {"ml1m": "`ml1m_hstu`", "steps": "wide rows", "catalogue": "a million items"}
NEGATIVES = {  # record -> what a position is compared with
    "ml1m_hstu_published": "128 negatives, its own",
    "ml1m_hstu_negatives_shared": "128 negatives, shared by 128 rows",
}


def _costs(record: Json) -> str:
    """Milliseconds and memory of each loss, by shape and implementation."""
    rows, rates = [], []
    on_cpu = record["platform"] == "cpu"
    for name, label in CASES.items():
        case = record.get(name)
        if case is None:
            continue
        shape = "{rows:,} x {items:,}, D {width}, {dtype}".format(**case)
        rates.append(f"{case['product_TFLOP_a_second']:.3g} ({case['dtype']})")
        for kind in KINDS:
            for key, found in case.items():
                if not key.startswith(f"{kind} ") or "ms" not in found:
                    continue
                times = [found["ms"], found["cpu_ms"]] if on_cpu else [found["ms"]]
                rows.append(
                    [
                        f"{label}: {shape}",
                        kind,
                        f"`{key.removeprefix(kind).strip()}`",
                        *(f"{ms:.3g}" for ms in times),
                        f"{found['TFLOP_a_second']:.3g}",
                        f"{found['temporary_MiB']:.0f}",
                    ]
                )
    times = ["ms", "CPU ms"] if on_cpu else ["ms"]
    header = ["rows x items", "loss", "implementation", *times, "TFLOP/s", "temporary MiB"]
    note = f"A matrix product in the same run: {', '.join(dict.fromkeys(rates))} TFLOP/s."
    return markdown(header, rows, note, origin(record))


gpu_table = measured("loss_h200")(_costs)
cpu_table = measured("loss_cpu")(_costs)


def negatives_table() -> str:
    """HSTU on MovieLens-1M after the same epochs, by what a position is compared with."""
    rows = []
    for name, label in NEGATIVES.items():
        if record := load(name):
            runs = [run["last"] for run in record["runs"]]
            cells = [mean_and_deviation([run[metric] for run in runs]) for metric in METRICS]
            rows.append([label, str(len(runs)), *cells])
    return markdown(["a position's negatives", "seeds", *map(str.upper, METRICS)], rows)
