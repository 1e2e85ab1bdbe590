"""A small set of files of every source, in its publisher's format, and what reading them gives."""

import itertools
from pathlib import Path

from tests.data.data_files import (
    KUAIRAND_HEADER,
    KUAIRAND_USER_HEADER,
    ML1M_MOVIES,
    ML1M_USERS,
    kuairand_line,
    kuairand_user,
)
from ultra_hstu.config import DataConfig
from ultra_hstu.data.sources import PUBLIC
from ultra_hstu.data.table import prepared

_REST = "|01-Jan-1995||http://example" + "|0" * 19
_KUAIRAND = [
    kuairand_line(user, video, 1_650_000_000_000 + 61_003 * event, is_click=event % 2, tab=event)
    for event, (user, video) in enumerate([(0, 5), (1, 0), (0, 7), (0, 5), (1, 7), (1, 5)])
]
# The files of each source, by name; their lines.
OFFICIAL: dict[str, dict[str, list[str]]] = {
    "ml-100k": {
        "u.data": [
            f"{user}\t{movie}\t{1 + (user + movie) % 5}\t{881250000 + 61 * user * movie}"
            for user in (1, 7, 943)
            for movie in (3, 1, 2)
        ],
        "u.item": [f"{movie}|{title}{_REST}" for movie, title in enumerate("ABC", 1)],
    },
    "ml-1m": {
        "ratings.dat": [
            f"{user}::{movie}::{1 + (user + movie) % 5}::{978300000 + 61 * user * movie}"
            for user in (1, 2, 3)
            for movie in (30, 10, 20)
        ],
        "movies.dat": ML1M_MOVIES,
        "users.dat": ML1M_USERS,
    },
    "ml-20m": {
        "ratings.csv": [
            "userId,movieId,rating,timestamp",
            *(
                f"{user},{movie},{(1 + (user + movie) % 10) / 2},{1112486027 + 61 * user * movie}"
                for user in (1, 2, 3)
                for movie in (5, 6, 8)
            ),
        ],
        "movies.csv": [
            "movieId,title,genres",
            '5,"American ""President"", The (1995)",Comedy',
            "6,Amélie,Drama",
            '8,"Grand Nights\nLive (1998)",(no genres listed)',
        ],
    },
    "amazon-books": {
        "ratings_Books.csv": [
            f"A{user:013},{1000000000 + item},{1 + (user + item) % 5}.0,{1300000000 + 86400 * item}"
            for user in range(1, 7)
            for item in range(1, 7)
        ]
    },
    "amazon-beauty": {"Beauty.txt": ["1 1 2 3 2", "2 4 1 5", "30 2 1 5 1"]},
    "assistments-2017": {
        f"fold{k}.csv": [f"{k},{900 + k}", "7,7,3000000000", "2,2,5", "0,1,1"] for k in range(1, 6)
    },
    "kuairand-pure": {
        "log_standard_4_08_to_4_21_pure.csv": [KUAIRAND_HEADER, *_KUAIRAND[:4]],
        "log_standard_4_22_to_5_08_pure.csv": [KUAIRAND_HEADER, *_KUAIRAND[4:]],
        "user_features_pure.csv": [
            KUAIRAND_USER_HEADER,
            kuairand_user(0, user_active_degree="full_active", follow_user_num_range="(0,10]"),
            kuairand_user(1, user_active_degree="", follow_user_num_range="500+"),
        ],
    },
}
# By user, the events in order: raw item, seconds, actions; and by feature of users, their texts.
Events = dict[int | str, list[tuple[int | str, int | None, tuple[float, ...]]]]
Features = dict[str, dict[int | str, str]]


def official(source: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in OFFICIAL[source].items():
        (folder / name).write_bytes(("\n".join(lines) + "\n").encode())
    return folder


def read(source: str, folder: Path) -> tuple[Events, Features, dict[int | str, str]]:
    """What a set holds before it is written, of users with three events or more: events, features
    of users, and titles by item."""
    opened = PUBLIC[source].open(DataConfig(source=source, raw_dir=str(folder)))
    data, contexts, _ = prepared.read(opened)
    items = data.catalog.decode(data.items).tolist()
    times = [None] * len(items) if data.timestamps is None else data.timestamps.tolist()
    columns = [data.actions[name].tolist() for name in sorted(data.actions)]
    actions = list(zip(*columns, strict=True)) if columns else [()] * len(items)
    events = list(zip(items, times, actions, strict=True))
    users = data.users.tolist()
    found = {
        user: events[first:last]
        for user, (first, last) in zip(users, itertools.pairwise(data.offsets), strict=True)
    }
    features = {
        name: {
            user: contexts.values[name][code]
            for user, code in zip(users, codes.tolist(), strict=True)
        }
        for name, codes in contexts.of(data.users).items()
    }
    titles = dict(zip(data.catalog.raw_ids.tolist(), data.catalog.titles or (), strict=False))
    return found, features, titles
