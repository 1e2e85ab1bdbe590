"""Writes the tables and figures of the README from the files under experiments/results, and nothing else: no number is typed by hand.

python -m scripts.make_tables [--check]

A table stands in README.md between `<!-- table NAME -->` and `<!-- end NAME -->`. `--check` changes nothing and fails if a table is not current.
"""

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from absl import app, flags

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
FIGURES = ROOT / "docs" / "figures"
METRICS = ("hr@10", "ndcg@10", "hr@50", "ndcg@50", "hr@200", "mrr")
MODELS = {"ml1m_sasrec": "SASRec", "ml1m_hstu": "HSTU", "ml1m_hstu_large": "HSTU-large"}

# Published by the reference implementation (its README, 04/15/2024; ties in arbitrary order) and measured with it on the true order of
# the same data, one seed, last of 101 epochs. These are other people's numbers, so they stand here and not under results.
REFERENCE = {
    "published table": {
        "ml1m_sasrec": {"hr@10": 0.2853, "ndcg@10": 0.1603, "hr@50": 0.5474, "ndcg@50": 0.2185, "hr@200": 0.7528},
        "ml1m_hstu": {"hr@10": 0.3097, "ndcg@10": 0.1720, "hr@50": 0.5754, "ndcg@50": 0.2307, "hr@200": 0.7716},
        "ml1m_hstu_large": {"hr@10": 0.3294, "ndcg@10": 0.1893, "hr@50": 0.5935, "ndcg@50": 0.2481, "hr@200": 0.7839},
    },
    "public PyTorch code, true order": {
        "ml1m_sasrec": {"hr@10": 0.2925, "ndcg@10": 0.1670, "hr@50": 0.5568, "ndcg@50": 0.2255, "hr@200": 0.7556, "mrr": 0.1439},
        "ml1m_hstu": {"hr@10": 0.3252, "ndcg@10": 0.1868, "hr@50": 0.5815, "ndcg@50": 0.2434, "hr@200": 0.7685, "mrr": 0.1590},
        "ml1m_hstu_large": {"hr@10": 0.3581, "ndcg@10": 0.2132, "hr@50": 0.6108, "ndcg@50": 0.2694, "hr@200": 0.7894, "mrr": 0.1833},
    },
}
REFERENCE_SPEED = [  # the public PyTorch code at its best, timed on the same kinds of machine: forward, loss, backward, optimizer, nothing else
    ["HSTU", "1 x NVIDIA H200", "public PyTorch code: the steps of 101 epochs, no evaluation", "83 s"],
    ["HSTU", "2 CPU cores", "public PyTorch code: one training step, batch 128", "751 ms"],
]
VARIANTS = {  # file suffix -> what it was
    "published": "ours, `published`",
    "random_ties": "ours, `published`, ties at random",
    "validated": "ours, `validated`",
    "temporal": "ours, `temporal`",
}


def load(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def short(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}".removeprefix("0")


def mean_and_deviation(values: list[float]) -> str:
    mean = short(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ± {short(statistics.stdev(values))}"


def ml1m_table() -> str:
    """One line a model and condition; ours with mean and standard deviation over seeds."""
    rows, notes = [], []
    for config, model in MODELS.items():
        for source, values in REFERENCE.items():
            rows.append([model, source, "", *(short(values[config].get(name)) for name in METRICS)])
        for suffix, label in VARIANTS.items():
            record = load(f"{config}_{suffix}")
            if not record:
                continue
            mark = ""
            if note := record.get("note"):
                notes += [] if note in notes else [note]
                mark = f" [{notes.index(note) + 1}]"
            for which, words in (("best", ""), ("last", ", last epoch")) if suffix == "published" else (("best", ""),):
                runs = [run[which] for run in record["runs"]]
                cells = [mean_and_deviation([run[name] for run in runs]) for name in METRICS]
                rows.append([model, label + words, str(len(runs)) + mark, *cells])
    return "\n\n".join(
        [
            markdown(["model", "condition", "seeds", *(name.upper() for name in METRICS)], rows),
            *(f"[{number}] {note}" for number, note in enumerate(notes, start=1)),
        ]
    )


def speed_table() -> str:
    """Seconds of a whole run that had the device to itself (evaluation every epoch included, compilation not), and of a training step."""
    rows = []
    for config, model in MODELS.items():
        record = load(f"{config}_published")
        if record and not record.get("shared_device"):
            seconds = sorted(run["seconds"] for run in record["runs"])
            rows.append(
                [model, record["device"], f"{record['runs'][0]['epochs']} epochs, evaluation each", f"{seconds[len(seconds) // 2]:.1f} s"]
            )
        for device in ("h200", "cpu"):
            step = load(f"step_{config}_{device}")
            if step:
                place = step["device"] if device != "cpu" else f"{step['host_cores']} CPU cores"
                rows.append([model, place, "one training step, batch 128", f"{step['device_feed']['step_ms_median']:.0f} ms"])
                rows.append([model, place, "the same, data streamed", f"{step['streamed_feed']['step_ms_median']:.0f} ms"])
                rows.append([model, place, "share of it waiting for data", f"{100 * step['streamed_feed']['input_wait_share']:.2f} %"])
                rows.append(
                    [
                        model,
                        place,
                        "ranking all test users",
                        f"{step['evaluation']['seconds']:.1f} s, {step['evaluation']['peak_MiB']:.0f} MiB",
                    ]
                )
    return markdown(["model", "device", "what", "value"], rows + REFERENCE_SPEED)


ATTENTION = {
    "mosaic": "`mosaic`",
    "triton": "`triton`",
    "xla": "`xla`",
    "meta_triton": "Meta's Triton kernel",
    "cudnn_sdpa": "cuDNN softmax [1]",
}
PASSES = ("forward", "backward")
RIVALS_BEFORE = {  # TFLOP/s, measured before on another H200, where the record has none: other people's kernels, so they stand here
    ("causal_d128_4x8192", "meta_triton", "forward"): 363,
    ("causal_d128_4x8192", "meta_triton", "backward"): 181,
    ("causal_d128_4x8192", "cudnn_sdpa", "forward"): 531,
    ("causal_d128_4x8192", "cudnn_sdpa", "backward"): 477,
}


def attention_rates(record: dict[str, Any]) -> dict[tuple[str, str, str], float]:
    """TFLOP/s by (workload, implementation, pass), of what ran."""
    return {(r["workload"], r["implementation"], r["pass"]): r["tflops"] for r in record["records"] if "tflops" in r}


def attention_table() -> str:
    """TFLOP/s of forward / backward; a dash where an implementation cannot."""
    record = load("attention_h200")
    if record is None:
        return "Not measured yet."
    rates = attention_rates(record)
    rows = []

    def cell(workload: str, name: str) -> str:
        keys = [(workload, name, which) for which in PASSES]
        mark = "" if any(key in rates for key in keys) else " [2]"
        both = [rates.get(key, RIVALS_BEFORE.get(key)) for key in keys]
        return "-" if both == [None, None] else " / ".join("-" if x is None else f"{x:.0f}" if x >= 10 else f"{x:.1f}" for x in both) + mark

    for workload in dict.fromkeys(r["workload"] for r in record["records"] if not r["workload"].startswith("length_")):
        rows.append([f"`{workload}`", *(cell(workload, name) for name in ATTENTION)])
    product = record["matmul_tflops"]
    notes = [
        f"Forward / backward, useful TFLOP/s (unmasked pairs, backward 2.5 times the forward), bfloat16 (`ml1m` float32 with relative bias), "
        f"{record['device']}, commit {record['commit']}"
        + (f"; a bfloat16 matrix product of 8192 reached {product:.0f} in the same run." if product else "."),
        "[1] Another function, softmax attention, with the same two products: what a vendor's kernel reaches.",
    ]
    if any("[2]" in text for row in rows for text in row):
        notes.append("[2] Not of this run: measured before, on another H200, Meta's kernel tuned by itself, its forward with TMA.")
    fp8 = [
        r for r in record["records"] if r["implementation"] == "mosaic_fp8" and "tflops" in r and not r["workload"].startswith("length_")
    ]
    if fp8:
        listed = "; ".join(f"`{r['workload']}` {r['tflops']:.0f}, error {100 * r['error']:.1f} %" for r in fp8)
        notes.append(f"`mosaic_fp8`, forward, rounding of the inputs included: {listed}.")
    return "\n\n".join([markdown(["workload", *ATTENTION.values()], rows), *notes, *record.get("notes", [])])


def gpu_tests_table() -> str:
    record = load("test_gpu")
    if record is None:
        return "Not run yet."
    rows = []
    for suite, counts in record["suites"].items():
        total = counts.get("collected", counts["passed"] + counts["failed"])
        rows.append([f"`{suite}`", *(str(n) for n in (counts["passed"], counts["failed"], total - counts["passed"] - counts["failed"]))])
    where = f"{record['device']}, commit {record['commit']}, {record['date'][:10]}."
    return "\n\n".join([markdown(["GPU tests", "passed", "failed", "not reached"], rows), where, *record.get("notes", [])])


TABLES: dict[str, Callable[[], str]] = {"ml1m": ml1m_table, "speed": speed_table, "attention": attention_table, "test_gpu": gpu_tests_table}


def with_tables(text: str) -> str:
    for name, make in TABLES.items():
        start, end = f"<!-- table {name} -->\n", f"\n<!-- end {name} -->"
        before, found, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"README.md has no '{start.strip()}' ... '{end.strip()}'")
        text = before + start + make() + end + after
    return text


def ml1m_figure() -> None:
    """HR@10 over epochs, first seed of each model, beside the reference's last epoch."""
    figure, axis = plt.subplots(figsize=(7, 3.8), constrained_layout=True)
    for colour, (config, model) in zip(("tab:grey", "tab:blue", "tab:red"), MODELS.items(), strict=True):
        record = load(f"{config}_published")
        if record:
            history = record["runs"][0]["history"]
            axis.plot([point["epoch"] for point in history], [point["hr@10"] for point in history], color=colour, label=model)
            axis.axhline(REFERENCE["public PyTorch code, true order"][config]["hr@10"], color=colour, linestyle=":", linewidth=1)
    axis.plot([], [], color="black", linestyle=":", linewidth=1, label="public PyTorch code, last epoch")
    axis.set(xlabel="epoch", ylabel="HR@10", title="MovieLens-1M, test users, published protocol, true order")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower right")
    figure.savefig(FIGURES / "ml1m.png", dpi=130)
    plt.close(figure)


def attention_figure() -> None:
    """TFLOP/s over the length of causal sequences, 65536 rows in all, width 128."""
    record = load("attention_h200")
    if record is None:
        return
    rates = {(key[0].replace("causal_d128_8x8192", "length_8192"), *key[1:]): x for key, x in attention_rates(record).items()}
    looks = {
        "mosaic": ("tab:red", "-"),
        "triton": ("tab:orange", "-"),
        "cudnn_sdpa": ("tab:green", "--"),
        "meta_triton": ("tab:blue", "--"),
    }
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, constrained_layout=True)
    lengths = sorted({int(workload.removeprefix("length_")) for workload, _, _ in rates if workload.startswith("length_")})
    for axis, which in zip(axes, PASSES, strict=True):
        for name, (colour, line) in looks.items():
            points = [(n, rates[f"length_{n}", name, which]) for n in lengths if (f"length_{n}", name, which) in rates]
            label = ATTENTION[name].replace("`", "").replace(" [1]", "")
            axis.plot(*zip(*points, strict=True), color=colour, linestyle=line, marker="o", markersize=4, label=label) if points else None
        if record["matmul_tflops"]:
            axis.axhline(record["matmul_tflops"], color="black", linestyle=":", linewidth=1, label="bfloat16 matrix product")
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
        axis.minorticks_off()
        axis.set(xlabel="length of each sequence", title=which, ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("useful TFLOP/s")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=5, fontsize=8)
    device = record["device"].removeprefix("1 x ")
    figure.suptitle(f"Causal attention, 4 heads of 128, 65536 rows, {device}", fontsize=10)
    figure.savefig(FIGURES / "attention.png", dpi=130)
    plt.close(figure)


_CHECK = flags.DEFINE_bool("check", False, "change nothing; fail if a table is not current")


def main(_: list[str]) -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    current = with_tables(text)
    if _CHECK.value:
        if current != text:
            sys.exit("README.md: tables are not current; run make tables")
        return
    readme.write_text(current)
    ml1m_figure()
    attention_figure()


if __name__ == "__main__":
    app.run(main)
