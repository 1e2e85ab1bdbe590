"""The tables and the figure of attention: speed beside other people's kernels, and what the tests on a GPU said."""

from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from scripts.tables.tables import FIGURES, load, markdown

ATTENTION = {
    "mosaic": "`mosaic`",
    "triton": "`triton`",
    "xla": "`xla`",
    "meta_triton": "Meta's Triton kernel [2]",
    "cudnn_sdpa": "cuDNN softmax [1]",
}
PASSES = ("forward", "backward")
RECORD = "attention_h100"


def attention_rates(record: dict[str, Any]) -> dict[tuple[str, str, str], float]:
    """TFLOP/s by (workload, implementation, pass), of what ran."""
    return {
        (r["workload"], r["implementation"], r["pass"]): r["tflops"]
        for r in record["records"]
        if "tflops" in r
    }


def attention_table() -> str:
    """TFLOP/s of forward / backward; a dash where an implementation cannot."""
    record = load(RECORD)
    if record is None:
        return "Not measured yet."
    rates = attention_rates(record)
    rows = []

    def cell(workload: str, name: str) -> str:
        keys = [(workload, name, which) for which in PASSES]
        both = [rates.get(key) for key in keys]
        return (
            "-"
            if both == [None, None]
            else " / ".join(
                "-" if x is None else f"{x:.0f}" if x >= 10 else f"{x:.1f}" for x in both
            )
        )

    for workload in dict.fromkeys(
        r["workload"] for r in record["records"] if not r["workload"].startswith("length_")
    ):
        plan = {
            round(r["plan_us"])
            for r in record["records"]
            if (r["workload"], r["implementation"]) == (workload, "mosaic") and "plan_us" in r
        }
        rows.append(
            [
                f"`{workload}`",
                *(cell(workload, name) for name in ATTENTION),
                "".join(map(str, plan)) or "-",
            ]
        )
    product = record["matmul_tflops"]
    notes = [
        f"Forward / backward, useful TFLOP/s (unmasked pairs, backward 2.5 times the forward), bfloat16 (`ml1m` float32 with relative bias), "
        f"{record['device']}, commit {record['commit']}"
        + (
            f"; a bfloat16 matrix product of 8192 reached {product:.0f} in the same run."
            if product
            else "."
        ),
        "[1] Another function, softmax attention, with the same two products: what a vendor's kernel reaches.",
    ]
    if rivals := record.get("rivals"):
        default = [
            r
            for r in record["records"]
            if r["implementation"] == "meta_triton_default" and "tflops" in r
        ]
        notes.append(
            f"[2] generative-recommenders at {rivals['revision'][:12]}, in the same run, tuned by itself; its forward reads by TMA where lengths are equal"
            + "".join(
                f" (`{r['workload']}` without, its default: {r['tflops']:.0f})" for r in default
            )
            + (
                ". The time for it and cuDNN ended before all was measured."
                if "incomplete" in rivals
                else "."
            )
        )
    notes.append(
        "[3] Tile bounds and lists of work for `mosaic`, made once a batch for all layers, heads, forward and backward; not in the times."
    )
    fp8 = [
        r
        for r in record["records"]
        if r["implementation"] == "mosaic_fp8"
        and "tflops" in r
        and not r["workload"].startswith("length_")
    ]
    if fp8:
        listed = "; ".join(
            f"`{r['workload']}` {r['tflops']:.0f}, error {100 * r['error']:.1f} %" for r in fp8
        )
        notes.append(f"`mosaic_fp8`, forward, rounding of the inputs included: {listed}.")
    return "\n\n".join(
        [
            markdown(["workload", *ATTENTION.values(), "plan, us [3]"], rows),
            *notes,
            *record.get("notes", []),
        ]
    )


def gpu_tests_table() -> str:
    record = load("test_gpu")
    if record is None:
        return "Not run yet."
    rows = []
    for suite, counts in record["suites"].items():
        total = counts.get("collected", counts["passed"] + counts["failed"])
        rows.append(
            [
                f"`{suite}`",
                *(
                    str(n)
                    for n in (
                        counts["passed"],
                        counts["failed"],
                        total - counts["passed"] - counts["failed"],
                    )
                ),
            ]
        )
    where = f"{record['device']}, commit {record['commit']}, {record['date'][:10]}."
    return "\n\n".join(
        [
            markdown(["GPU tests", "passed", "failed", "not reached"], rows),
            where,
            *record.get("notes", []),
        ]
    )


def attention_figure() -> None:
    """TFLOP/s over the length of causal sequences, 65536 rows in all, width 128."""
    record = load(RECORD)
    if record is None:
        return
    rates = {
        (key[0].replace("causal_d128_8x8192", "length_8192"), *key[1:]): x
        for key, x in attention_rates(record).items()
    }
    looks = {
        "mosaic": ("tab:red", "-"),
        "triton": ("tab:orange", "-"),
        "cudnn_sdpa": ("tab:green", "--"),
        "meta_triton": ("tab:blue", "--"),
    }
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, constrained_layout=True)
    lengths = sorted(
        {
            int(workload.removeprefix("length_"))
            for workload, _, _ in rates
            if workload.startswith("length_")
        }
    )
    for axis, which in zip(axes, PASSES, strict=True):
        for name, (colour, line) in looks.items():
            points = [
                (n, rates[f"length_{n}", name, which])
                for n in lengths
                if (f"length_{n}", name, which) in rates
            ]
            label = ATTENTION[name].replace("`", "").replace(" [1]", "").replace(" [2]", "")
            axis.plot(
                *zip(*points, strict=True),
                color=colour,
                linestyle=line,
                marker="o",
                markersize=4,
                label=label,
            ) if points else None
        if record["matmul_tflops"]:
            axis.axhline(
                record["matmul_tflops"],
                color="black",
                linestyle=":",
                linewidth=1,
                label="bfloat16 matrix product",
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
        axis.minorticks_off()
        axis.set(xlabel="length of each sequence", title=which, ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("useful TFLOP/s")
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        frameon=False,
        loc="outside lower center",
        ncols=5,
        fontsize=8,
    )
    device = record["device"].removeprefix("1 x ")
    figure.suptitle(f"Causal attention, 4 heads of 128, 65536 rows, {device}", fontsize=10)
    figure.savefig(FIGURES / "attention.png", dpi=130)
    plt.close(figure)
