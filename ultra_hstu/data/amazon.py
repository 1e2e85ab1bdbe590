"""Amazon reviews in their three releases, each of many categories, and one prepared set.

Ratings alone (`amazon-2014/Books`) and the 5-core (`amazon-2014/Books/5core`) are read, with titles
and features of the items from the metadata. The releases look alike and differ:

| release | ratings | 5-core | metadata |
|---|---|---|---|
| 2014 | user,item,rating,seconds | JSON lines, with `helpful` | lines of Python, by `asin` |
| 2018 | item,user,rating,seconds | JSON lines, with `verified` | JSON lines, by `asin` |
| 2023 | header; user,item,rating,milliseconds | the same | JSON lines, by `parent_asin` |

Which release a file is of is told by its content, and another one than the source's is refused.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from ultra_hstu.data.delimited import Column, DelimitedFile
from ultra_hstu.data.download import Download
from ultra_hstu.data.public import PublicSet, SetFile
from ultra_hstu.data.table.files import open_file
from ultra_hstu.data.table.source import (
    Record,
    RecordFile,
    Renamed,
    TableSource,
    head,
    json_object,
    literal,
    text_lines,
)
from ultra_hstu.data.text import BLANKS, Line, lines
from ultra_hstu.data.times import EARLY
from ultra_hstu.table_config import TableConfig

# What Amazon's ids look like, in all of its published files.
_USER = re.compile("A[0-9A-Z]{9,}")
_ITEM = re.compile("[0-9]{9}[0-9X]|B[0-9A-Z]{9}")
_PRICE = re.compile(r"\$?([0-9,]*[0-9](?:\.[0-9]+)?)")
_SNAP = "http://snap.stanford.edu/data/amazon/productGraph/categoryFiles/"
_UCSD = "https://mcauleylab.ucsd.edu/public_datasets/data/"
CATEGORIES = {
    "2014": (
        "Amazon_Instant_Video Apps_for_Android Automotive Baby Beauty Books CDs_and_Vinyl "
        "Cell_Phones_and_Accessories Clothing_Shoes_and_Jewelry Digital_Music Electronics "
        "Grocery_and_Gourmet_Food Health_and_Personal_Care Home_and_Kitchen Kindle_Store "
        "Movies_and_TV Musical_Instruments Office_Products Patio_Lawn_and_Garden Pet_Supplies "
        "Sports_and_Outdoors Tools_and_Home_Improvement Toys_and_Games Video_Games"
    ).split(),
    "2018": (
        "AMAZON_FASHION All_Beauty Appliances Arts_Crafts_and_Sewing Automotive Books "
        "CDs_and_Vinyl Cell_Phones_and_Accessories Clothing_Shoes_and_Jewelry Digital_Music "
        "Electronics Gift_Cards Grocery_and_Gourmet_Food Home_and_Kitchen "
        "Industrial_and_Scientific Kindle_Store Luxury_Beauty Magazine_Subscriptions "
        "Movies_and_TV Musical_Instruments Office_Products Patio_Lawn_and_Garden Pet_Supplies "
        "Prime_Pantry Software Sports_and_Outdoors Tools_and_Home_Improvement Toys_and_Games "
        "Video_Games"
    ).split(),
    "2023": (
        "All_Beauty Amazon_Fashion Appliances Arts_Crafts_and_Sewing Automotive Baby_Products "
        "Beauty_and_Personal_Care Books CDs_and_Vinyl Cell_Phones_and_Accessories "
        "Clothing_Shoes_and_Jewelry Digital_Music Electronics Gift_Cards "
        "Grocery_and_Gourmet_Food Handmade_Products Health_and_Household "
        "Health_and_Personal_Care Home_and_Kitchen Industrial_and_Scientific Kindle_Store "
        "Magazine_Subscriptions Movies_and_TV Musical_Instruments Office_Products "
        "Patio_Lawn_and_Garden Pet_Supplies Software Sports_and_Outdoors Subscription_Boxes "
        "Tools_and_Home_Improvement Toys_and_Games Video_Games Unknown"
    ).split(),
}
# Of these, the 5-core is empty.
_NO_CORE = {
    "2023": "Amazon_Fashion Appliances Digital_Music Handmade_Products Health_and_Personal_Care "
    "Subscription_Boxes".split()
}

# --- ratings ---

_RATING = Column("rating", np.float32, 1, 5)
_COLUMNS = {
    "2014": (
        Column("user", np.str_),
        Column("item", np.str_),
        _RATING,
        Column.time("timestamp", "s"),
    ),
    "2018": (
        Column("item", np.str_),
        Column("user", np.str_),
        _RATING,
        Column.time("timestamp", "s"),
    ),
    "2023": (
        Column("user_id", np.str_),
        Column("parent_asin", np.str_),
        _RATING,
        Column.time("timestamp", "ms"),
    ),
}


def _ratings(release: str, path: Path) -> DelimitedFile:
    columns = _COLUMNS[release]
    look = partial(_require_ratings, release)
    return DelimitedFile(path, columns, header=release == "2023", look=look)


def _name(release: str, category: str, core: bool = False) -> str:
    """Of the file of events."""
    names = {
        ("2014", False): f"ratings_{category}.csv",
        ("2014", True): f"reviews_{category}_5.json.gz",
        ("2018", False): f"{category}.csv",
        ("2018", True): f"{category}_5.json.gz",
        ("2023", False): f"{category}.csv.gz",
        ("2023", True): f"{category}.csv.gz",
    }
    return names[release, core]


def _require_ratings(release: str, path: Path) -> None:
    """Raises ValueError for ratings of another release."""
    form = ",".join(column.name for column in _COLUMNS[release])
    some = [[field.strip(BLANKS + '"') for field in row.split(",")] for row in head(path)]
    rows = [row for row in some if len(row) == 4 and row[3].isdecimal()]
    finest = min((int(row[3][:19]) for row in rows), default=0)
    if rows and all(_ITEM.fullmatch(a) and _USER.fullmatch(b) for a, b, *_ in rows):
        found, what = "2018", f"{rows[0][0]!r} is an item of Amazon and {rows[0][1]!r} a user"
        remedy = "or put the user first: awk -F, -v OFS=, '{print $2, $1, $3, $4}'"
    elif finest >= EARLY * 1000:
        found, what = "2023", f"{rows[0][3]} is a time in milliseconds"
        remedy = "or divide times by 1000"
    elif rows and all(_USER.fullmatch(a) and _ITEM.fullmatch(b) for a, b, *_ in rows):
        found, what = "2014", f"{rows[0][0]!r} is a user of Amazon and {rows[0][1]!r} an item"
        what += f", and {rows[0][3]} a time in seconds"
        remedy = "or write the columns as they are there"
    else:
        return
    if found != release:
        category = path.name.removeprefix("ratings_").partition(".")[0]
        raise ValueError(
            f"{path}, line 1: the columns must be {form}, but {what}, here and in the lines that "
            f"follow. This is the release of {found}: read it as --config.data.source=amazon-"
            f"{found}/{category}, whose file is {_name(found, category)}, {remedy}"
        )


# --- reviews ---


def _reviews(release: str, path: Path) -> TableSource:
    """JSON lines of 2014 or 2018. Raises ValueError for reviews of another release."""
    file = open_file(path)
    marks = {"2014": "helpful", "2018": "verified", "2023": "parent_asin"}
    _require_marks(path, "reviews", release, {r: {m} for r, m in marks.items()}, set(file.types))
    names = {"user": "reviewerID", "item": "asin", "rating": "overall"}
    if missing := {*names.values(), "unixReviewTime"} - set(file.types):
        raise ValueError(f"{path}: its reviews lack {', '.join(sorted(missing))}")
    return Renamed(file, {**names, "timestamp": "unixReviewTime"})


def _require_marks(
    path: Path, what: str, release: str, marks: dict[str, set[str]], found: set[str]
) -> None:
    """Raises ValueError where names that only other releases have are there, or none of this."""
    others = [other for other, some in marks.items() if other != release and some & found]
    if marks[release] & found and not others:
        return
    seems = f", and seems to be of the release of {others[0]}" if others else ""
    raise ValueError(
        f"{path} has {', '.join(sorted(found)[:12]) or 'no fields'}, unlike {what} of Amazon's "
        f"release of {release}, which have {', '.join(sorted(marks[release]))}{seems}: give that "
        f"release's file"
    )


# --- metadata ---

_TEXTS = pa.list_(pa.string())
_METADATA: dict[str, dict[str, pa.DataType]] = {
    "2014": {"asin": pa.string(), "title": pa.string(), "brand": pa.string(),
             "categories": _TEXTS, "price": pa.float64()},
    "2018": {"asin": pa.string(), "title": pa.string(), "brand": pa.string(),
             "category": _TEXTS, "price": pa.float64()},
    "2023": {"parent_asin": pa.string(), "title": pa.string(), "main_category": pa.string(),
             "store": pa.string(), "categories": _TEXTS, "price": pa.float64()},
}  # fmt: skip
_NAMES = re.compile(r"""'(\w+)': |"(\w+)": ?""")  # of fields, in Python or in JSON
# Names that items of one release alone have.
_MARKS = {
    "2014": {"salesRank", "imUrl", "related"},
    "2018": {"category", "main_cat", "also_buy", "also_view", "tech1", "imageURL"},
    "2023": {"parent_asin", "main_category", "store", "average_rating", "rating_number"},
}


def _metadata(release: str, path: Path) -> RecordFile:
    types = _METADATA[release]
    # The item stands in the column of that name in ratings.
    key, *_ = types
    item = "parent_asin" if release == "2023" else "item"
    return RecordFile(
        path,
        {item if name == key else name: kind for name, kind in types.items()},
        partial(_products, release, item),
    )


def _products(release: str, item: str, path: Path) -> Iterator[tuple[Line, Record]]:
    """The items of a metadata file, the first of those that come again.

    Raises:
        ValueError: metadata of another release, a line that is no record or has no item.
    """
    found = {name for row in head(path) for names in _NAMES.findall(row) for name in names}
    _require_marks(path, "metadata", release, _MARKS, found)
    parse: Callable[[Line], dict[str, object]] = literal if release == "2014" else json_object
    (key, _), *others = _METADATA[release].items()
    for line in text_lines(path):
        product = parse(line)
        if not isinstance(raw := product.get(key), str) or not raw:
            raise line.error(f"the item has no {key}")
        record: dict[str, object] = {item: raw}
        for name, kind in others:
            value = product.get(name)
            if kind == _TEXTS:
                record[name] = list(dict.fromkeys(_flat(value)))
            elif name == "price":
                record[name] = _price(value)
            else:
                record[name] = value.strip() if isinstance(value, str) else None
        yield line, record


def _flat(value: object) -> Iterator[str]:
    """The texts in lists of lists."""
    if isinstance(value, str):
        if value.strip():
            yield value.strip()
    elif isinstance(value, list):
        for one in value:
            yield from _flat(one)


def _price(value: object) -> float | None:
    """As a number; None for what is none, such as a range."""
    if isinstance(value, int | float):
        return float(value)
    found = _PRICE.fullmatch(value.strip()) if isinstance(value, str) else None
    return float(found[1].replace(",", "")) if found else None


# --- sets ---


def _set(release: str, category: str, core: bool) -> PublicSet:
    folder, meta = _FOLDERS[release], f"meta_{category}.json{'l' if release == '2023' else ''}.gz"
    reviews, name = core and release != "2023", _name(release, category, core)
    events = SetFile(name, partial(_reviews if reviews else _ratings, release))
    names = ("user_id", "parent_asin") if release == "2023" else ("user", "item")
    user, item = names
    _, _, *features = _METADATA[release]
    part = "5-core" if core else "ratings"
    where = folder[core]
    return PublicSet(
        name=f"amazon-{release}/{category}" + ("/5core" if core else ""),
        about=f"Amazon {release}, {category}, {part}: stars; {', '.join(features)} of items",
        events=(events,),
        items=SetFile(meta, partial(_metadata, release), optional=True),
        table=TableConfig(
            user=user,
            item=item,
            time="timestamp",
            time_unit="ms" if release == "2023" else "s",
            actions=("rating",),
            item_title="title",
            item_features=tuple(features),
            unlisted_items="keep",  # the metadata does not have all
        ),
        downloads=tuple(Download(f"{at}{file}") for at, file in ((where, name), (folder[2], meta))),
    )


# Where ratings, the 5-core and metadata are.
_FOLDERS = {
    "2014": (_SNAP, _SNAP, _SNAP),
    "2018": (
        f"{_UCSD}amazon_v2/categoryFilesSmall/",
        f"{_UCSD}amazon_v2/categoryFilesSmall/",
        f"{_UCSD}amazon_v2/metaFiles2/",
    ),
    "2023": (
        f"{_UCSD}amazon_2023/benchmark/0core/rating_only/",
        f"{_UCSD}amazon_2023/benchmark/5core/rating_only/",
        f"{_UCSD}amazon_2023/raw/meta_categories/",
    ),
}
CATEGORY_SETS = tuple(
    _set(release, category, core)
    for release, categories in CATEGORIES.items()
    for category in categories
    for core in (False, True)
    if not (core and category in _NO_CORE.get(release, ()))
)
# Users and items with at least 5 ratings in the file, counted once, then users that still have 5,
# as in HSTU's published code. The catalogue is the items that the first count leaves: 695,762.
BOOKS = PublicSet(
    name="amazon-books",
    about="Amazon 2014, Books, filtered as in HSTU's published code: stars",
    events=(SetFile("ratings_Books.csv", partial(_ratings, "2014")),),
    table=TableConfig(
        user="user",
        item="item",
        time="timestamp",
        time_unit="s",
        actions=("rating",),
        min_item_events=5,
        min_user_events=5,
        catalog="counted",
    ),
    downloads=(Download(f"{_SNAP}ratings_Books.csv"),),
)


def _histories(path: Path) -> Iterator[tuple[Line, Record]]:
    """The events of `Beauty.txt`: a user a line, "user item item ...", ids from 1."""
    users: dict[int, int] = {}
    for line in lines(path):
        user, *history = line.integers("[ \t]+", "user or item id", 1).tolist()
        if not history:
            raise line.error("expected 'user item item ...' separated by blanks")
        if user in users:
            raise line.error(f"user {user} was given on line {users[user]} already")
        users[user] = line.number
        for item in history:
            yield line, {"user": user, "item": item}


# In order of time, without times. An item that comes again is another event: without times it
# cannot be told from a repeated one.
BEAUTY = PublicSet(
    name="amazon-beauty",
    about="Amazon 2014, Beauty, 5-core, as S3-Rec has it: items in order",
    events=(
        SetFile(
            "Beauty.txt",
            lambda path: RecordFile(path, {"user": pa.int64(), "item": pa.int64()}, _histories),
        ),
    ),
    table=TableConfig(
        user="user", item="item", time_unit="none", repeats="keep", catalog="counted"
    ),
    downloads=(
        Download(
            "https://raw.githubusercontent.com/RUCAIBox/CIKM2020-S3Rec/"
            "2a81540ae18615d88ef88227b0c066e5b74781e5/data/Beauty.txt",
            "sha256:226cce9c3105299ca0db9615d7d3fb32b3175e90da43100ae352599f0f0107b8",
        ),
    ),
)
SETS = (*CATEGORY_SETS, BOOKS, BEAUTY)
