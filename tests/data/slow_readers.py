"""What the files of every source mean, in plain Python: a slow definition to test with.

`read` gives what `official_files.read` gives, or raises `Bad` for files that nobody should read.
"""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.data.data_files import KUAIRAND_HEADER, KUAIRAND_USER_HEADER
from tests.data.official_files import Events, Features

SECONDS = range(-(2**31), 2**32)
IDS = range(2**63)
INT32 = range(-(2**31) + 1, 2**31)


class Bad(Exception):
    """A file that must be refused."""


def require(condition: object) -> None:
    if not condition:
        raise Bad


def lines(path: Path) -> list[str]:
    data = path.read_bytes()
    magic = (b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd", b"PAR1")
    require(b"\0" not in data and not data.startswith((*magic, b"\xff\xfe", b"\xfe\xff")))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        require(not data.startswith(b"\xef\xbb\xbf"))
        text = data.decode("latin-1")
    found = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    while found and not found[-1].strip(" \t"):
        found.pop()
    require(found)
    return found


def table(path: Path, separator: str, width: int | None = None) -> list[list[str]]:
    """Fields without the blanks around them."""
    if separator == ",":
        text = "\n".join(lines(path)) + "\n"
        try:
            rows = list(csv.reader(io.StringIO(text), strict=True, skipinitialspace=True))
        except csv.Error:
            raise Bad from None
    else:
        rows = [line.split(separator) for line in lines(path)]
    require(width is None or all(len(row) == width for row in rows))
    return [[field.strip(" \t") for field in row] for row in rows]


def with_header(path: Path, header: str, *, exact: bool = True) -> list[dict[str, str]]:
    names, *rows = table(path, ",")
    wanted = header.split(",")
    require(sorted(names) == sorted(wanted) if exact else set(wanted) <= set(names))
    require(all(len(row) == len(names) for row in rows))
    return [dict(zip(names, row, strict=True)) for row in rows]


def integer(text: str, allowed: range) -> int:
    require(re.fullmatch(r"[ \t]*-?[0-9]{1,256}[ \t]*", text) and int(text) in allowed)
    return int(text)


def number(text: str, low: float, high: float) -> float:
    require(re.fullmatch(r"-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,3})?", text))
    require(low <= float(text) <= high)
    return float(np.float32(text))


def identifier(text: str) -> str:
    require(0 < len(text) <= 256 and not re.search("[\x00-\x1f\x7f]", text))
    return text


def grouped(rows: list[tuple]) -> Events:
    """Of (user, item, time, actions), by user, without repeated events."""
    require(rows)
    found: Events = {}
    seen = set()
    for user, item, time, actions in rows:
        if time is None or (user, item, time) not in seen:
            found.setdefault(user, []).append((item, time, actions))
        seen.add((user, item, time))
    return dict(sorted(found.items()))


def movielens(source: str, folder: Path) -> tuple[Events, Features, dict]:
    titles = dict(movies(source, folder))
    if source == "ml-20m":
        header = "userId,movieId,rating,timestamp"
        rows = [tuple(row[name] for name in header.split(","))
                for row in with_header(folder / "ratings.csv", header)]  # fmt: skip
    else:
        name, separator = ("u.data", "\t") if source == "ml-100k" else ("ratings.dat", "::")
        rows = [tuple(row) for row in table(folder / name, separator, 4)]
    events = []
    for user, movie, rating, time in rows:
        stars = number(rating, 0.5, 5) if source == "ml-20m" else integer(rating, range(1, 6))
        ids = range(1, 2**63)
        events.append((integer(user, ids), integer(movie, ids), integer(time, SECONDS), (stars,)))
    features: Features = {}
    if source == "ml-1m" and (folder / "users.dat").is_file():
        ages = ("1", "18", "25", "35", "45", "50", "56")
        allowed = (("F", "M"), ages, tuple(map(str, range(21))))
        names = ("gender", "age", "occupation")
        features = {name: {} for name in names}
        for user, *values, _ in table(folder / "users.dat", "::", 5):
            key = integer(user, range(1, 2**63))
            require(key not in features["gender"])
            for name, value, known in zip(names, values, allowed, strict=True):
                require(value in known)
                features[name][key] = value
    found = grouped(events)
    require(all(item in titles for rows in found.values() for item, *_ in rows))
    return found, features, {-1: ""} | dict(sorted(titles.items()))


def movies(source: str, folder: Path) -> Iterator[tuple[int, str]]:
    if source == "ml-20m":
        rows = with_header(folder / "movies.csv", "movieId,title,genres")
        rows = [(row["movieId"], row["title"]) for row in rows]
    elif source == "ml-1m":
        parts = [line.split("::") for line in lines(folder / "movies.dat")]
        require(all(len(part) >= 3 for part in parts))
        rows = [(first, "::".join(middle)) for first, *middle, _ in parts]
    else:
        parts = [line.split("|") for line in lines(folder / "u.item")]
        require(all(len(part) == 24 for part in parts))
        require({flag.strip(" \t") for part in parts for flag in part[5:]} <= {"0", "1"})
        rows = [(part[0], part[1]) for part in parts]
    ids = [integer(movie, range(1, 2**63)) for movie, _ in rows]
    require(ids and len(set(ids)) == len(ids))
    for movie, (_, title) in zip(ids, rows, strict=True):
        require("\ufffd" not in title)
        try:
            yield movie, title.encode("latin-1").decode()
        except UnicodeError:
            yield movie, title


def books(folder: Path) -> tuple[Events, Features, dict]:
    rows = []
    for user, item, rating, time in table(folder / "ratings_Books.csv", ",", 4):
        seconds = integer(time, SECONDS)
        rows.append((identifier(user), identifier(item), seconds, (number(rating, 1, 5),)))
    user_like, item_like = r"A[0-9A-Z]{9,}", r"[0-9]{9}[0-9X]|B[0-9A-Z]{9}"
    swapped = [
        re.fullmatch(item_like, user) and re.fullmatch(user_like, item) for user, item, *_ in rows
    ]
    require(not all(swapped[:1000]))
    kept = [(u, *event) for u, events in grouped(rows).items() for event in events]
    for columns in ((0, 1), (0,)):  # users and items at once, then users again
        counts = [[row[c] for row in kept] for c in columns]
        often = [{one for one in ids if ids.count(one) >= 5} for ids in counts]
        kept = [
            row for row in kept
            if all(row[c] in known for c, known in zip(columns, often, strict=True))
        ]  # fmt: skip
    # The catalogue has the items that the first of these leaves.
    return grouped(kept), {}, {}


def beauty(folder: Path) -> tuple[Events, Features, dict]:
    rows, users = [], set()
    for line in lines(folder / "Beauty.txt"):
        user, *items = (
            integer(part, range(1, 2**63)) for part in re.split("[ \t]+", line.strip(" \t"))
        )
        require(items and user not in users)
        users.add(user)
        rows += [(user, item, None, ()) for item in items]
    return grouped(rows), {}, {}


def assistments(folder: Path) -> tuple[Events, Features, dict]:
    rows, learners = [], set()
    for k in range(1, 6):
        of_file = lines(folder / f"fold{k}.csv")
        require(len(of_file) % 4 == 0)
        for at in range(0, len(of_file), 4):
            head, *steps = [line.strip(" \t").split(",") for line in of_file[at : at + 4]]
            require(len(head) == 2)
            learner, _ = (integer(part, IDS) for part in head)
            require(learner not in learners)
            learners.add(learner)
            bounds = (range(1, 2**63), range(1, 2**31), range(2))
            problems, skills, correct = (
                [integer(part, allowed) for part in step]
                for step, allowed in zip(steps, bounds, strict=True)
            )
            require(len(problems) == len(skills) == len(correct))
            rows += [
                (learner, problem, None, (right, skill))
                for problem, skill, right in zip(problems, skills, correct, strict=True)
            ]
    return grouped(rows), {}, {}


def kuairand(folder: Path) -> tuple[Events, Features, dict]:
    rows = []
    names = KUAIRAND_HEADER.split(",")
    flags = {"is_profile_enter", "is_rand", *names[5:12]}
    for dates in ("4_08_to_4_21", "4_22_to_5_08"):
        of_file = with_header(folder / f"log_standard_{dates}_pure.csv", KUAIRAND_HEADER)
        times = [integer(row["time_ms"], range(-(2**63) + 1, 2**63)) for row in of_file]
        require(times and all(time // 1000 in SECONDS for time in times))
        require(not all(abs(time) < 10**11 for time in times))
        for row, time in zip(of_file, times, strict=True):
            allowed = dict.fromkeys(names[5:], INT32) | dict.fromkeys(flags, range(2))
            allowed["tab"] = range(2**31)
            actions = tuple(integer(row[name], allowed[name]) for name in sorted(names[5:]))
            rows.append(
                (integer(row["user_id"], IDS), integer(row["video_id"], IDS), time, actions)
            )
    found = grouped([(user, item, time / 1000, actions) for user, item, time, actions in rows])
    for user, events in found.items():
        events.sort(key=lambda event: event[1])
        found[user] = [(item, int(time // 1), actions) for item, time, actions in events]
    ignored = (
        "user_id",
        *(n for n in KUAIRAND_USER_HEADER.split(",") if re.search("num$|days$", n)),
    )
    named = [name for name in KUAIRAND_USER_HEADER.split(",") if name not in ignored]
    users = with_header(
        folder / "user_features_pure.csv", ",".join(["user_id", *named]), exact=False
    )
    ids = [integer(row["user_id"], IDS) for row in users]
    require(len(set(ids)) == len(ids))
    features = {
        name: {user: row[name] for user, row in sorted(zip(ids, users, strict=True), key=by_id)}
        for name in named
    }
    return found, features, {}


def by_id(pair: tuple[int, dict]) -> int:
    return pair[0]


def of_source(source: str, folder: Path) -> tuple[Events, Features, dict]:
    if source.startswith("ml-"):
        return movielens(source, folder)
    readers = {"amazon-books": books, "amazon-beauty": beauty, "assistments-2017": assistments}
    return readers.get(source, kuairand)(folder)


def read(source: str, folder: Path) -> tuple[Events, Features, dict]:
    """Of users with at least three events, each user's by time."""
    found, features, titles = of_source(source, folder)
    times = [time for events in found.values() for _, time, _ in events if time is not None]
    require(not times or max(times) - min(times) <= 2**31 - 1)
    kept = {
        user: sorted(events, key=lambda event: event[1] or 0)
        for user, events in found.items()
        if len(events) >= 3
    }
    require(kept)
    features = {
        name: {user: of_users.get(user, "") for user in kept} for name, of_users in features.items()
    }
    return kept, features, titles
