"""The tables of long histories: a training step with pieces of ULTRA-HSTU off, and a layer."""

from experiments.record import Json
from scripts.tables.records import cells, markdown, measured, of_commit

VARIANTS = {  # of scripts.bench.long, for long_ultra
    "ultra": "`long_ultra`",
    "plain_causal": "plain causal attention, no truncation",
    "no_truncation": "no truncation",
    "no_window": "no window",
    "keeps_activations": '`remat="none"`',
    "fp8": '`projection="fp8"`',
    "paper_layer": "the paper's own layer, `long_ultra_paper`",
}
OF_MST = {  # for long_mst
    "mst": "`long_mst`",
    "all_rows_at_once": "`chunk_rows=None`",
    "keeps_activations": '`remat="none"`',
    "neither": "neither",
    "feed_forward": "with feed-forward blocks, 4 x",
    "feed_forward_all_rows_at_once": "the same, `chunk_rows=None`",
}

MODES = ("none", "selective", "selective 8 chunks")  # of scripts.bench.layer
SEQUENCES = "8 x 8192 causal"  # a layer keeps the same under any mask


def remark(record: Json) -> str:
    return f"; {record['note']}" if "note" in record else ""


@measured("long_ultra_h200")
def long_ultra_table(record: Json) -> str:
    """A training step of long_ultra, and of the same model with pieces off."""
    return step_table(record, VARIANTS)


@measured("long_mst_h200", "long_mst_h100")
def long_mst_table(record: Json) -> str:
    """A training step of long_mst, and of the same model with pieces off."""
    return step_table(record, OF_MST)


def step_table(record: Json, names: dict[str, str]) -> str:
    rows = [
        [
            names.get(name, name),
            f"{found['step_ms']:.0f}",
            f"{found['events_a_second'] / 1e6:.2f}",
            *cells(
                found,
                "{temporary_GiB:.1f}",
                "{encoder_inference_TFLOP_a_sample:.3f}",
                "{training_TFLOP_a_sample:.2f}",
                "{TFLOP_a_second:.0f}",
            ),
        ]
        for name, found in record["variants"].items()
        if "step_ms" in found
    ]
    header = ["", "step, ms", "million events/s", "temporaries, GiB"]
    header += ["encoder, forward: TFLOP a sample", "training: TFLOP a sample", "TFLOP/s"]
    where = f"{record['device']}, {of_commit(record)}, attention `{record['implementation']}`"
    return markdown(header, rows, f"{where}{remark(record)}.")


@measured("long_operations")
def long_operations_table(record: Json) -> str:
    """Operations that long_ultra needs, and the same model with pieces off."""
    names = ("encoder_inference_TFLOP_a_sample", "training_TFLOP_a_sample")
    rows = [
        [VARIANTS[name], *cells(found, *(f"{{{one}:.3f}}" for one in names))]
        for name, found in record["variants"].items()
    ]
    return markdown(["", "encoder, forward: TFLOP a sample", "training: TFLOP a sample"], rows)


@measured("layer_h200", part="layers")
def layer_memory_table(record: Json) -> str:
    """Bytes a token and layer that each way of keeping and recomputing holds."""
    rows = [
        [found["mode"], *cells(found, "{bytes_a_token:.0f}", "{ms:.2f}")]
        for case in (f"{SEQUENCES}, {mode}, training" for mode in MODES)
        if "ms" in (found := record["layers"].get(case, {}))
    ]
    where = f"{record['device']}, {of_commit(record)}, {SEQUENCES}"
    return markdown(
        ["model.remat", "bytes a token and layer", "forward and backward, ms a layer"],
        rows,
        f"{where}.",
    )
