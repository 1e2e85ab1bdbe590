"""The tables and the figure of attention: speed beside other people's kernels, and GPU tests."""

import matplotlib

from experiments.record import Json
from scripts.tables.records import load, markdown, measured, of_commit, origin, picture, themed

ATTENTION = {
    "short": "`short`",
    "mosaic": "`mosaic`",
    "triton": "`triton`",
    "xla": "`xla`",
    "meta_triton": "Meta's Triton kernel [2]",
    "cudnn_sdpa": "cuDNN softmax [1]",
}
LINES = {
    "mosaic": ("ours, mosaic", "tab:red", "-"),
    "triton": ("ours, triton", "tab:orange", "-"),
    "cudnn_sdpa": ("cuDNN, softmax attention", "tab:green", "--"),
    "meta_triton": ("Meta's Triton kernel", "tab:blue", "--"),
}
PASSES = ("forward", "backward")
RECORD = "attention_h100"


def attention_rates(records: list[Json]) -> dict[tuple[str, str, str], float]:
    """TFLOP/s by (workload, implementation, pass)."""
    return {(r["workload"], r["implementation"], r["pass"]): r["tflops"] for r in records}


def rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1f}"


SHORT = {
    "short_d64_512x100": "512 sequences of 100, width 64",
    "short_d64_jagged": "1,500 sequences, most below 64 rows",
    "short_d50_512x100": "512 sequences of 100, width 50",
}


@measured("short_attention_h200")
def short_table(record: Json) -> str:
    """Short sequences with the kernels in halves, and with those before them."""
    kinds = {
        "short_before": "in loops",
        "short": "in halves",
        "short_bytes": "the same bytes moved by XLA",
    }
    rows = []
    for workload, words in SHORT.items():
        for kind, kernels in kinds.items():
            of = {
                one["pass"]: one
                for one in record["records"]
                if (one["workload"], one["implementation"]) == (workload, kind)
            }
            if of:
                times = [f"{1e3 * of[name]['ms']:.1f}" for name in PASSES]
                rates = [rate(of[name].get("tflops")) for name in PASSES]
                rows.append([words, kernels, *times, *rates])
    header = ["sequences, 4 heads, bfloat16", "", "forward, us", "backward, us"]
    note = f"Useful TFLOP/s. Both kernels were timed in turns. {origin(record)}"
    return markdown([*header, "forward, TFLOP/s", "backward, TFLOP/s"], rows, note)


@measured(RECORD)
def attention_table(record: Json) -> str:
    """TFLOP/s of forward / backward; a dash where an implementation cannot."""
    of_tables = [r for r in record["records"] if not r["workload"].startswith("length_")]
    measured_ones = [r for r in of_tables if "tflops" in r]
    rates = attention_rates(measured_ones)
    plans = {
        r["workload"]: str(round(r["plan_us"]))
        for r in of_tables
        if r["implementation"] == "mosaic" and "plan_us" in r
    }
    rows = []
    for workload in dict.fromkeys(r["workload"] for r in of_tables):
        row = [f"`{workload}`"]
        for name in ATTENTION:
            both = [rate(rates.get((workload, name, which))) for which in PASSES]
            row.append("-" if both == ["-", "-"] else " / ".join(both))
        rows.append([*row, plans.get(workload, "-")])
    product = record["matmul_tflops"]
    reached = (
        f"; a bfloat16 matrix product of 8192 reached {product:.0f} in the same run"
        if product
        else ""
    )
    notes = [
        "Forward / backward, useful TFLOP/s (unmasked pairs, backward 2.5 times the forward), "
        f"bfloat16 (`ml1m` float32 with relative bias), {record['device']}, "
        f"{of_commit(record)}{reached}.",
        "[1] Another function, softmax attention, with the same two products: "
        "what a vendor's kernel reaches.",
    ]
    if rivals := record.get("rivals"):
        default = "".join(
            " (`{workload}` without, its default: {tflops:.0f})".format(**r)
            for r in measured_ones
            if r["implementation"] == "meta_triton_default"
        )
        ended = " The time for it and cuDNN ended before all was measured."
        notes.append(
            f"[2] generative-recommenders at {rivals['revision'][:12]}, in the same run, tuned by "
            f"itself; its forward reads by TMA where lengths are equal{default}."
            + (ended if "incomplete" in rivals else "")
        )
    notes.append(
        "[3] Tile bounds and lists of work for `mosaic`, made once a batch for all layers, heads, "
        "forward and backward; not in the times."
    )
    if fp8 := [r for r in measured_ones if r["implementation"] == "mosaic_fp8"]:
        listed = "; ".join(
            "`{workload}` {tflops:.0f}, error {error:.1%}".format(**r).replace("%", " %")
            for r in fp8
        )
        notes.append(f"`mosaic_fp8`, forward, rounding of the inputs included: {listed}.")
    header = ["workload", *ATTENTION.values(), "plan, us [3]"]
    return markdown(header, rows, *notes, *record.get("notes", []))


@measured("test_gpu")
def gpu_tests_table(record: Json) -> str:
    rows = []
    for suite, counts in record["suites"].items():
        passed, failed = counts["passed"], counts["failed"]
        left = counts.get("collected", passed + failed) - passed - failed
        rows.append([f"`{suite}`", str(passed), str(failed), str(left)])
    header = ["GPU tests", "passed", "failed", "not reached"]
    return markdown(header, rows, origin(record), *record.get("notes", []))


def attention_picture() -> str:
    return picture("attention", "TFLOP/s of attention over length, ours and others'")


def attention_figure() -> None:
    """TFLOP/s over the length of causal sequences, 65536 rows in all, width 128."""
    record = load(RECORD)
    if not record:
        return
    rates = {
        (workload.replace("causal_d128_8x8192", "length_8192"), *key): value
        for (workload, *key), value in attention_rates(
            [r for r in record["records"] if "tflops" in r]
        ).items()
    }
    lengths = sorted(
        {
            int(workload.removeprefix("length_"))
            for workload, *_ in rates
            if workload.startswith("length_")
        }
    )
    for drawn in themed("attention", 9, 4.3):
        axes, ink = drawn.subplots(1, 2, sharey=True), matplotlib.rcParams["text.color"]
        for axis, which in zip(axes, PASSES, strict=True):
            for name, (label, colour, line) in LINES.items():
                points = {n: rates.get((f"length_{n}", name, which)) for n in lengths}
                known = {n: value for n, value in points.items() if value is not None}
                if known:
                    axis.plot(
                        list(known),
                        list(known.values()),
                        color=colour,
                        linestyle=line,
                        marker="o",
                        markersize=4,
                        label=label,
                    )
            if product := record["matmul_tflops"]:
                label = f"bfloat16 product of two 8192 x 8192 matrices, same run: {product:.0f}"
                axis.axhline(product, color=ink, linestyle=":", linewidth=1, label=label)
            axis.set_xscale("log", base=2)
            axis.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
            axis.minorticks_off()
            axis.set(xlabel="length of each sequence", title=which, ylim=(0, None))
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("useful TFLOP/s")
        handles = axes[0].get_legend_handles_labels()
        drawn.legend(*handles, frameon=False, loc="outside lower center", ncols=3, fontsize=8)
        device = record["device"].removeprefix("1 x ")
        title = f"Causal attention, 4 heads of 128, 65536 rows, {device}, {of_commit(record)}\n"
        title += (
            "The dotted line is what a product of other shapes reached, and no limit of the "
            "device: attention may pass it"
        )
        drawn.suptitle(title, fontsize=10)
