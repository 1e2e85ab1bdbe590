"""The table of how the best items of a mixture of logits are found."""

from experiments.record import Json
from scripts.tables.records import markdown, measured, origin

SHOWN = ("ms", "proven@10", "proven@100", "recall@10", "recall@100")
SIZE = "{users} users a call, {user_components} x {item_components} components of {component_width}"


@measured("mol_top_k_cpu")
def top_k_table(record: Json) -> str:
    rows = []
    for name, case in record.items():
        if not isinstance(case, dict) or "all items" not in case:
            continue
        items, weights = name.split()
        for how, found in case.items():
            cells = [f"{found[column]:.3g}" if column in found else "" for column in SHOWN]
            rows.append([f"{int(items):,}", weights, how, *cells])
    header = ["items", "weights", "what is scored", *SHOWN]
    return markdown(header, rows, f"{SIZE.format(**record)}.", origin(record))
