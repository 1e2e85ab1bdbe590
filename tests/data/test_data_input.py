"""Bad input: the error names file, line and value; nothing is lost in silence."""

import logging
import re

import numpy as np
import pytest

from tests.data.data_files import (
    KUAIRAND_HEADER,
    ML1M_MOVIES,
    ML1M_RATINGS,
    kuairand_line,
    load,
    ml1m,
    write,
)
from ultra_hstu.data import delimited
from ultra_hstu.data.delimited import Column, DelimitedFile

BAD_RATINGS = {
    "1::20::4": ("expected 4 fields, userId::movieId::rating::timestamp, found 3", "1::20::4"),
    "1::20::4::100::7": ("found 5", "1::20::4::100::7"),
    "1,20,4,100": ("found 1", "1,20,4,100"),
    "1\t20\t4\t100": ("found 1", r"1\t20\t4\t100"),
    "1:20:4:100": ("found 1", "1:20:4:100"),
    "1::20:4::4::100": ("movieId must be a whole number", "20:4"),
    "": ("found 1", "''"),
    "one::20::4::100": ("userId must be a whole number", "one"),
    "1::20.0::4::100": ("movieId must be a whole number", "20.0"),
    "1::2e1::4::100": ("movieId must be a whole number", "2e1"),
    "0::20::4::100": ("userId must lie in 1", "'0'"),
    "-1::20::4::100": ("userId must lie in 1", "-1"),
    "1::9223372036854775808::4::100": ("movieId must lie in 1", "9223372036854775808"),
    "1::20::6::100": ("rating must lie in 1..5", "'6'"),
    "1::20::nan::100": ("rating must be a whole number", "nan"),
    "1::20::4::": ("timestamp must be a whole number", "''"),
    "1::20::4::4294967296": ("timestamp must be seconds", "4294967296 would lie outside 1901"),
    "1::20::4::-2147483649": ("timestamp must be seconds", "-2147483649"),
    "1::20::4::978300760123": ("978300760123", "seems to be in milliseconds. Give seconds"),
    "1::20::4::0x1F": ("timestamp must be a whole number", "0x1F"),
    "1::20::4::1" + "0" * 5000: ("timestamp must be a whole number", "1000"),
}


@pytest.mark.parametrize("bad", BAD_RATINGS)
def test_a_bad_rating(tmp_path, bad):
    problem, value = BAD_RATINGS[bad]
    raw = ml1m(tmp_path / "raw", [*ML1M_RATINGS[:2], bad, *ML1M_RATINGS[2:]])
    with pytest.raises(ValueError, match=re.escape("raw/ratings.dat, line 3: ")) as error:
        load(tmp_path, "ml-1m", raw)
    assert problem in str(error.value) and value in str(error.value)


def test_a_rated_movie_that_the_movies_file_lacks(tmp_path):
    raw = ml1m(tmp_path / "raw", [*ML1M_RATINGS, "2::50::3::80"])
    with pytest.raises(ValueError, match="ratings.dat, line 7: .* item 50 is not in .*movies.dat"):
        load(tmp_path, "ml-1m", raw)


def test_a_rating_that_is_no_number_in_a_csv(tmp_path):
    lines = ["userId,movieId,rating,timestamp", "3,5,0.5,9", "3,6,inf,8"]
    write(tmp_path / "raw/ratings.csv", lines)
    write(tmp_path / "raw/movies.csv", ["movieId,title,genres", "5,A,B", "6,B,C"])
    with pytest.raises(
        ValueError, match=r"ratings.csv, line 3: rating must be a number in 0.5..5: 'inf'"
    ):
        load(tmp_path, "ml-20m", tmp_path / "raw")
    write(tmp_path / "raw/ratings.csv", lines[1:])
    with pytest.raises(
        ValueError, match="line 1: expected the header userId,movieId,rating,timestamp: '3,5,0.5,9'"
    ):
        load(tmp_path, "ml-20m", tmp_path / "raw")
    write(tmp_path / "raw/ratings.csv", lines[:1])
    with pytest.raises(ValueError, match="ratings.csv is empty"):
        load(tmp_path, "ml-20m", tmp_path / "raw")


@pytest.mark.parametrize("name", ["ratings.dat", "movies.dat"])
def test_an_empty_file(tmp_path, name):
    raw = ml1m(tmp_path / "raw")
    (raw / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{name} is empty"):
        load(tmp_path, "ml-1m", raw)


def test_a_file_that_may_be_cut_off_in_its_last_line(tmp_path, caplog):
    """The rest of the line still parses; only its length tells, which is a guess."""
    raw = ml1m(tmp_path / "raw")
    times = [f"{user}::{movie}::5::97830{movie:04}" for user in (1, 2) for movie in (10, 20, 30)]
    write(raw / "ratings.dat", [*times[:-1], times[-1][:-3]], end="")
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path, "ml-1m", raw).timestamps.min() == 978300
    assert "ratings.dat has no newline at its end, and its last field, '978300'" in caplog.text
    caplog.clear()
    for end in ("\n", "\r\n"):
        path = write(raw / "ratings.dat", times, end="")
        path.write_bytes(path.read_bytes().replace(b"\n", end.encode()))
        assert load(tmp_path, "ml-1m", raw).num_events == 6
    assert not caplog.text


def test_missing_files_are_listed(tmp_path):
    (ml1m(tmp_path / "raw") / "movies.dat").unlink()
    with pytest.raises(
        ValueError, match="lacks movies.dat: ml-1m is read from ratings.dat, movies.dat"
    ):
        load(tmp_path, "ml-1m", tmp_path / "raw")
    with pytest.raises(ValueError, match="nowhere' lacks ratings.dat, movies.dat"):
        load(tmp_path, "ml-1m", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ("50::No genres", "malformed movie"),
        ("50|Bars|War", "malformed movie"),
        ("x::Title::War", "movie id must be a whole number: 'x'"),
        ("20::Again::War", "movie 20 was given on line 2 already"),
    ],
)
def test_a_bad_movie(tmp_path, bad, problem):
    raw = ml1m(tmp_path / "raw", movies=[*ML1M_MOVIES, bad])
    with pytest.raises(ValueError, match="movies.dat, line 5: ") as error:
        load(tmp_path, "ml-1m", raw)
    assert problem in str(error.value)


def test_titles_are_right_in_either_encoding(tmp_path, caplog):
    raw = ml1m(tmp_path / "raw")  # latin-1, as published
    title = "Misérables, Les (1995)"
    assert title.encode() not in (raw / "movies.dat").read_bytes()
    assert load(tmp_path, "ml-1m", raw).catalog.titles[2] == title
    write(raw / "movies.dat", ML1M_MOVIES, "utf-8")
    assert load(tmp_path, "ml-1m", raw).catalog.titles[2] == title
    twice = [line.encode().decode("latin-1") for line in ML1M_MOVIES]
    write(raw / "movies.dat", twice, "utf-8")
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path, "ml-1m", raw).catalog.titles[2] == title
    assert "movies.dat, line 2: the title" in caplog.text
    write(raw / "movies.dat", [line.replace("é", "\ufffd") for line in ML1M_MOVIES], "utf-8")
    with pytest.raises(ValueError, match="movies.dat, line 2: the title has lost characters"):
        load(tmp_path, "ml-1m", raw)


def test_duplicate_events_are_dropped_and_counted(tmp_path, caplog):
    raw = ml1m(tmp_path / "raw", [*ML1M_RATINGS, ML1M_RATINGS[1], "1::30::3::91", ML1M_RATINGS[3]])
    with caplog.at_level(logging.WARNING):
        data = load(tmp_path, "ml-1m", raw)
    assert "dropped 2 events that repeat" in caplog.text
    assert data.num_events == 7  # the same movie at another time is another event
    assert data.timestamps[data.history(1)].tolist() == [90, 91, 100, 100]


def test_users_with_fewer_than_three_events_are_dropped_and_counted(tmp_path, caplog):
    raw = ml1m(tmp_path / "raw", [*ML1M_RATINGS, "9::10::5::1", "8::10::5::1", "8::20::5::2"])
    with caplog.at_level(logging.WARNING):
        data = load(tmp_path, "ml-1m", raw)
    assert "dropped 3 events of users with fewer than 3 events" in caplog.text
    assert data.users.tolist() == [1, 2] and data.num_events == 6
    with pytest.raises(ValueError, match="no user is left with 3 events"):
        load(tmp_path, "ml-1m", ml1m(raw, ML1M_RATINGS[:2]))


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ("A1,B2,5.0", "expected 4 fields, user,item,rating,timestamp, found 3"),
        ("A1;B2;5.0;100", "found 1"),
        ("A1,B2,5.5,100", "rating must be a number in 1..5: '5.5'"),
        ("A1,B2,five,100", "rating must be a number in 1..5: 'five'"),
        ("A1,B2,5.0,1e9", "timestamp must be a whole number: '1e9'"),
        (",B2,5.0,100", "user is empty"),
    ],
)
def test_a_bad_amazon_rating(tmp_path, bad, problem):
    write(tmp_path / "raw/ratings_Books.csv", ["A1,B1,5.0,100", bad, "A2,B1,1.0,7"])
    with pytest.raises(ValueError, match="ratings_Books.csv, line 2: ") as error:
        load(tmp_path, "amazon-books", tmp_path / "raw")
    assert problem in str(error.value)


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ("2 4 x 5", "user or item id must be a whole number: 'x'"),
        ("2 4 0 5", "must lie in 1"),
        ("2,4,5", "must be a whole number: '2,4,5'"),
        ("2", "expected 'user item item ...'"),
        ("", "must be a whole number: ''"),
        ("1 4 5 6", "user 1 was given on line 1 already"),
        ("2 4 99999999999999999999", "must lie in"),
    ],
)
def test_a_bad_beauty_line(tmp_path, bad, problem):
    write(tmp_path / "raw/Beauty.txt", ["1 1 2 3", bad, "3 1 2 4"])
    with pytest.raises(ValueError, match="Beauty.txt, line 2: ") as error:
        load(tmp_path, "amazon-beauty", tmp_path / "raw")
    assert problem in str(error.value)


@pytest.mark.parametrize(
    ("lines", "line", "problem"),
    [
        (["1,9", "7,7,8", "2,2", "0,1,1"], 3, "2 values for 3 problems: '2,2'"),
        (["1,9", "7,7,8", "2,2,2", "0,1,2"], 4, "correct must lie in 0..1: '2'"),
        (["1,9", "7,,8", "2,2,2", "0,1,1"], 2, "problem must be a whole number: ''"),
        (["1,9", "7,7,8", "2,2,2"], 3, "the file ends within a learner"),
        (["1", "7,7,8", "2,2,2", "0,1,1"], 1, "expected two numbers"),
        (["11,9", "7,7,8", "2,2,2", "0,1,1"], 1, "learner 11 was given in"),
    ],
)
def test_a_bad_learner(tmp_path, lines, line, problem):
    for k in range(1, 6):
        write(tmp_path / f"raw/fold{k}.csv", [f"{10 + k},9", "1,2,3", "1,1,1", "0,0,1"])
    write(tmp_path / "raw/fold3.csv", lines)
    with pytest.raises(ValueError, match=f"fold3.csv, line {line}: ") as error:
        load(tmp_path, "assistments-2017", tmp_path / "raw")
    assert problem in str(error.value)


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (kuairand_line(1, 2, 1_649_000_000_000, is_click=2), "is_click must lie in 0..1: '2'"),
        (kuairand_line(1, 2, 1_649_000_000_000_000), "time_ms must be milliseconds"),
        (kuairand_line(-1, 2, 1_649_000_000_000), "user_id must lie in 0"),
        ("1,2,20220408,1200", "found 4"),
    ],
)
def test_a_bad_kuairand_line(tmp_path, bad, problem):
    good = kuairand_line(1, 2, 1_649_000_000_000)
    write(tmp_path / "raw/log_standard_4_08_to_4_21_pure.csv", [KUAIRAND_HEADER, good])
    write(tmp_path / "raw/log_standard_4_22_to_5_08_pure.csv", [KUAIRAND_HEADER, good, bad])
    with pytest.raises(ValueError, match="log_standard_4_22_to_5_08_pure.csv, line 3: ") as error:
        load(tmp_path, "kuairand-pure", tmp_path / "raw")
    assert problem in str(error.value)


def test_the_fast_and_the_careful_reader_agree(tmp_path, monkeypatch):
    columns = (
        Column("a", np.int64),
        Column("b", None),
        Column("c", np.float32, 0, 9),
        Column("d", np.str_),
    )
    rng = np.random.default_rng(0)
    rows = [f"{rng.integers(2**62)}::skipped::{rng.random():.3f}::ü{k}" for k in range(200)]

    def read(path):
        file = DelimitedFile(path, columns, "::")
        batches = [batch.to_pydict() for batch in file.batches(file.types)]
        return {name: sum((batch[name] for batch in batches), []) for name in batches[0]}

    for end in ("\n", "\r\n", "\r", " \t\n"):
        path = tmp_path / "table"
        path.write_bytes("".join(row + end for row in rows).encode())
        with monkeypatch.context() as patch:
            patch.setattr(delimited, "_careful_batches", lambda *_: pytest.fail("slow"))
            fast = read(path)
        with monkeypatch.context() as patch:
            patch.setattr(delimited, "_is_plain", lambda *_: False)
            assert read(path) == fast
        assert list(fast) == ["a", "c", "d"] and len(fast["a"]) == 200


def test_quotes_in_a_header_alone_cost_nothing(tmp_path, monkeypatch):
    path = write(tmp_path / "table.csv", ['"a","b"', "1,2", "3,4"])
    file = DelimitedFile(path, (Column("a", np.int64), Column("b", np.int64)), header=True)
    monkeypatch.setattr(delimited, "_careful_batches", lambda *_: pytest.fail("slow"))
    assert [batch.to_pydict() for batch in file.batches(file.types)] == [{"a": [1, 3], "b": [2, 4]}]


def test_a_bad_line_far_down_is_found_once(tmp_path, monkeypatch):
    """What was read fast before it is not read again, nor twice."""
    monkeypatch.setattr(delimited, "_BLOCK_BYTES", 1 << 10)
    columns = (Column("a", np.int64), Column("b", np.int32, 0, 9))
    rows = [f"{k},{k % 10}" for k in range(2000)]
    path = write(tmp_path / "table.csv", [*rows[:1500], '"1500","0"', *rows[1501:]])
    file = DelimitedFile(path, columns)
    with monkeypatch.context() as patch:  # as if quotes were not seen beforehand
        patch.setattr(delimited, "_is_plain", lambda *_: True)
        found = [a for batch in file.batches(file.types) for a in batch["a"].to_pylist()]
        assert found == list(range(2000))
    write(path, [*rows[:1500], "1500,10", *rows[1501:]])
    with pytest.raises(ValueError, match="table.csv, line 1501: b must lie in 0..9: '10'"):
        list(file.batches(file.types))
