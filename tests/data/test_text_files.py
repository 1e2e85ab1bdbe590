"""Files as people write them: marks, line ends, blanks, quotes, other orders of columns and other
encodings are read right, or refused with file, line and remedy."""

import codecs
import gzip
import logging
import tracemalloc

import numpy as np
import pytest

from tests.data.data_files import KUAIRAND_HEADER, kuairand_line, load, write
from tests.data.official_files import OFFICIAL, official, read
from ultra_hstu.data import signals
from ultra_hstu.data.text import MAX_ID_LENGTH, Line, listed, records

SAME = {
    "mark": lambda data: codecs.BOM_UTF8 + data,
    "CRLF": lambda data: data.replace(b"\n", b"\r\n"),
    "CRLF without the last": lambda data: data.replace(b"\n", b"\r\n").removesuffix(b"\r\n"),
    "CR": lambda data: data.replace(b"\n", b"\r"),
    "blank last lines": lambda data: data + b"\n \r\n\t\n\n",
}


@pytest.mark.parametrize("change", SAME)
@pytest.mark.parametrize("source", OFFICIAL)
def test_the_same_is_read(tmp_path, caplog, source, change):
    expected = read(source, official(source, tmp_path))
    for name in OFFICIAL[source]:
        path = tmp_path / name
        path.write_bytes(SAME[change](path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert read(source, tmp_path) == expected
    assert "cut off" not in caplog.text


OTHER = {
    "UTF-16": (lambda data: data.decode().encode("utf-16"), "is in UTF-16: save it as UTF-8"),
    "UTF-16 without a mark": (lambda data: data.decode().encode("utf-16-le"), "holds NUL bytes"),
    "gzip": (gzip.compress, "is a gzip file: unpack it"),
    "half marked": (
        lambda data: codecs.BOM_UTF8 + data + b"\xff\n",
        "is marked as UTF-8 but is not",
    ),
    "blank": (lambda data: b"\n \n", "is empty"),
}


@pytest.mark.parametrize("change", OTHER)
@pytest.mark.parametrize("source", OFFICIAL)
def test_what_is_no_such_text_is_refused_by_name(tmp_path, source, change):
    changed, problem = OTHER[change]
    for name in OFFICIAL[source]:
        path = official(source, tmp_path) / name
        path.write_bytes(changed(path.read_bytes()))
        with pytest.raises(ValueError, match=f"{name} .*{problem}|{name} {problem}"):
            read(source, tmp_path)


@pytest.mark.parametrize(
    ("source", "name", "header"),
    [
        ("ml-100k", "u.data", "user_id\titem_id\trating\ttimestamp"),
        ("ml-100k", "u.item", "|".join(["movie id", "title", *"abcdefghijklmnopqrstuv"])),
        ("ml-1m", "ratings.dat", "userId::movieId::rating::timestamp"),
        ("amazon-books", "ratings_Books.csv", "user_id,parent_asin,rating,timestamp"),
        ("amazon-beauty", "Beauty.txt", "user items"),
        ("assistments-2017", "fold1.csv", "learner,length"),
    ],
)
def test_a_header_where_there_is_none(tmp_path, source, name, header):
    write(official(source, tmp_path) / name, [header, *OFFICIAL[source][name] * 4])
    with pytest.raises(ValueError, match=f"{name}, line 1: .*If line 1 is a header, delete it"):
        read(source, tmp_path)


@pytest.mark.parametrize(
    ("source", "name"), [("ml-20m", "ratings.csv"), ("kuairand-pure", "user_features_pure.csv"),
    ("kuairand-pure", "log_standard_4_08_to_4_21_pure.csv")]
)  # fmt: skip
def test_with_a_header_columns_stand_in_any_order(tmp_path, source, name):
    expected = read(source, official(source, tmp_path))
    rows = [fields for _, fields in records(tmp_path / name)]
    turned = [[f'"{field}"' if "," in field else field for field in reversed(row)] for row in rows]
    write(tmp_path / name, [", ".join(row) for row in turned])
    assert read(source, tmp_path) == expected


def test_amazon_with_the_item_first_is_refused(tmp_path):
    lines = OFFICIAL["amazon-books"]["ratings_Books.csv"]
    turned = [",".join((item, user, *rest)) for user, item, *rest in (x.split(",") for x in lines)]
    write(tmp_path / "ratings_Books.csv", turned)
    match = (
        "line 1: the columns must be user,item,rating,timestamp, but '1000000001' is an item"
        " .*amazon-2018/Books, whose file is Books.csv, or put the user first: awk"
    )
    with pytest.raises(ValueError, match=match):
        read("amazon-books", tmp_path)
    write(tmp_path / "ratings_Books.csv", [",".join(x.split(",")[::-1]) for x in lines])
    with pytest.raises(
        ValueError, match="line 1: .* The columns must be user,item,rating,timestam"
    ):
        read("amazon-books", tmp_path)


def test_movielens_with_the_movie_first_is_warned_of(tmp_path, caplog):
    def turned(lines):
        return [
            f"{movie}\t{user}\t{rest}" for user, movie, rest in (x.split("\t", 2) for x in lines)
        ]

    folder = official("ml-100k", tmp_path)
    events = [f"{user}\t{movie}\t3\t881250949" for movie in (3, 1000) for user in (6, 7, 8)]
    write(folder / "u.data", turned(events))
    rest = OFFICIAL["ml-100k"]["u.item"][0].removeprefix("1")
    write(folder / "u.item", [f"{k}{rest}" for k in range(1, 1683)])
    with caplog.at_level(logging.WARNING):
        read("ml-100k", folder)
    assert "users go up to 1000 and movies to 8, but ml-100k has 943 users" in caplog.text


def test_blanks_around_fields_are_dropped(tmp_path):
    expected = read("amazon-books", official("amazon-books", tmp_path))
    lines = OFFICIAL["amazon-books"]["ratings_Books.csv"]
    write(tmp_path / "ratings_Books.csv", [x.replace(",", " ,\t ") for x in lines])
    assert read("amazon-books", tmp_path) == expected
    write(
        tmp_path / "ratings_Books.csv",
        [f'"{x.replace(",", chr(34) + ", " + chr(34))}"' for x in lines],
    )
    assert read("amazon-books", tmp_path) == expected


MOVIES = ["movieId,title,genres", "5,A,B", "{}", "6,Amélie,Drama", "8,C,D"]


@pytest.mark.parametrize(
    "bad",
    [
        r'7,"\"Grand Nights\" Live (1998)",Comedy',
        '7,"Grand Nights (1998),Comedy',
        '7,"Grand" Nights,Comedy',
        f'7,"{"x" * 200_000}",Comedy',
    ],
)
def test_a_quote_in_a_title_that_is_no_csv(tmp_path, bad):
    official("ml-20m", tmp_path)
    write(tmp_path / "movies.csv", [line.format(bad) for line in MOVIES])
    with pytest.raises(
        ValueError, match="movies.csv, line 3: the record .* cannot be read"
    ) as error:
        read("ml-20m", tmp_path)
    assert len(str(error.value)) < 700


def test_a_line_break_in_a_quoted_title(tmp_path):
    official("ml-20m", tmp_path)
    write(
        tmp_path / "movies.csv", [x.format('7,"Grand Nights\nLive (1998)",Comedy') for x in MOVIES]
    )
    assert read("ml-20m", tmp_path)[2][7] == "Grand Nights\nLive (1998)"
    write(tmp_path / "movies.csv", [*MOVIES[:2], '7,"Grand\nNights",C', "6,Amélie"])
    with pytest.raises(ValueError, match="movies.csv, line 5: malformed movie: '6,Amélie'"):
        read("ml-20m", tmp_path)


def test_seconds_for_milliseconds(tmp_path):
    for first, second in ((1, 1000), (1000, 1), (1, 1)):
        for dates, factor in (("4_08_to_4_21", first), ("4_22_to_5_08", second)):
            times = [1_650_000_000_123 // factor + k for k in range(3)]
            lines = [KUAIRAND_HEADER, *(kuairand_line(1, 2, time) for time in times)]
            write(tmp_path / f"log_standard_{dates}_pure.csv", lines)
        if (first, second) == (1, 1):
            read("kuairand-pure", official("kuairand-pure", tmp_path))
            continue
        seconds = "4_08" if first > 1 else "4_22"
        with pytest.raises(ValueError, match=f"{seconds}.*line 2: time_ms .* to be in seconds"):
            read("kuairand-pure", tmp_path)


def test_early_times_are_legal_and_a_span_of_a_century_is_not(tmp_path):
    folder = official("ml-1m", tmp_path)
    write(folder / "ratings.dat", ["1::10::5::-5", "1::30::3::0", "1::20::4::2147483642"])
    assert [time for _, time, _ in read("ml-1m", folder)[0][1]] == [-5, 0, 2147483642]
    write(folder / "ratings.dat", ["1::10::5::-5", "1::30::3::0", "1::20::4::2147483643"])
    with pytest.raises(ValueError, match="line 3: time 2147483643 .* than .* -5 of .*, line 1"):
        read("ml-1m", folder)


@pytest.mark.parametrize("place", [0, 1])
def test_long_ids_are_bounded(tmp_path, place):
    """One long id costs what it holds, not its length in every line."""
    lines = [line for _ in range(150) for line in OFFICIAL["amazon-books"]["ratings_Books.csv"]]
    path = official("amazon-books", tmp_path) / "ratings_Books.csv"
    for k, line in enumerate(lines):
        *ids, rating, time = line.split(",")
        lines[k] = ",".join([*(f"{one}{k // 36}" for one in ids), rating, time])
    fields = lines[77].split(",")

    def put(size):
        fields[place] = "x" * size
        lines[77] = ",".join(fields)
        write(path, lines)

    put(MAX_ID_LENGTH)
    tracemalloc.start()
    read("amazon-books", tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 * path.stat().st_size  # fixed-width ids alone would take 50 times the file
    name = ("user", "item")[place]
    for size in (MAX_ID_LENGTH + 1, 100_000):
        put(size)
        with pytest.raises(
            ValueError, match=f"line 78: {name} has {size} characters, and may have"
        ):
            read("amazon-books", tmp_path)


def test_a_list_of_ids(tmp_path):
    path = tmp_path / "block.txt"
    path.write_bytes(b"\xef\xbb\xbf3\r\n\r\n 17 \r\n\nB 7")
    assert listed(path) == [Line(path, 1, "3"), Line(path, 3, "17"), Line(path, 5, "B 7")]
    for blank in (b"", b"\n \n", b"\xef\xbb\xbf"):
        path.write_bytes(blank)
        assert listed(path) == []
    write(path, ["3", "x" * 257])
    with pytest.raises(ValueError, match="block.txt, line 2: the id has 257 characters"):
        listed(path)


def test_a_file_of_users_that_is_not_there_is_named(tmp_path):
    raw = official("ml-1m", tmp_path / "raw")
    (raw / "users.dat").unlink()
    data = load(tmp_path, "ml-1m", raw)
    with pytest.raises(ValueError, match="'age': this source has none; raw_dir lacks users.dat"):
        signals.context(data, "age")
    assert "age" in load(tmp_path, "ml-1m", official("ml-1m", raw)).contexts


def test_what_amazons_filter_drops_is_counted(tmp_path, caplog):
    lines = [*OFFICIAL["amazon-books"]["ratings_Books.csv"], "AX,1000000001,5.0,1300000000"]
    write(tmp_path / "ratings_Books.csv", lines)
    with caplog.at_level(logging.WARNING):
        read("amazon-books", tmp_path)
    assert "dropped 1 events of users with fewer than 5 events" in caplog.text


def test_strings_of_any_length_survive_the_disk(tmp_path):
    users = ["ü" * 200, "a", "a b", "zz", "b"]
    lines = [f"{user},item {k},4.0,{1300000000 + k}" for user in users for k in range(5)]
    write(tmp_path / "raw/ratings_Books.csv", lines)
    data = load(tmp_path, "amazon-books", tmp_path / "raw")
    assert data.users.tolist() == ["a", "a b", "b", "zz", "ü" * 200]
    assert data.history("ü" * 200) == slice(20, 25)
    assert data.catalog.raw_ids.tolist() == ["", *(f"item {k}" for k in range(5))]
    assert data.catalog.encode(["item 3"]).tolist() == [4]
    np.testing.assert_array_equal(data.items, np.tile(np.arange(1, 6), 5))
    again = load(tmp_path, "amazon-books", tmp_path / "raw")
    assert again.fingerprint() == data.fingerprint()
