"""Public sets that are the only ones of their publishers here: Yambda, Steam, Gowalla."""

import datetime
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from ultra_hstu.data.delimited import Column, DelimitedFile
from ultra_hstu.data.download import Download
from ultra_hstu.data.public import PublicSet, SetFile
from ultra_hstu.data.table.files import open_file
from ultra_hstu.data.table.source import Record, RecordFile, TableSource, Types, literal, text_lines
from ultra_hstu.data.text import Line
from ultra_hstu.table_config import TableConfig

_TEXTS = pa.list_(pa.string())

# --- Yambda ---

_YAMBDA = "https://huggingface.co/datasets/yandex/yambda/resolve/main/"
_EVENT = "uid item_id timestamp is_organic played_ratio_pct event_type".split()


def _plays(path: Path) -> TableSource:
    file = open_file(path)
    if missing := [name for name in _EVENT if name not in file.types]:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}: give multi_event.parquet of the flat form"
        )
    return file


class _Artists:
    """`artist_item_mapping.parquet`, an artist and a track a row, as one row a track."""

    types = {"item_id": pa.int64(), "artist_id": _TEXTS}
    documented: dict[str, tuple[str, ...]] = {}

    def __init__(self, path: Path):
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def batches(self, wanted: Types) -> Iterator[pa.RecordBatch]:
        pairs = pa.parquet.read_table(self.path, columns=["item_id", "artist_id"])
        pairs = pairs.cast(pa.schema([("item_id", pa.int64()), ("artist_id", pa.string())]))
        table = pairs.group_by("item_id", use_threads=False).aggregate([("artist_id", "list")])
        table = table.rename_columns({"artist_id_list": "artist_id"})
        yield from table.select(list(wanted)).to_batches()

    def place(self, row: int) -> str:
        return f"{self.path}, item {row}"


def _yambda(size: str) -> PublicSet:
    """Listens, likes, dislikes and their undoing, in one order. Times count from the set's first
    event, in steps of five seconds; `played_ratio_pct` is above 100 where a user rewound."""
    return PublicSet(
        name=f"yambda-{size}",
        about="Yambda: listens, likes and dislikes of tracks, share that was played; "
        "whether a user found the track alone; artists of tracks",
        events=(SetFile("multi_event.parquet", _plays),),
        items=SetFile("artist_item_mapping.parquet", _Artists, optional=True),
        table=TableConfig(
            user="uid",
            item="item_id",
            time="timestamp",
            time_unit="s",
            actions=("event_type", "played_ratio_pct"),
            features=("is_organic",),
            item_features=("artist_id",),
            unlisted_items="keep",
        ),
        downloads=(
            Download(f"{_YAMBDA}flat/{size}/multi_event.parquet"),
            Download(f"{_YAMBDA}artist_item_mapping.parquet"),
        ),
    )


# --- Steam ---

_STEAM = "https://cseweb.ucsd.edu/~wckang/"
_REVIEW = {
    "username": pa.string(),
    "product_id": pa.string(),
    "date": pa.date32(),
    "hours": pa.float64(),
    "early_access": pa.bool_(),
}
_GAME = {
    "product_id": pa.string(),
    "title": pa.string(),
    "genres": _TEXTS,
    "tags": _TEXTS,
    "developer": pa.string(),
    "publisher": pa.string(),
    "price": pa.float64(),
}


def _reviews(path: Path) -> Iterator[tuple[Line, Record]]:
    """The reviews of `steam_reviews.json.gz`: a dict of Python a line, with days."""
    for line in text_lines(path):
        review = literal(line)
        if missing := [n for n in ("username", "product_id", "date") if not review.get(n)]:
            raise line.error(f"the review has no {', '.join(missing)}")
        try:
            day = datetime.date.fromisoformat(str(review["date"]))
        except ValueError:
            problem = "date must be a day such as 2017-12-31"
            raise line.error(problem, str(review["date"])) from None
        hours, early = review.get("hours"), review.get("early_access")
        yield (
            line,
            {
                "username": str(review["username"]),
                "product_id": str(review["product_id"]),
                "date": day,
                "hours": float(hours) if isinstance(hours, int | float) else None,
                "early_access": early if isinstance(early, bool) else None,
            },
        )


def _games(path: Path) -> Iterator[tuple[Line, Record]]:
    """The games of `steam_games.json.gz`; a few have no id, which no review can name."""
    for line in text_lines(path):
        game = literal(line)
        if not game.get("id"):
            continue
        price = game.get("price")
        record: dict[str, object] = {
            "product_id": str(game["id"]),
            "title": game.get("title") or game.get("app_name"),
            "price": float(price) if isinstance(price, int | float) else None,
        }
        for name in ("genres", "tags"):
            values = game.get(name)
            record[name] = [str(one) for one in values] if isinstance(values, list) else []
        for name in ("developer", "publisher"):
            record[name] = game.get(name) or None
        yield line, {n: str(v) if _GAME[n] == pa.string() and v else v for n, v in record.items()}


STEAM = PublicSet(
    name="steam",
    about="Steam reviews (2018): hours played, early access; genres, tags, developer, publisher "
    "and price of games",
    events=(SetFile("steam_reviews.json.gz", lambda path: RecordFile(path, _REVIEW, _reviews)),),
    items=SetFile("steam_games.json.gz", lambda path: RecordFile(path, _GAME, _games), True),
    table=TableConfig(
        user="username",
        item="product_id",
        time="date",
        actions=("hours",),
        features=("early_access",),
        item_title="title",
        item_features=tuple(name for name in _GAME if name not in ("product_id", "title")),
        unlisted_items="keep",
    ),
    downloads=(
        Download(f"{_STEAM}steam_reviews.json.gz"),
        Download(f"{_STEAM}steam_games.json.gz"),
    ),
)

# --- Gowalla ---

_CHECK_INS = (
    Column("user", np.int64),
    Column("time", np.str_),  # 2010-10-19T23:55:27Z
    Column("latitude", np.float64, -1000, 1000),  # a few are no latitudes
    Column("longitude", np.float64, -1000, 1000),
    Column("location", np.int64),
)
GOWALLA = PublicSet(
    name="gowalla",
    about="Gowalla (SNAP): check-ins of users at locations; latitude and longitude",
    events=(
        SetFile(
            "loc-gowalla_totalCheckins.txt.gz",
            partial(DelimitedFile, columns=_CHECK_INS, delimiter="\t"),
        ),
    ),
    table=TableConfig(
        user="user",
        item="location",
        time="time",
        actions=("latitude", "longitude"),
    ),
    downloads=(Download("https://snap.stanford.edu/data/loc-gowalla_totalCheckins.txt.gz"),),
)
SETS = (*(_yambda(size) for size in ("50m", "500m", "5b")), STEAM, GOWALLA)
