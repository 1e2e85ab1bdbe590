"""The tables of long histories: a training step with pieces of ULTRA-HSTU off, and a layer."""

from experiments.record import Json
from scripts.tables.records import markdown, measured

VARIANTS = {  # of scripts.bench.long
    "ultra": "`long_ultra`",
    "plain_causal": "plain causal attention, no truncation",
    "no_truncation": "no truncation",
    "no_window": "no window",
    "keeps_activations": '`remat="none"`',
    "fp8": '`projection="fp8"`',
}


def remark(record: Json) -> str:
    return f"; {record['note']}" if "note" in record else ""


@measured("long_ultra_h200")
def long_ultra_table(record: Json) -> str:
    """A training step of long_ultra, and of the same model with pieces off."""
    rows = [
        [
            VARIANTS.get(name, name),
            f"{found['step_ms']:.0f}",
            f"{found['events_a_second'] / 1e6:.2f}",
            f"{found['temporary_GiB']:.1f}",
            f"{found['encoder_inference_TFLOP_a_sample']:.3f}",
            f"{found['training_TFLOP_a_sample']:.2f}",
            f"{found['TFLOP_a_second']:.0f}",
        ]
        for name, found in record["variants"].items()
        if "step_ms" in found
    ]
    header = ["", "step, ms", "million events/s", "temporaries, GiB"]
    header += ["encoder, forward: TFLOP a sample", "training: TFLOP a sample", "TFLOP/s"]
    where = f"{record['device']}, commit {record['commit']}"
    return markdown(
        header, rows, f"{where}, attention `{record['implementation']}`{remark(record)}."
    )


@measured("layer_h200")
def layer_memory_table(record: Json) -> str:
    """Bytes a token and layer that each way of keeping and recomputing holds."""
    rows = [
        [name, f"{found['bytes_a_token']:.0f}", f"{found['ms']:.2f}" if "ms" in found else ""]
        for name, found in record["modes"].items()
    ]
    depths = " and ".join(map(str, record["depths"]))
    where = f"{record['device']}, commit {record['commit']}, {record['rows']:,} tokens"
    return markdown(
        ["model.remat", "bytes a token and layer", "forward and backward, ms a layer"],
        rows,
        f"{where}, {depths} layers{remark(record)}.",
    )
