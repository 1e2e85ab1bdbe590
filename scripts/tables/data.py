"""Tables of data: public sets, how long their histories are, how long files take to prepare."""

import re

from experiments.record import Json
from scripts.tables.records import cells, first, markdown, measured, origin
from ultra_hstu.data import sources
from ultra_hstu.data.amazon import CATEGORIES
from ultra_hstu.data.public import PublicSet

# Users, items, events as their publishers state them, of sets that were not at hand: quoted, and
# the mean follows from them. Items are all of the catalogue, users have any number of events.
_GROUPLENS = "README, GroupLens"
_KUAIRAND = "kuairand.com"
QUOTED: dict[str, tuple[int, int, int, str]] = {
    "ml-10m": (71_567, 10_681, 10_000_054, _GROUPLENS),
    "ml-20m": (138_493, 27_278, 20_000_263, _GROUPLENS),
    "ml-25m": (162_541, 62_423, 25_000_095, _GROUPLENS),
    "ml-32m": (200_948, 87_585, 32_000_204, _GROUPLENS),
    "kuairand-pure": (27_285, 7_583, 1_436_609, _KUAIRAND),
    "kuairand-1k": (1_000, 4_369_953, 11_713_045, _KUAIRAND),
    "kuairand-27k": (27_285, 32_038_725, 322_278_385, _KUAIRAND),
    "kuairec": (7_176, 10_728, 12_530_806, "kuairec.com"),
    "yambda-5b": (1_000_000, 9_390_000, 4_790_000_000, "card of the set, rounded"),
}


def sets_table() -> str:
    """Names, what these sets have, and the files of a copy: one line for those that are alike."""
    rows: dict[tuple[str, str], list[str]] = {}
    for one in sources.SETS:
        name, _, category = one.name.partition("/")
        category = category.removesuffix("/5core")
        core = "/5core" if one.name.endswith("/5core") else ""
        about = one.about.replace(f", {category}", "") if category else one.about
        names = rows.setdefault((about, _files(one, category)), [])
        family = f"`{name}/<Category>{core}`" if category else f"`{name}`"
        if family not in names:
            names.append(family)
    found = [(", ".join(names), *alike) for alike, names in rows.items()]
    return markdown(["`data.source`", "what it has", "files of a copy"], found)


def _files(one: PublicSet, category: str) -> str:
    """The names of files, those in brackets may be missing."""
    names = [f"`{name}`" for name in one.files] + [f"[`{name}`]" for name in one.context_files]
    if category:
        names = [name.replace(category, "<Category>") for name in names]
    return re.sub("`fold1.csv`.*`fold5.csv`", "`fold1.csv` ... `fold5.csv`", ", ".join(names))


def categories() -> str:
    """The categories of every release of Amazon."""
    return "\n\n".join(
        f"`amazon-{release}`: {', '.join(f'`{name}`' for name in names)}."
        for release, names in CATEGORIES.items()
    )


def lengths_table() -> str:
    """Sets with long histories first, measured or with counts that are quoted."""
    record = first("histories")
    sets: dict[str, Json] = record.get("sets", {})
    counts = ("{users:,}", "{items:,}", "{events:,}", "{mean:,}", "{median:,g}")
    means: dict[str, float] = {name: found["mean"] for name, found in sets.items()}
    rows = {
        name: [*cells(found, *counts), f"{found['99 %']:,.0f}", f"{found['longest']:,}", ""]
        for name, found in sets.items()
    }
    for name, (users, items, events, where) in QUOTED.items():
        means[name] = events / users
        counted = (f"{users:,}", f"{items:,}", f"{events:,}", f"{means[name]:,.0f}")
        rows[name] = [*counted, "", "", "", f"quoted: {where}"]
    ordered = [[f"`{name}`", *rows[name]] for name in sorted(rows, key=lambda one: -means[one])]
    header = ["set", "users", "items", "events", "mean", "median", "99 %", "longest", ""]
    return markdown(header, ordered, *([origin(record)] if record else []))


@measured("prepare")
def prepare_table(record: Json) -> str:
    """One line a kind of file: from the file to what a run reads, in a process of its own."""
    templates = ("{file_MiB:,.0f}", "{events:,}", "{users:,}", "{seconds:.1f}")
    rows = [
        [
            kind,
            *cells(found, *templates),
            f"{found['cpu_seconds']:.1f}" if "cpu_seconds" in found else "",
            f"{found['peak_MiB']:,.0f}",
        ]
        for kind, found in record["files"].items()
    ]
    header = ["file", "MiB", "events kept", "users", "seconds", "CPU seconds", "most memory, MiB"]
    return markdown(header, rows, f"{record['host_cores']} cores, {origin(record)}")
