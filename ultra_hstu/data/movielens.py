"""MovieLens 100k, 1m and 20m (https://grouplens.org/datasets/movielens)."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ultra_hstu.data.builder import InteractionsBuilder, SourceConfig
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.data.contexts import Contexts
from ultra_hstu.data.delimited import Column, read_table
from ultra_hstu.data.download import Download
from ultra_hstu.data.events import RawEvents
from ultra_hstu.data.item_features import ItemColumn, ItemNumbers, ItemTexts
from ultra_hstu.data.text import Line, lines, records

_log = logging.getLogger(__name__)
_URL = "https://files.grouplens.org/datasets/movielens/"
# The release's two files (ratings, movies), the delimiter of ratings, and whether a header comes
# first.
_FORMATS = {
    "ml-100k": ("u.data", "u.item", "\t", False),
    "ml-1m": ("ratings.dat", "movies.dat", "::", False),
    "ml-20m": ("ratings.csv", "movies.csv", ",", True),
}
_MOVIES_HEADER = ("movieId", "title", "genres")
# The 19 flags at the end of a line of ml-100k, as u.genre numbers them, but for the first, unknown.
_GENRES = (
    "Action|Adventure|Animation|Children's|Comedy|Crime|Documentary|Drama|Fantasy|Film-Noir|Horror|"
    "Musical|Mystery|Romance|Sci-Fi|Thriller|War|Western"
).split("|")
_NO_GENRES = "(no genres listed)"
_YEAR = re.compile(r"\(([0-9]{4})(?:-[0-9]{0,4})?\)\s*$")  # behind a title
_MD5 = {  # published beside each archive (*.zip.md5)
    "ml-100k": "0e33842e24a9c977be4e0107933c0723",
    "ml-1m": "c4d9eecfca2ab87c1945afe126590906",
    "ml-20m": "cd245b17a1ae2cc31bb14903e1204af3",
}
_NUM_USERS = {"ml-100k": 943, "ml-1m": 6040}  # 1, 2, 3, ... of them
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
            release's scale, times outside 1901 to 2106, rated movies that the movies file lacks,
            and features outside the documented values.
    """

    ACTIONS = {"rating": np.float32}
    ITEMS_FILE = "the movies file (a line holds user, movie, rating, time)"
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
            Column.time("timestamp", "s"),
        )
        path = self.raw_dir / ratings
        table = read_table(path, columns, delimiter=delimiter, header=header)
        actions = {"rating": table["rating"].astype(np.float32)}
        where = ((str(path), 2 if header else 1, len(actions["rating"])),)
        events = RawEvents(table["userId"], table["movieId"], table["timestamp"], actions, where)
        _warn_of_the_order(path, self.builder_config.name, events)
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


def _warn_of_the_order(path: Path, release: str, events: RawEvents) -> None:
    """Warns where movies seem to stand in the place of users: both are small integers."""
    users = _NUM_USERS.get(release)
    if users is not None and events.users.max() > users >= events.items.max():
        _log.warning(
            "%s: users go up to %d and movies to %d, but %s has %d users: a line must hold user, "
            "movie, rating, time, in this order",
            path,
            events.users.max(),
            events.items.max(),
            release,
            users,
        )


def read_movies(path: Path) -> Catalog:
    """The catalogue of `movies.dat` (a::b::c), `u.item` (a|b|...) or `movies.csv` (header, quotes).

    Features of a movie are its genres and its year, which stands behind its title. A title that was
    encoded twice ("AmÃ©lie") is repaired with a warning; one with lost characters is an error.
    """
    ids: dict[int, int] = {}
    titles, genres, years = [], [], []
    for line, text, title, of_movie in _movies(path):
        movie = line.integer(text, "movie id", 1)
        if movie in ids:
            raise line.error(f"movie {movie} was given on line {ids[movie]} already")
        ids[movie] = line.number
        titles.append(_clean(title, line))
        genres.append([one for one in of_movie if one != _NO_GENRES])
        year = _YEAR.search(title)
        years.append(float(year[1]) if year else np.nan)
    if not ids:
        raise ValueError(f"{path} has no movies behind its header")
    features: dict[str, ItemColumn] = {
        "genres": ItemTexts.of(genres),
        "year": ItemNumbers.of(np.array(years)),
    }
    return Catalog.from_ids(np.array(list(ids), np.int64), titles, features)


def _movies(path: Path) -> Iterator[tuple[Line, str, str, list[str]]]:
    """The line of each movie, its id, its title and its genres."""
    if path.suffix == ".csv":
        rows = records(path)
        line, names = next(rows)
        if sorted(names) != sorted(_MOVIES_HEADER):
            raise line.error(f"expected the header {','.join(_MOVIES_HEADER)}")
        for line, fields in rows:
            if len(fields) != len(names):
                raise line.error("malformed movie")
            id_, title, genres = (fields[names.index(name)] for name in _MOVIES_HEADER)
            yield line, id_, title, genres.split("|")
        return
    many = path.suffix == ".dat"  # a title may hold this delimiter, an id or genres may not
    for line in lines(path):
        fields = line.text.split("::" if many else "|")
        if len(fields) < 3 if many else len(fields) != 24:
            raise line.error("malformed movie")
        if many:
            yield line, fields[0], "::".join(fields[1:-1]), fields[-1].split("|")
        else:
            flags = zip(_GENRES, fields[6:], strict=True)
            yield line, fields[0], fields[1], [name for name, flag in flags if flag == "1"]


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
