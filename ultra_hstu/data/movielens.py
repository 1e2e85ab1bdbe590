"""MovieLens 100k, 1m and 20m (https://grouplens.org/datasets/movielens)."""

import csv
import logging
from pathlib import Path

import numpy as np

from ultra_hstu.data.builder import InteractionsBuilder, SourceConfig
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.data.contexts import Contexts
from ultra_hstu.data.download import Download
from ultra_hstu.data.events import RawEvents
from ultra_hstu.data.delimited import Column, read_table
from ultra_hstu.data.text import MAX_SECONDS, Line, lines

_log = logging.getLogger(__name__)
_URL = "https://files.grouplens.org/datasets/movielens/"
# The release's two files (ratings, movies), the delimiter of ratings, and whether a header comes
# first.
_FORMATS = {
    "ml-100k": ("u.data", "u.item", "\t", False),
    "ml-1m": ("ratings.dat", "movies.dat", "::", False),
    "ml-20m": ("ratings.csv", "movies.csv", ",", True),
}
_MD5 = {  # published beside each archive (*.zip.md5)
    "ml-100k": "0e33842e24a9c977be4e0107933c0723",
    "ml-1m": "c4d9eecfca2ab87c1945afe126590906",
    "ml-20m": "cd245b17a1ae2cc31bb14903e1204af3",
}
# The features of ml-1m's users, and their values as the release documents them. Ages are the
# youngest of a group; occupations are numbered.
USERS_FILE = "users.dat"
_CONTEXTS = {
    "gender": ("F", "M"),
    "age": ("1", "18", "25", "35", "45", "50", "56"),
    "occupation": tuple(map(str, range(21))),
}


class MovieLens(InteractionsBuilder):
    """Ratings with times in seconds.

    The catalogue is every movie of the movies file, rated or not: 3,883 for ml-1m.

    ml-1m describes its users too: gender, age group and occupation, from `users.dat`.

    Raises (on building):
        ValueError: names file, line and value of malformed lines, ids below 1, ratings outside the
            release's scale, times outside 32 bits, rated movies that the movies file lacks, and
            features outside the documented values.
    """

    ACTIONS = {"rating": np.float32}
    ITEMS_FILE = "the movies file"
    BUILDER_CONFIGS = [
        SourceConfig(
            name=name,
            description=f"MovieLens {name[3:]}: users, movies, ratings, times",
            files=_FORMATS[name][:2],
            context_files=(USERS_FILE,) if name == "ml-1m" else (),
            downloads=(Download(f"{_URL}{name}.zip", f"md5:{_MD5[name]}"),),
        )
        for name in _FORMATS
    ]

    def read(self) -> tuple[RawEvents, Catalog]:
        ratings, movies, delimiter, header = _FORMATS[self.builder_config.name]
        half_stars = self.builder_config.name == "ml-20m"
        columns = (
            Column("userId", np.int64, 1),
            Column("movieId", np.int64, 1),
            Column("rating", np.float64, 0.5, 5)
            if half_stars
            else Column("rating", np.int64, 1, 5),
            Column("timestamp", np.int64, 0, MAX_SECONDS),
        )
        path = self.raw_dir / ratings
        table = read_table(path, columns, delimiter=delimiter, header=header)
        actions = {"rating": table["rating"].astype(np.float32)}
        where = ((str(path), 2 if header else 1, len(actions["rating"])),)
        events = RawEvents(table["userId"], table["movieId"], table["timestamp"], actions, where)
        return events.without_duplicates(), read_movies(self.raw_dir / movies)

    def read_contexts(self) -> Contexts:
        path = self.raw_dir / USERS_FILE
        if USERS_FILE not in self.builder_config.context_files or not path.is_file():
            return Contexts()
        columns = (
            Column("UserID", np.int64, 1),
            *(Column(name, np.str_) for name in _CONTEXTS),
            Column("Zip-code", None),
        )
        table = read_table(path, columns, delimiter="::")
        return Contexts.read(
            path, 1, table["UserID"], {name: table[name].tolist() for name in _CONTEXTS}, _CONTEXTS
        )


def read_movies(path: Path) -> Catalog:
    """The catalogue of `movies.dat` (a::b::c), `u.item` (a|b|...) or `movies.csv` (header, quotes).

    A title that was encoded twice ("AmÃ©lie") is repaired with a warning; one with lost characters
    is an error.
    """
    ids: dict[int, int] = {}
    titles = []
    for line in lines(path):
        text = line.text
        if path.suffix == ".csv":
            fields = next(csv.reader([text], strict=True)) if text else []
            if line.number == 1:
                if fields != ["movieId", "title", "genres"]:
                    raise line.error("expected the header movieId,title,genres")
                continue
            whole = len(fields) == 3
        elif path.suffix == ".dat":  # a title may hold the delimiter, an id or genres may not
            parts = text.split("::")
            fields = [parts[0], "::".join(parts[1:-1])]
            whole = len(parts) >= 3
        else:
            fields = text.split("|")
            whole = len(fields) == 24
        if not whole:
            raise line.error("malformed movie")
        movie = line.integer(fields[0], "movie id", 1)
        if movie in ids:
            raise line.error(f"movie {movie} was given on line {ids[movie]} already")
        ids[movie] = line.number
        titles.append(_clean(fields[1], line))
    return Catalog.from_ids(np.array(list(ids), np.int64), titles)


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
