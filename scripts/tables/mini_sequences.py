"""The tables of mini-sequences: longest sequences, what a device holds, a head by chunk."""

from experiments.record import Json
from scripts.tables.records import markdown, measured, of_commit

GIB = 2**30
MODES = ("nothing", "selective", "mini-sequences", "both")
MODELS = {  # of scripts.bench.mini_sequences
    "hstu": "HSTU",
    "hstu_ffn": "HSTU with feed-forward blocks, 4 x",
    "hstu_ffn_full": "the same, full softmax over 1M items",
    "sasrec_full": "SASRec, full softmax over 1M items",
}
STRATEGIES = {"": "", "/ring": ", `ring`", "/ulysses": ", `ulysses`"}
PARTS = ("parameters", "optimizer", "gradients", "rest")


def gib(size: float) -> str:
    return f"{size / GIB:.1f}"


def of_machine(record: Json) -> str:
    return f"{record['device']}, {of_commit(record)}, {record['date']:.10}"


@measured("mini_sequences", part="longest")
def longest_table(record: Json) -> str:
    """Rows: models, on so many devices; columns: what is saved."""
    found = record["longest"]
    rows = []
    for model, label in MODELS.items():
        for context in (1, 2, 4, 8):
            for strategy, said in STRATEGIES.items():
                keys = [f"{model}/{mode}/{context}{strategy}" for mode in MODES]
                lengths = [found[key]["longest"] if key in found else None for key in keys]
                if any(lengths):
                    ratio = f"{lengths[3] / lengths[0]:.1f}" if lengths[0] and lengths[3] else ""
                    cells = ["" if length is None else f"{length:,}" for length in lengths]
                    rows.append([label, f"{context}{said}", *cells, ratio])
    header = ["", "devices", *MODES, "both / nothing"]
    budget = f"{record['budget_GiB']:.0f} GiB a device, full to 97 %, or to a step of lengths"
    return markdown(header, rows, f"Events of one history; {budget}. {of_machine(record)}.")


@measured("mini_sequences", part="longest")
def held_table(record: Json) -> str:
    """What a device holds at these lengths."""
    rows = []
    for model, label in MODELS.items():
        for mode in MODES:
            if one := record["longest"].get(f"{model}/{mode}/1"):
                held, length = one["held"], one["longest"]
                parts = [gib(held[part]) for part in PARTS]
                rows.append([label, mode, *parts, f"{held['rest'] / length / 1024:.0f}"])
    header = ["", "saved by", *PARTS, "rest, KiB an event"]
    return markdown(header, rows, f"GiB of one device. {of_machine(record)}.")


@measured("mini_sequences_state", part="state")
def state_table(record: Json) -> str:
    """Bytes of a device by how the state is kept, at one length."""
    rows = [
        [name, *(gib(held[part]) for part in PARTS), gib(held["bytes"])]
        for name, held in record["state"].items()
    ]
    what = f"{record['rows']:,} events a device, {record['items']:,} items"
    return markdown(["", *PARTS, "all"], rows, f"GiB of a device; {what}. {of_machine(record)}.")


@measured("mini_sequences_head", part="chunks")
def head_table(record: Json) -> str:
    """Temporaries of a full softmax by rows of a chunk."""
    rows = [
        [f"{int(chunk):,}", gib(found["temporaries"])] for chunk, found in record["chunks"].items()
    ]
    what = "{rows:,} rows, {items:,} items, width {width}, `{implementation}`".format(**record)
    return markdown(
        ["`loss.chunk_rows`", "temporaries, GiB"], rows, f"{what}. {of_machine(record)}."
    )


@measured("mini_sequences_h200", "mini_sequences_h100", part="confirmed")
def confirmed_table(record: Json) -> str:
    """Trained just below the longest batch, and what a longer one said."""
    rows = []
    for name, found in record["confirmed"].items():
        model, mode, devices, *strategy = name.split("/")
        if "error" in found:
            cells = [found["error"].splitlines()[0], "", "", "", ""]
        else:
            peak = found["bytes_peak"]
            cells = [
                f"{found['rows']:,}",
                gib(found["bytes_predicted"]),
                gib(peak) if peak else "",
                f"{found['rows_a_second'] / 1e3:,.0f}",
                f"{found['above']['rows']:,}: {found['above']['said'][:40]}",
            ]
        rows.append([MODELS[model], mode, ", ".join([devices, *strategy]), *cells])
    header = ["", "saved by", "devices", "events that trained", "GiB, compiler", "GiB, peak"]
    header += ["thousand events/s", "10 % more"]
    return markdown(header, rows, f"{record['users']} histories a batch. {of_machine(record)}.")
