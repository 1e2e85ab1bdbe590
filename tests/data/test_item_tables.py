"""Features of items from the tables beside events: own files, and official ones."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.data_files import write
from ultra_hstu.config import DataConfig
from ultra_hstu.data.interactions import Interactions, load_interactions
from ultra_hstu.table_config import TableConfig

EVENTS = ["user,item,time"] + [f"{user},{item},{item}" for user in range(3) for item in range(1, 5)]
ITEMS = [
    "item,title,kind,tags,price,since",
    "1,One,mug,red|blue,2.5,5",
    "2,Two,pot,,10,5",
    "3,Three,mug,blue,,5",
    "4,Four,,green|red|green,7,5",
]


def load(folder, items, *, events=EVENTS, **table):
    write(folder / "events.csv", events)
    if isinstance(items, list):
        write(folder / "items.csv", items)
        items = folder / "items.csv"
    config = TableConfig(**{"item_features": ("kind", "tags", "price"), **table})
    return load_interactions(
        DataConfig(
            source="table",
            raw_dir=str(folder / "events.csv"),
            data_dir=str(folder / "made"),
            table=TableConfig(**vars(config) | {"items_file": str(items), "time_unit": "s"}),
        )
    )


def words(interactions, name):
    column = interactions.catalog.features[name]
    return [column.words(item) for item in range(1, interactions.num_items + 1)]


def test_texts_lists_and_numbers(tmp_path):
    made = load(tmp_path, ITEMS, item_separator="|")
    assert words(made, "kind") == [["mug"], ["pot"], ["mug"], []]
    assert words(made, "tags") == [["red", "blue"], [], ["blue"], ["green", "red"]]
    assert words(made, "price") == [["2.5"], ["10"], [], ["7"]]
    again = load(tmp_path, ITEMS, item_separator="|")
    assert again.fingerprint() == made.fingerprint()
    assert set(made.fingerprint()["item_features"]) == {"kind", "tags", "price"}
    whole = load(tmp_path, ITEMS)
    assert words(whole, "tags")[0] == ["red|blue"]
    changed = load(tmp_path, [line.replace("green", "grey") for line in ITEMS])
    assert changed.fingerprint()["sha256"] == made.fingerprint()["sha256"]
    assert changed.fingerprint() != made.fingerprint()


def test_lists_of_parquet(tmp_path):
    lists = pa.array([["a", "b"], None, [], ["b"]], pa.list_(pa.string()))
    table = pa.table({"item": [4, 3, 2, 1], "tags": lists, "title": list("abcd")})
    pq.write_table(table, tmp_path / "items.parquet")
    made = load(tmp_path, tmp_path / "items.parquet", item_features=("tags",))
    assert words(made, "tags") == [["b"], [], [], ["a", "b"]]


def test_an_item_with_two_rows(tmp_path):
    """The first of equal ones counts; of others, the newest by a column of times, or none."""
    assert words(load(tmp_path, [*ITEMS, ITEMS[1]]), "kind")[0] == ["mug"]
    newer = [*ITEMS, "1,One,pan,red|blue,2.5,7"]
    with pytest.raises(
        ValueError,
        match=r"items.csv, line 6: item 1 has kind 'pan', and 'mug' in .*items.csv, line 2: "
        "leave one row, or name a column of times by --config.data.table.item_time=NAME",
    ):
        load(tmp_path, newer)
    assert words(load(tmp_path, newer, item_time="since"), "kind")[0] == ["pan"]
    older = [*ITEMS, "1,One,pan,red|blue,2.5,3"]
    assert words(load(tmp_path, older, item_time="since"), "kind")[0] == ["mug"]
    with pytest.raises(ValueError, match="item_time='kind'.*has string there: it must hold dates"):
        load(tmp_path, newer, item_time="kind")


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="items.csv has no column 'brand'; there are 'title', 'kind', 'tags'"
    ):
        load(tmp_path, ITEMS, item_features=("brand",))
    from ultra_hstu.config import Config
    from ultra_hstu.feature_config import FeatureConfig

    config = Config(data=DataConfig(source="table"), features=FeatureConfig(items=("kind",)))
    with pytest.raises(ValueError, match="is read from a table of them: name it by data.table"):
        config.of_table().validate()


def test_later_rows_change_nothing_before(tmp_path):
    """Of events that were there, prepared arrays and features stay as they are."""
    before = load(tmp_path / "before", ITEMS, item_separator="|")
    more = [f"{user},{item},{90 + item}" for user in (0, 2, 5) for item in (0, 2, 3, 9)]
    added = ["0,Zero,new,blue|later,1,95", "9,Nine,,later,3,95"]
    after = load(tmp_path / "after", ITEMS + added, events=EVENTS + more, item_separator="|")
    assert after.num_users == 4 and after.num_items == 6
    for user in before.users.tolist():
        old, new = before.history(user), after.history(user)
        new = slice(new.start, new.start + old.stop - old.start)
        items = [data.catalog.raw_ids[data.items[at]] for data, at in ((before, old), (after, new))]
        assert items[0].tolist() == items[1].tolist()
        assert before.timestamps[old].tolist() == after.timestamps[new].tolist()
    for raw in before.catalog.raw_ids[1:].tolist():
        known = [
            data.catalog.features_of(int(data.catalog.encode([raw])[0])) for data in (before, after)
        ]
        assert known[0] == known[1]


def test_movielens(tmp_path):
    rows = [f"{user}::{movie}::3::{movie + 9}" for user in (1, 2) for movie in (1, 2, 3)]
    write(tmp_path / "ratings.dat", rows)
    write(
        tmp_path / "movies.dat",
        ["1::Toys (1995)::Animation|Comedy", "2::No year::Drama", "3::Sea (1950)::Drama|War"],
    )
    made = load_interactions(
        DataConfig(source="ml-1m", raw_dir=str(tmp_path), data_dir=str(tmp_path / "made"))
    )
    assert words(made, "genres") == [["Animation", "Comedy"], ["Drama"], ["Drama", "War"]]
    assert words(made, "year") == [["1995"], [], ["1950"]]


def test_arrays_keep_features(tmp_path):
    made = load(tmp_path, ITEMS, item_separator="|")
    made.save(tmp_path / "copy.npz")
    copy = Interactions.load(tmp_path / "copy.npz")
    assert copy.fingerprint() == json.loads(json.dumps(made.fingerprint()))
