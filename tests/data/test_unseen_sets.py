"""Files in the forms of public sets that nothing here knows: they are read by `table`, with a
setting where they do not say enough, or refused with what to do."""

import json

import pytest

from tests.data.data_files import load, write
from ultra_hstu.table_config import TableConfig

U, K = range(1, 4), range(3)
SONGS = ("Ray", 'Say "hi', '"Heroes" (live)')
LASTFM = [
    f"user_{u:06}\t2009-05-0{1 + k}T23:08:57Z\ta{k}\tDeep Dish\t\t{song}"
    for u in U
    for k, song in enumerate(SONGS)
]
LASTFM_NAMES = ("user", "timestamp", "artist_id", "artist", "track_id", "title")
TAOBAO = [f"{u},226{k},252,{'pv' if k else 'buy'},{1511544070 + k}" for u in U for k in K]
TAOBAO_NAMES = ("user", "item", "category", "behavior", "timestamp")
READ = {
    "Taobao": ("UserBehavior.csv", TAOBAO, {"names": TAOBAO_NAMES}),
    "Yoochoose": (
        "clicks.dat",
        [f"{u},2014-04-07T10:5{k}:09.277Z,2145{k},0" for u in U for k in K],
        {"names": ("session_id", "time", "item_id", "category")},
    ),
    "Last.fm": (
        "plays.tsv",
        LASTFM,
        {"names": LASTFM_NAMES, "item": "artist_id", "quotes": False},
    ),
    "RecBole": (
        "ml.inter",
        ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
        + [f"{u}\t{119 + k}\t5\t{978300760 + k}" for u in U for k in K],
        {},
    ),
    "RetailRocket": (
        "events.csv",
        ["timestamp,visitorid,event,itemid,transactionid"]
        + [f"{1433221332117 + k},{257 + u},view,{355 + k}," for u in U for k in K],
        {},
    ),
    "Yelp": (
        "reviews.json",
        [
            json.dumps({"user_id": f"u{u}", "business_id": f"b{k}", "stars": 4.0,
                        "text": "a\nb", "date": f"2018-07-0{1 + k} 22:09:11"})
            for u in U for k in K
        ],
        {},
    ),
    "Diginetica": (
        "views.csv",
        ["sessionId;userId;itemId;timeframe;eventdate"]
        + [f"{u};NA;{81 + k};526309;2016-05-0{1 + k}" for u in U for k in K],
        {"user": "sessionId"},
    ),
    "Book-Crossing": (
        "BX-Book-Ratings.csv",
        ['"User-ID";"ISBN";"Book-Rating"'] + [f'"{u}";"03450{k}";"7"' for u in U for k in K],
        {"time_unit": "none"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_they_are_read(tmp_path, name):
    file, lines, settings = READ[name]
    path = write(tmp_path / file, lines)
    data = load(tmp_path, "table", path, table=TableConfig(**settings))
    assert (data.num_users, data.num_items, data.num_events) == (3, 3, 9)
    assert data.items.tolist() == [1, 2, 3] * 3
    if name == "Taobao":
        assert data.actions["behavior"].tolist() == [1, 2, 2] * 3
        assert data.timestamps.tolist()[:3] == [1511544070, 1511544071, 1511544072]
    if name == "Last.fm":
        assert data.catalog.titles == ("", *SONGS)
    if name == "Book-Crossing":
        assert data.catalog.raw_ids[1] == "034500"  # an ISBN, not a number


REFUSED = {
    "no header": ("a.csv", TAOBAO, {}, "a.csv, line 1: .* no header, name them by .*table.names="),
    "fewer names": (
        "a.csv",
        TAOBAO,
        {"names": TAOBAO_NAMES[:3]},
        "line 1: data.table.names has 3 names for 5 fields",
    ),
    "open quotes": (
        "a.tsv",
        LASTFM,
        {"names": LASTFM_NAMES, "item": "artist_id"},
        "a.tsv, line 3: .* is a quote left open.*data.table.quotes=False",
    ),
    "two characters": ("a.dat", ["1::2::3::4"], {}, "line 1: .* by '::', and one character"),
    "items of a user": ("a.txt", ["1 2 3 4", "2 3 4"], {}, "line 1: one field alone: expected"),
    "items as heads": ("a.txt", ["1:", "7,3,2005-09-06"], {}, "line 1: one field alone: expected"),
    "no times": ("a.csv", ["user_id,book_id", "1,2"], {}, "table.time=NAME, .*time_unit=none"),
    "days of a month": (
        "a.csv",
        ["user_id,item_id,time_stamp", *(f"1,{k},{829 + k}" for k in K)],
        {},
        "holds numbers from 829 to 831. That may be .*time_unit=days",
    ),
    "words for months": (
        "a.csv",
        ["user,item,time", *(f"1,{k},Tue Apr 03 18:00:06 +0000 2012" for k in K)],
        {},
        "line 2: column 'time' holds 'Tue Apr 03 .* write it so, or as seconds since 1970",
    ),
    "another encoding": ("a.csv", ["user,item,time", "1,ü,3"], {}, "line 2: .*iconv"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_they_are_refused_with_a_remedy(tmp_path, name):
    file, lines, settings, problem = REFUSED[name]
    encoding = "latin-1" if name == "another encoding" else "utf-8"
    path = write(tmp_path / file, lines, encoding)
    with pytest.raises(ValueError, match=problem) as error:
        load(tmp_path, "table", path, table=TableConfig(**settings))
    assert "a." in str(error.value) or "data.table" in str(error.value)


def test_a_folder_is_not_searched_for_text_of_any_kind(tmp_path):
    """A file that says what it is about beside the events is no file of events."""
    write(tmp_path / "raw/README.txt", ["All about it"])
    write(tmp_path / "raw/events.csv", ["user,item,time", *(f"1,{k},{1e9 + k:.0f}" for k in K)])
    assert load(tmp_path, "table", tmp_path / "raw").num_events == 3
