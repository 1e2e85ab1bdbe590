"""The tables of a layer's fused ops: its rate, its precisions, and where its time goes."""

from experiments.record import Json
from scripts.tables.records import markdown, measured, of_commit

PRECISIONS = {
    "none": "bfloat16",
    "fp8": '`projection="fp8"`',
    "fp8 gradient": 'and `projection_gradient="fp8"`',
    "xla": 'bfloat16, `layer_implementation="xla"`',
}
WINDOW = "4 x 16384 window 256"
LEAST_SHARE = 0.01  # of a layer's time, for a kernel that has a row


def found(record: Json, workload: str, mode: str, kind: str = "training") -> Json:
    """What was measured, empty where nothing was."""
    case = record["layers"].get(f"{workload}, {mode}, {kind}", {})
    return case if "ms" in case else {}


def where(record: Json) -> str:
    product = record["matmul_TFLOP_a_second"]
    note = f"; {record['note']}" if "note" in record else ""
    return (
        f"{record['device']}, {of_commit(record)}; a product of two matrices: {product:.0f}{note}"
    )


@measured("layer_h200", part="layers")
def layer_table(record: Json) -> str:
    """TFLOP/s of a layer, forward and backward, beside what others reach."""
    rows = []
    for workload in dict.fromkeys(case["workload"] for case in record["layers"].values()):
        plain, selective = (found(record, workload, mode) for mode in ("none", "selective"))
        if plain:
            others = record["quoted"].get(workload, {}).items()
            rows.append(
                [
                    workload,
                    f"{plain['TFLOP_a_second']:.0f}",
                    f"{plain['MFU']:.2f}",
                    f"{plain['ms']:.2f}",
                    f"{selective['TFLOP_a_second']:.0f}" if selective else "",
                    ", ".join(f"{who} {rate:.0f}" for who, rate in others),
                ]
            )
    header = ["sequences", "TFLOP/s", "MFU", "ms", "TFLOP/s, `selective`", "quoted"]
    sources = "; ".join(f"{who}: {what}" for who, what in record["quoted_from"].items())
    return markdown(header, rows, f"{where(record)}.", f"Quoted: {sources}.")


@measured("layer_h200", part="layers")
def layer_precision_table(record: Json) -> str:
    """The windowed layer in each precision."""
    base = {kind: found(record, WINDOW, "none", kind) for kind in ("training", "inference")}

    def cell(mode: str, kind: str) -> str:
        case = found(record, WINDOW, mode, kind)
        if not (case and base[kind]):
            return ""
        return f"{case['ms']:.2f} ({base[kind]['ms'] / case['ms']:.2f}x)"

    rows = [
        [what, cell(mode, "inference"), cell(mode, "training")]
        for mode, what in PRECISIONS.items()
        if found(record, WINDOW, mode)
    ]
    header = [WINDOW, "forward alone, ms", "forward and backward, ms"]
    return markdown(header, rows, f"{where(record)}.")


@measured("layer_h200", part="layers")
def layer_kernels_table(record: Json) -> str:
    """Kernels of the windowed layer, with what XLA makes of the same layer beside them."""
    rows = []
    for mode in ("none", "xla"):
        case = found(record, WINDOW, mode)
        kernels = case.get("kernels", [])
        for kernel in kernels:
            if kernel["ms"] >= LEAST_SHARE * case["ms"]:
                source, *rest = kernel["source"].split(", ")
                rows.append(
                    [
                        "XLA" if mode == "xla" else "ours",
                        f"`{kernel['name'][:44]}`",
                        f"`{source}`" * bool(source) + ", backward" * bool(rest),
                        f"{1e3 * kernel['ms']:.0f}",
                        f"{kernel['ms'] / case['ms']:.0%}",
                    ]
                )
    header = [WINDOW, "kernel", "from", "us a layer", "share"]
    return markdown(header, rows, f"{where(record)}.")
