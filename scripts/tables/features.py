"""The tables of features of items: beside ids alone, by how often the target occurs in training."""

from experiments.record import Json
from scripts.tables.records import NOT_MEASURED, load, markdown, origin, short

RECORDS = {"ml1m_item_features": "MovieLens-1M", "ml100k_item_features": "MovieLens-100K"}
VARIANTS = {
    "ids": "ids alone",
    "sum": "genres and year in every token",
    "words": "genres, year and words of titles in every token",
    "series": "genres and year as merged series",
}


def item_features_table() -> str:
    """One line a data set and variant; without a record, none."""
    rows, notes = [], []
    for name, data in RECORDS.items():
        if record := load(name):
            rows += [_row(data, record, variant) for variant in record["variants"]]
            features = ", ".join(f"`{one}`" for one in record["features"])
            dropout = f"`features.id_dropout={record['id_dropout']}`"
            notes.append(f"{data} (`{name}`): {features}, {dropout}. {origin(record)}")
    if not rows:
        return NOT_MEASURED
    header = (
        "data, tokens",
        "seeds",
        "HR@10",
        "over ids alone",
        "HR@10, cold",
        "over ids alone",
        "users with a cold target",
        "rows a history",
        "MFLOP to encode and score",
    )
    shared = "Runs were trained side by side on one device. " if _shared() else ""
    return markdown(header, rows, shared + " ".join(notes))


def _shared() -> bool:
    return any(load(name).get("shared_device") for name in RECORDS)


def _row(data: str, record: Json, variant: str) -> list[str]:
    found = record["variants"][variant]
    mean, deviation = found["mean"], found.get("stdev", {})
    cells = []
    for metric, part in (("hr@10", "all"), ("hr@10/cold", "cold")):
        spread = f" ± {short(deviation[metric])}" if metric in deviation else ""
        cells.append(short(mean[metric]) + spread)
        against = found.get("against_ids", {}).get(part, {})
        low, high = against.get("ratio_interval", (0, 0))
        cells.append(
            f"{against['ratio']:.2f} [{low:.2f}, {high:.2f}]" if "ratio" in against else ""
        )
    return [
        f"{data}, {VARIANTS[variant]}",
        str(len(found["seeds"])),
        *cells,
        f"{mean['users/cold']:.0f}",
        f"{found['rows']:.0f}",
        f"{1e3 * found['inference_gflop']:.1f}",
    ]
