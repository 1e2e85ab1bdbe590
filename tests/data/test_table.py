"""Own events from files: formats, columns, times, what is left out, and bad input."""

import dataclasses
import gzip
import json
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from ultra_hstu.config import Config, DataConfig, from_config_dict
from ultra_hstu.data import signals
from ultra_hstu.data.interactions import Interactions, load_interactions
from ultra_hstu.data.table import columns
from ultra_hstu.table_config import TableConfig

START = 1_600_000_000
ROWS = [
    ("u1", "mug", START + 5, 4.5, "view"),
    ("u2", "pot", START + 1, 1.0, "buy"),
    ("u1", "pan", START + 4, 3.0, "view"),
    ("u1", "pot", START + 5, 5.0, "buy"),
    ("u2", "mug", START + 2, 2.0, "view"),
    ("u2", "pan", START + 2, 4.0, "view"),
]
NAMES = ("user_id", "item_id", "timestamp", "rating", "event")
FRAME = pa.table(dict(zip(NAMES, map(list, zip(*ROWS, strict=True)), strict=True)))


def csv_text(rows=ROWS, names=NAMES, delimiter=","):
    lines = [names, *rows]
    return "".join(delimiter.join(map(str, line)) + "\n" for line in lines)


def write(path: Path, content) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, pa.Table):
        pa.parquet.write_table(content, path, row_group_size=4)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def config(tmp_path, raw, **table):
    return DataConfig(
        source="table",
        raw_dir=str(raw),
        data_dir=str(tmp_path / "prepared"),
        table=TableConfig(**table),
    )


def load(tmp_path, raw, **table) -> Interactions:
    return load_interactions(config(tmp_path, raw, **table))


def plain(data: Interactions):
    """What must be the same for all formats."""
    return (
        data.users.tolist(),
        data.catalog.decode(data.items).tolist(),
        data.offsets.tolist(),
        None if data.timestamps is None else data.timestamps.tolist(),
        {name: (values.dtype, values.tolist()) for name, values in data.actions.items()},
    )


WANT = (
    ["u1", "u2"],
    ["pan", "mug", "pot", "pot", "mug", "pan"],
    [0, 3, 6],
    [START + 4, START + 5, START + 5, START + 1, START + 2, START + 2],
    {
        "rating": (np.dtype(np.float32), [3.0, 4.5, 5.0, 1.0, 2.0, 4.0]),
        "event": (np.dtype(np.int32), [2, 2, 1, 1, 2, 2]),
    },
)
JSON = "".join(json.dumps(dict(zip(NAMES, row, strict=True))) + "\n" for row in ROWS)


def compressed(text, kind):
    return pa.compress(text.encode(), kind, asbytes=True)


@pytest.mark.parametrize(
    "name, content",
    [
        ("events.csv", csv_text()),
        ("events.csv", "\ufeff" + csv_text().replace("\n", "\r\n").rstrip()),
        ("events.csv", "\n" + csv_text(delimiter=";").replace("u1", " u1")),
        ("events.tsv", csv_text(delimiter="\t").replace("pot", "pot ")),
        ("events.csv.gz", gzip.compress(csv_text().encode(), mtime=0)),
        ("events.tsv.zst", compressed(csv_text(delimiter="\t"), "zstd")),
        ("events.jsonl", JSON),
        ("events.json.gz", gzip.compress(JSON.replace("\n", "\n\n").encode(), mtime=0)),
        ("events.ndjson.zst", compressed(JSON, "zstd")),
        ("events.parquet", FRAME),
        ("folder/_SUCCESS", ""),
    ],
)
def test_all_formats_hold_the_same_events(tmp_path, name, content):
    raw = write(tmp_path / name, content)
    if name == "folder/_SUCCESS":  # two files of unlike formats
        write(tmp_path / "folder/a.csv", csv_text(ROWS[:2]))
        write(tmp_path / "folder/b/c.csv.gz", gzip.compress(csv_text(ROWS[2:]).encode(), mtime=0))
        raw = tmp_path / "folder"
        assert plain(load(tmp_path, tmp_path / "folder/**/*.csv*")) == WANT
    assert plain(load(tmp_path, raw)) == WANT
    assert plain(load(tmp_path, raw)) == WANT  # as it was prepared


def test_frames(tmp_path):
    assert plain(Interactions.from_table(FRAME)) == WANT

    class Other:  # as frames of other libraries offer it
        def __dataframe__(self, **options):
            return FRAME.__dataframe__(**options)

    assert plain(Interactions.from_table(Other())) == WANT

    class Capsule:
        def __arrow_c_stream__(self, requested_schema=None):
            return FRAME.__arrow_c_stream__(requested_schema)

    data = Interactions.from_table(Capsule(), titles={"mug": "A mug", "pan": "Pan", "pot": "Pot"})
    assert plain(data) == WANT and data.catalog.titles == ("", "A mug", "Pan", "Pot")
    with pytest.raises(ValueError, match="list is no frame that can be read"):
        Interactions.from_table([1, 2])


def test_integer_ids(tmp_path):
    rows = [(7, 30, START, 1), (7, 4, START + 1, 0), (7, 5, START + 2, 1)]
    names = ("userId", "movieId", "ts", "click")
    tables = [
        write(tmp_path / "a.csv", csv_text(rows, names)),
        write(tmp_path / "b.csv", csv_text([(f"{r[0]}.0", *r[1:]) for r in rows], names)),
        write(
            tmp_path / "c.parquet",
            pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))),
        ),
    ]
    for raw in tables:
        data = load(tmp_path, raw)
        assert data.users.tolist() == [7] and data.users.dtype == np.int64
        assert data.catalog.raw_ids[1:].tolist() == [4, 5, 30]
        assert data.actions["click"].tolist() == [1, 0, 1]
    # What is not a number throughout stays text.
    rows = [("007", "a", START), ("007", "b", START), ("007", "7", START)]
    data = load(tmp_path, write(tmp_path / "d.csv", csv_text(rows, names[:3])))
    assert data.users.tolist() == ["007"] and data.items.tolist() == [2, 3, 1]


# --- columns ---


def test_usual_names_and_named_ones(tmp_path, caplog):
    names = ["price", "visitorid", "asin", "parent_asin", "unixReviewTime", "date"]
    chosen = columns.choose(names, TableConfig(), "x")
    assert chosen == columns.Columns("visitorid", "asin", "unixReviewTime", ())
    own = TableConfig(user="price", item="parent_asin", time="date", tasks={"t": "asin==1"})
    chosen = columns.choose(names, own, "x")
    assert chosen.names == ("price", "parent_asin", "date", "asin")
    with caplog.at_level(logging.INFO):
        load(tmp_path, write(tmp_path / "x.csv", csv_text()), actions=("rating",))
    assert "columns: user = user_id, item = item_id, time = timestamp; actions: rating" in (
        caplog.text
    )
    assert "times: seconds, 2020-09-13 to 2020-09-13" in caplog.text
    assert caplog.text.index("preparing") < caplog.text.index("prepared in")


def test_titles_and_users(tmp_path):
    raw = write(tmp_path / "events.csv", csv_text())
    items = write(tmp_path / "items.tsv", "id\tname\npan\tA pan\nmug\tBlue mug, 1\npot\t\nx\tX\n")
    users = write(tmp_path / "users.jsonl", '{"user_id":"u2","age":30}\n{"user_id":"u9","age":4}\n')
    data = load(tmp_path, tmp_path, items_file=items, users_file=users)
    assert data.catalog.titles == ("", "Blue mug, 1", "A pan", "")
    assert data.contexts["age"].tolist() == [0, 2]
    assert data.context_values["age"] == ("", "4", "30")
    write(tmp_path / "items.tsv", "id\tname\npan\tA pan\nmug\tBlue mug\n")
    with pytest.raises(
        ValueError,
        match=r"events.csv, line 3: column 'item_id': the item 'pot' is "
        r"not in .*items.tsv, which lacks 1 of 3 items: add them, or choose "
        r"--config.data.table.unlisted_items=keep",
    ):
        load(tmp_path, raw, items_file=items)
    kept = load(tmp_path, raw, items_file=items, unlisted_items="keep")
    assert kept.catalog.titles == ("", "Blue mug", "A pan", "")
    with pytest.raises(ValueError, match="no user is left"):
        load(tmp_path, raw, items_file=items, unlisted_items="drop")


def test_a_title_in_the_events_themselves(tmp_path):
    raw = write(
        tmp_path / "events.csv",
        "user,item,ts,title\nu,a,1600000001,Mug\nu,b,1600000002,Pan\nu,a,1600000003,Cup\n",
    )
    assert load(tmp_path, raw).catalog.titles == ("", "Mug", "Pan")


def test_tasks_signals_and_features(tmp_path):
    values = {
        "data": {
            "source": "table",
            "raw_dir": write(tmp_path / "events.csv", csv_text().replace(",5.0,", ",,")),
            "data_dir": str(tmp_path / "prepared"),
            "table": {"tasks": {"like": "rating>=4", "buy": "event == 'buy'"}},
        },
        "rank": {"signals": ["like", "rating[2,4]"], "features": []},
        "model": {"preset": "production", "relative_bias": False},
    }
    run = from_config_dict(values)
    assert run.rank.tasks == ("like", "buy") and run.train.protocol == "chronological"
    assert from_config_dict(dataclasses.asdict(run)) == run  # as config.json holds it
    data = load_interactions(run.data)
    like = signals.task(data, "like")
    assert like.kind == "binary" and like.label_E.tolist() == [0, 1, 0, 0, 0, 1]
    assert like.weight_E.tolist() == [1, 1, 0, 1, 1, 1]  # one event has no rating
    assert signals.task(data, "buy").label_E.tolist() == [0, 0, 1, 1, 0, 0]
    assert signals.task(data, "rating").kind == "regression"
    assert signals.signal(data.actions, "rating[2,4]").code.tolist() == [2, 3, 0, 1, 2, 3]
    assert signals.sizes(["rating[2,4]", "event"]) == (4, signals.OTHER_SIZE)
    numbers = {"n": np.array([-3, 0, 31, 32, 63, 64, 2**31 - 1])}
    assert signals.signal(numbers, "n").code.tolist() == [1, 2, 33, 34, 34, 35, 59]
    with pytest.raises(ValueError, match="unknown feature 'event'"):
        signals.feature(data, "event")
    features = dataclasses.replace(data, features=("event",))
    assert signals.feature(features, "event").code.tolist() == [2, 2, 1, 1, 2, 2]


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"data": {"table": {"user": "u"}}},
            "data.table.user='u' does nothing under data.source='ml-1m', whose files",
        ),
        (
            {"data": {"source": "table", "table": {"catalog": "listed"}}},
            "data.table.catalog='listed' needs data.table.items_file",
        ),
        (
            {"data": {"source": "table", "table": {"tasks": {"t": "rating>=4"}}},
             "rank": {"features": ["rating"]}},
            "'t' is to be predicted from 'rating', which is not known before",
        ),
        (
            {"data": {"source": "table"}, "rank": {"features": ["x"], "signals": ["x[1]"]}},
            "rank.features names 'x', which rank.signals or rank.tasks read, too",
        ),
        ({"data": {"source": "table", "table": {"tasks": {"t": ""}}}}, "data.table.tasks.t=''"),
        ({"data": {"source": "table", "table": {"k_core": 0}}}, "data.table.k_core=0 must be"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work(change, message):
    values = {"data": {"source": "ml-1m"}} | change
    values["data"] = {"source": "ml-1m"} | values["data"]
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        from_config_dict(values)


def test_a_table_is_a_source_like_others():
    assert Config().data.table == TableConfig()


# --- times ---


@pytest.mark.parametrize(
    "times, unit, want",
    [
        ([1.6e9 + 0.7, 1.6e9 + 0.2, 1.6e9 + 5], "seconds", [0, 0, 5]),
        ([1600000000999, 1600000001000, 1600000002000], "milliseconds", [0, 1, 2]),
        (["2020-09-13 12:26:41", "2020-09-13T12:26:40", "2020-09-14"],
         "microseconds", [0, 1, 41600]),
        (["2020-09-13T12:26:41Z", "2020-09-13T14:26:40+02:00", "2020-09-13T12:26:49Z"],
         "microseconds", [0, 1, 9]),
        ([-1000, 5, 1_600_000_000], "seconds", [-1600001000, -1599999995, 0]),
    ],
)  # fmt: skip
def test_units_of_times(tmp_path, caplog, times, unit, want):
    rows = [("u", f"i{n}", time) for n, time in enumerate(times)]
    raw = write(tmp_path / "a.csv", csv_text(rows, ("uid", "iid", "time")))
    with caplog.at_level(logging.INFO):
        data = load(tmp_path, raw)
    assert (data.timestamps - START).tolist() == want
    assert f"times: {unit}, " in caplog.text
    # Fractions of a second decide the order.
    if unit == "seconds" and want[0] == 0:
        assert data.items.tolist() == [2, 1, 3]


def test_types_with_units(tmp_path):
    for kind in (pa.timestamp("s"), pa.timestamp("ns", "UTC"), pa.date32(), pa.date64()):
        days = pa.array([18518, 18519, 18520], pa.int32()).cast(pa.date32())
        table = pa.table({"user": [1, 1, 1], "item": [1, 2, 3], "date": days.cast(kind)})
        data = load(tmp_path, write(tmp_path / "a.parquet", table))
        assert data.timestamps.tolist() == [86400 * day for day in (18518, 18519, 18520)]


def test_a_stated_unit(tmp_path):
    raw = write(tmp_path / "a.csv", csv_text([("u", n, 20200913 + n) for n in range(3)], NAMES[:3]))
    with pytest.raises(
        ValueError,
        match="20200913 to 20200915. That may be 1970-08-22 to 1970-08-22 "
        r"\(--config.data.table.time_unit=s\); or .* or 2020-09-13 to 2020-09-15 "
        r"\(--config.data.table.time_unit=yyyymmdd\). Say which",
    ):
        load(tmp_path, raw)
    data = load(tmp_path, raw, time_unit="yyyymmdd")
    assert data.timestamps.tolist() == [1599955200, 1600041600, 1600128000]
    assert load(tmp_path, raw, time_unit="s").timestamps.tolist() == [20200913, 20200914, 20200915]
    assert load(tmp_path, raw, time_unit="none").timestamps is None
    with pytest.raises(ValueError, match=r"a.csv, line 2: column 'timestamp': 20200913 days"):
        load(tmp_path, raw, time_unit="days")


# --- what is left out ---


def test_whatever_is_dropped_is_counted(tmp_path, caplog):
    rows = [*ROWS, ROWS[0], ("u3", "mug", START, 1, "view"), ("u1", "", START, 1, "view")]
    raw = write(tmp_path / "a.csv", csv_text(rows))
    for _ in range(2):  # when it is prepared, and later
        with caplog.at_level(logging.INFO):
            assert plain(load(tmp_path, raw, missing="drop")) == WANT
        for text in (
            "dropped: 1 of 9 events that miss a value",
            "dropped: 1 of 9 events that repeat an earlier one of the same user, item and time",
            "dropped: 1 of 9 events of users with fewer than 3 events",
        ):
            assert text in caplog.text
        caplog.clear()


# --- bad input ---

BAD = [
    ("a.csv", csv_text(names=("person", *NAMES[1:])),
     r"no column looks like the user's; there are 'person', .*--config.data.table.user=NAME"),
    ("a.csv", csv_text(names=("user_id", "user_id", *NAMES[2:])),
     "no column looks like the user's"),
    ("a.csv", csv_text([*ROWS, ("u9", "x", "soon", 1, "view")]),
     r"a.csv, line 8: column 'timestamp' holds whole numbers in the lines before, here: 'soon': "
     "correct it, or leave the field empty and .*table.missing=drop"),
    ("a.csv", csv_text([*ROWS, ("u9", "x", START, "good", "view")]),
     r"a.csv, line 8: column 'rating' holds numbers in the lines before, here: 'good'"),
    ("a.csv", csv_text([*ROWS, ("u9", "x", START)]), 
     "a.csv, line 8: expected 5 fields, found 3: .*: correct the line, or delete it"),
    ("a.csv", csv_text([*ROWS, ("u9", "NULL", START, 1, "view")]),
     r"a.csv, line 8: column 'item_id' is missing a value: .*table.missing=drop"),
    ("a.csv", csv_text([*ROWS, ("u9", "x" * 257, START, 1, "view")]),
     r"a.csv, line 8: column 'item_id': an id has more than 256 characters: 'xxx"),
    ("a.csv", csv_text([*((*row[:2], 1000 * row[2], *row[3:]) for row in ROWS),
                        ("u9", "x", START, 1, "view")]),
     rf"a.csv, line 8: column 'timestamp': {START} among times in milliseconds would"),
    ("a.csv", csv_text([*ROWS, ("u9", "x", 1000 * START, 1, "view")]),
     rf"a.csv, line 8: column 'timestamp': {1000 * START} among times in a coarser unit than "
     "milliseconds: two units are mixed"),
    ("a.csv", csv_text([*ROWS[:2], ("u9", '"x', START, 1, "view")]), r"a.csv, line 4: .*quote"),
    ("a.csv", csv_text().encode("utf-16"), "a.csv is UTF-16: save it as UTF-8"),
    ("a.csv", csv_text().replace("pot", "pöt").encode("latin-1"),
     "a.csv, line 3: byte .* not UTF-8"),
    ("a.csv", gzip.compress(csv_text().encode(), mtime=0), "a.csv is no text: is its name right"),
    ("a.csv.gz", gzip.compress(csv_text(ROWS * 50).encode(), mtime=0)[:-60],
     "a.csv.gz cannot be read"),
    ("a.csv", "", "a.csv is empty: expected a header"),
    ("a.csv", csv_text(()), "a.csv has no events: expected rows below the header"),
    ("a.csv", csv_text(ROWS[1:], ROWS[0]), "header holds '1600000005', which is no name"),
    ("a.csv", csv_text(ROWS[:2]), "no user is left with 3 events or more"),
    ("a.xlsx", "x", "a.xlsx: the name says no known format"),
    ("a.jsonl", JSON + "{}\n", r"a.jsonl, line 7: column 'user_id' is missing a value"),
    ("a.jsonl", JSON + "[1]\n", r"a.jsonl, line 7: expected one JSON object a line"),
    ("a.jsonl", JSON + '{"user_id": 4}\n', r"a.jsonl, line 7: column 'user_id' holds text in the"),
    ("a.jsonl", "[]", r"a.jsonl, line 1: expected one JSON object a line"),
    ("a.parquet", b"PAR1" + b"x" * 100, "a.parquet is no whole Parquet file .*: it may be cut off"),
    ("a.parquet", FRAME.set_column(2, "timestamp", pa.array([1.6e9, float("nan")] * 3)),
     r"a.parquet, row group 0, row 1: column 'timestamp' is missing a value"),
    ("a.parquet", FRAME.set_column(0, "user_id", pa.array([1.0, 2.0, 1.5] * 2)),
     r"a.parquet, row group 0, row 2: column 'user_id': an id must be a whole number"),
    ("a.parquet", FRAME.set_column(0, "user_id", pa.array([[1]] * 6)),
     "column 'user_id' cannot be"),
    ("a.parquet", FRAME.set_column(2, "timestamp", pa.array([True, False] * 3)),
     "holds bool, no times"),
    ("a.parquet", FRAME.set_column(2, "timestamp", pa.array(["monday"] * 6)),
     "row group 0, row 0: column 'timestamp' holds 'monday'"),
    ("a.parquet", FRAME.set_column(2, "timestamp", pa.array([10**10] * 6).cast(pa.timestamp("s"))),
     "column 'timestamp': .* lie outside 1901 to 2106"),
    ("a.parquet", FRAME.slice(0, 0), "a.parquet has no events"),
]  # fmt: skip


@pytest.mark.parametrize("name, content, message", BAD, ids=lambda value: str(value)[:40])
def test_bad_files(tmp_path, name, content, message):
    raw = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, raw)
    prepared = tmp_path / "prepared"
    left = [path.name for path in prepared.iterdir()] if prepared.exists() else []
    assert set(left) <= {"table.lock"}  # nothing half-prepared stays


def test_a_parquet_file_cut_in_half(tmp_path):
    raw = write(tmp_path / "a.parquet", FRAME)
    whole = Path(raw).read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        Path(raw).write_bytes(whole[:size])
        with pytest.raises(ValueError, match="a.parquet"):
            load(tmp_path, raw)


def test_files_of_different_columns(tmp_path):
    write(tmp_path / "a/1.csv", csv_text())
    write(tmp_path / "a/2.csv", csv_text(names=("user_id", "item_id", "time", "rating", "event")))
    with pytest.raises(
        ValueError, match=r"2.csv has no column 'timestamp', which the first file has"
    ):
        load(tmp_path, tmp_path / "a")
    write(tmp_path / "a/2.csv", csv_text())
    write(tmp_path / "a/3.parquet", FRAME.set_column(0, "user_id", pa.array([1] * 6)))
    with pytest.raises(ValueError, match=r"3.parquet: column 'user_id' cannot be read.*int64 here"):
        load(tmp_path, tmp_path / "a")


@pytest.mark.parametrize(
    "raw, message",
    [
        (None, "data.raw_dir is not set"),
        ("nowhere/*.csv", "there is no such file, folder or pattern"),
        ("s3://bucket/x.csv", "URLs are not read"),
        (".", "holds other.txt, but no file of"),
    ],
)
def test_no_files(tmp_path, raw, message, monkeypatch):
    write(tmp_path / "other.txt", "x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_interactions(dataclasses.replace(config(tmp_path, "x"), raw_dir=raw))


def test_many_columns(tmp_path):
    names = [*NAMES[:3], *(f"c{n}" for n in range(500))]
    rows = [[*row[:3], *(["1"] * 500)] for row in ROWS]
    raw = write(tmp_path / "a.csv", csv_text(rows, names))
    assert load(tmp_path, raw).num_events == 6
    with pytest.raises(ValueError, match="there are 'user_id', .*503 in all"):
        load(tmp_path, raw, item="item")


def test_damaged_prepared_data_is_prepared_again(tmp_path, caplog):
    raw = write(tmp_path / "a.csv", csv_text())
    load(tmp_path, raw)
    (folder,) = (tmp_path / "prepared").glob("table-*")
    for name in ("interactions.npz", "reading.json", "catalog.npz", "contexts.npz"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        assert plain(load(tmp_path, raw)) == WANT
        assert f"{name} has changed" in caplog.text
        caplog.clear()
