"""MovieLens, all releases (https://grouplens.org/datasets/movielens)."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from ultra_hstu.data.delimited import Column, DelimitedFile
from ultra_hstu.data.download import Download
from ultra_hstu.data.public import PublicSet, SetFile
from ultra_hstu.data.table.source import Record, RecordFile
from ultra_hstu.data.text import Line, lines, records
from ultra_hstu.table_config import TableConfig

_log = logging.getLogger(__name__)
_URL = "https://files.grouplens.org/datasets/movielens/"
# Published beside the archives (*.zip.md5); those of `latest` change, and have none.
_MD5 = {
    "ml-100k": "0e33842e24a9c977be4e0107933c0723",
    "ml-1m": "c4d9eecfca2ab87c1945afe126590906",
    "ml-10m": "ce571fd55effeba0271552578f2648bd",
    "ml-20m": "cd245b17a1ae2cc31bb14903e1204af3",
    "ml-25m": "6b51fb2759a8657d3bfcbfc42b592ada",
    "ml-32m": "d472be332d4daa821edc399621853b57",
    "ml-latest": None,
    "ml-latest-small": None,
}
_NUM_USERS = {"ml-100k": 943, "ml-1m": 6040}  # 1, 2, 3, ... of them
_MOVIES_HEADER = ("movieId", "title", "genres")
_MOVIES = {
    "movieId": pa.int64(),
    "title": pa.string(),
    "genres": pa.list_(pa.string()),
    "year": pa.int64(),
}
_YEAR = re.compile(r"\((\d{4})\)\s*$")  # at the end of a title
# The flags of u.item, in order (u.genre).
_GENRES = (
    "unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy "
    "Film-Noir Horror Musical Mystery Romance Sci-Fi Thriller War Western"
).split()
NO_GENRES = "(no genres listed)"  # movies.csv says so
# The features of ml-1m's users, and their values as the release documents them. Ages are the
# youngest of a group; occupations are numbered.
_USERS_1M = (
    Column("UserID", np.int64, 1),
    Column("gender", np.str_, allowed=("F", "M")),
    Column("age", np.str_, allowed=("1", "18", "25", "35", "45", "50", "56")),
    Column("occupation", np.str_, allowed=tuple(map(str, range(21)))),
    Column("Zip-code", None),
)
_USERS_100K = (
    Column("user id", np.int64, 1),
    Column("age", np.int32, 0, 150),
    Column("gender", np.str_, allowed=("F", "M")),
    Column("occupation", np.str_),
    Column("zip code", None),
)


def _ratings(release: str, path: Path) -> DelimitedFile:
    whole = release in ("ml-100k", "ml-1m")  # later ones have half stars
    columns = (
        Column("userId", np.int64, 1),
        Column("movieId", np.int64, 1),
        # Stars as floats in all releases.
        Column("rating", np.float32, 1 if whole else 0.5, 5, whole=whole),
        Column.time("timestamp", "s"),
    )
    delimiter = {".data": "\t", ".dat": "::", ".csv": ","}[path.suffix]
    after = partial(_warn_of_the_order, release) if release in _NUM_USERS else None
    return DelimitedFile(path, columns, delimiter, header=path.suffix == ".csv", after=after)


def _warn_of_the_order(release: str, path: Path, largest: Mapping[str, int]) -> None:
    """Warns where movies seem to stand in the place of users: both are small integers."""
    user, movie = largest["userId"], largest["movieId"]
    if user > (known := _NUM_USERS[release]) >= movie:
        _log.warning(
            "%s: users go up to %d and movies to %d, but %s has %d users: a line must hold user, "
            "movie, rating, time, in this order",
            path,
            user,
            movie,
            release,
            known,
        )


def _movies(path: Path) -> Iterator[tuple[Line, Record]]:
    """The movies of `movies.dat` (a::b::c), `u.item` (a|b|...) or `movies.csv` (header, quotes).

    A title that was encoded twice ("AmÃ©lie") is repaired with a warning; one with lost characters
    is an error.
    """
    numbers: dict[int, int] = {}
    read: dict[str, Callable[[Path], Iterator[tuple[Line, str, str, list[str]]]]] = {
        ".csv": _of_csv,
        ".dat": _of_dat,
        ".item": _of_item,
    }
    for line, text, title, genres in read[path.suffix](path):
        movie = line.integer(text, "movie id", 1)
        if movie in numbers:
            raise line.error(f"movie {movie} was given on line {numbers[movie]} already")
        numbers[movie] = line.number
        title, year = _clean(title, line), _YEAR.search(title)
        yield (
            line,
            {
                "movieId": movie,
                "title": title,
                "genres": [genre for genre in genres if genre and genre != NO_GENRES],
                "year": year and int(year[1]),
            },
        )
    if not numbers:
        raise ValueError(f"{path} has no movies behind its header")


def _of_csv(path: Path) -> Iterator[tuple[Line, str, str, list[str]]]:
    rows = records(path)
    line, names = next(rows)
    if sorted(names) != sorted(_MOVIES_HEADER):
        raise line.error(f"expected the header {','.join(_MOVIES_HEADER)}")
    movie, title, genres = map(names.index, _MOVIES_HEADER)
    for line, fields in rows:
        if len(fields) != len(names):
            raise line.error("malformed movie")
        yield line, fields[movie], fields[title], fields[genres].split("|")


def _of_dat(path: Path) -> Iterator[tuple[Line, str, str, list[str]]]:
    for line in lines(path):
        fields = line.text.split("::")  # a title may hold this, the others may not
        if len(fields) < 3:
            raise line.error("malformed movie")
        yield line, fields[0], "::".join(fields[1:-1]), fields[-1].strip().split("|")


def _of_item(path: Path) -> Iterator[tuple[Line, str, str, list[str]]]:
    for line in lines(path):
        fields = line.text.split("|")
        if len(fields) != 5 + len(_GENRES):
            raise line.error("malformed movie")
        line.integer(fields[0], "movie id", 1)  # a header, say, is named before its consequences
        flags = [field.strip() for field in fields[5:]]
        if not set(flags) <= {"0", "1"}:
            raise line.error("each genre must be 0 or 1")
        genres = [name for name, flag in zip(_GENRES, flags, strict=True) if flag == "1"]
        yield line, fields[0], fields[1], genres


def _clean(title: str, line: Line) -> str:
    if "\N{REPLACEMENT CHARACTER}" in title:
        raise line.error("the title has lost characters; fetch the publisher's file", title)
    try:
        repaired = title.encode("latin-1").decode("utf-8")
    except (UnicodeEncodeError, UnicodeDecodeError):
        return title
    if repaired != title:
        place = f"{line.path}, line {line.number}"
        _log.warning("%s: the title %r was encoded twice; read as %r", place, title, repaired)
    return repaired


_FILES = {"ml-100k": ("u.data", "u.item"), "ml-1m": ("ratings.dat", "movies.dat")}
_FILES["ml-10m"] = _FILES["ml-1m"]
_USERS = {
    "ml-100k": SetFile("u.user", partial(DelimitedFile, columns=_USERS_100K, delimiter="|"), True),
    "ml-1m": SetFile("users.dat", partial(DelimitedFile, columns=_USERS_1M, delimiter="::"), True),
}


def _release(name: str, md5: str | None) -> PublicSet:
    ratings, movies = _FILES.get(name, ("ratings.csv", "movies.csv"))
    return PublicSet(
        name=name,
        about="MovieLens: stars; genres and year of movies"
        + ("; gender, age group and occupation of users" if name in _USERS else ""),
        events=(SetFile(ratings, partial(_ratings, name)),),
        items=SetFile(movies, lambda path: RecordFile(path, _MOVIES, _movies)),
        users=_USERS.get(name),
        table=TableConfig(
            user="userId",
            item="movieId",
            time="timestamp",
            time_unit="s",
            actions=("rating",),
            item_title="title",
            item_features=("genres", "year"),
            catalog="listed",  # every movie, rated or not: 3,883 for ml-1m
        ),
        downloads=(Download(f"{_URL}{name}.zip", md5 and f"md5:{md5}"),),
    )


RELEASES = tuple(_release(name, md5) for name, md5 in _MD5.items())
