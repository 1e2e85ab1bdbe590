"""KuaiRand (https://kuairand.com), Pure, 1K and 27K: short videos with many kinds of feedback."""

import numpy as np

from ultra_hstu.data.builder import InteractionsBuilder, SourceConfig
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.data.contexts import Contexts
from ultra_hstu.data.delimited import Column, read_table
from ultra_hstu.data.download import Download
from ultra_hstu.data.events import RawEvents
from ultra_hstu.data.text import records

_INT32 = 2**31 - 1
_COLUMNS = (
    Column("user_id", np.int64),
    Column("video_id", np.int64),
    Column("date", None),
    Column("hourmin", None),
    Column.time("time_ms", "ms"),
    *(
        Column(name, np.int32, 0, 1)
        for name in (
            "is_click",
            "is_like",
            "is_follow",
            "is_comment",
            "is_forward",
            "is_hate",
            "long_view",
        )
    ),
    *(
        Column(name, np.int32, -_INT32, _INT32)  # the publisher states no range
        for name in ("play_time_ms", "duration_ms", "profile_stay_time", "comment_stay_time")
    ),
    Column("is_profile_enter", np.int32, 0, 1),
    Column("is_rand", np.int32, 0, 1),
    Column("tab", np.int32, 0, _INT32),
)
_DATES = ("4_08_to_4_21", "4_22_to_5_08")
_PARTS = {"Pure": ("",), "1K": ("",), "27K": ("_part1", "_part2")}  # of the logs of some dates
# The categorical columns of user_features_*.csv; the others are user_id and the numbers that the
# ranges are made from.
CONTEXTS = (
    "user_active_degree",
    "is_lowactive_period",
    "is_live_streamer",
    "is_video_author",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
    *(f"onehot_feat{k}" for k in range(18)),
)


class KuaiRand(InteractionsBuilder):
    """The standard logs (`log_standard_*.csv`), without those of randomly exposed videos.

    Ids count from 0. Every event is kept, whatever the user did: its feedback are the actions, all
    int32 (flags 0 or 1, times in milliseconds, `tab` the scenario). Events are ordered by the
    millisecond; timestamps are whole seconds. The catalogue is the videos of the logs. 27K has 322
    million events: building it takes about 100 GB of memory. The users' features are the
    categorical columns of `user_features_*.csv`; an empty field is unknown.
    """

    TICKS = 1000
    ACTIONS = {column.name: np.int32 for column in _COLUMNS[5:]}
    BUILDER_CONFIGS = [
        SourceConfig(
            name=f"kuairand-{size.lower()}",
            description=f"KuaiRand-{size}: users, videos, feedback, times",
            files=tuple(
                f"log_standard_{dates}_{size.lower()}{part}.csv"
                for dates in _DATES
                for part in parts
            ),
            context_files=(f"user_features_{size.lower()}.csv",),
            downloads=(
                Download(f"https://zenodo.org/records/10439422/files/KuaiRand-{size}.tar.gz"),
            ),
        )
        for size, parts in _PARTS.items()
    ]

    def read(self) -> tuple[RawEvents, Catalog]:
        paths = [self.raw_dir / name for name in self.builder_config.files]
        tables = [read_table(path, _COLUMNS, header=True) for path in paths]
        where = tuple(
            (str(path), 2, len(table["time_ms"])) for path, table in zip(paths, tables, strict=True)
        )
        joined = {
            name: np.concatenate([table.pop(name) for table in tables]) for name in tuple(tables[0])
        }
        users, videos, times = (joined.pop(name) for name in ("user_id", "video_id", "time_ms"))
        events = RawEvents(users, videos, times, joined, where).without_duplicates()
        return events, Catalog.from_ids(np.unique(videos))

    def read_contexts(self) -> Contexts:
        path = self.raw_dir / self.builder_config.context_files[0]
        if not path.is_file():
            return Contexts()
        users: list[int] = []
        columns: dict[str, list[str]] = {name: [] for name in CONTEXTS}
        header: list[str] = []
        for line, fields in records(path):  # ranges hold commas, and stand in quotes
            if line.number == 1:
                header = fields
                if missing := [name for name in ("user_id", *CONTEXTS) if name not in header]:
                    raise line.error(f"the header lacks {', '.join(missing)}")
                continue
            if len(fields) != len(header):
                raise line.error(f"expected {len(header)} fields, found {len(fields)}")
            row = dict(zip(header, fields, strict=True))
            users.append(line.integer(row["user_id"], "user_id"))
            for name in CONTEXTS:
                columns[name].append(row[name])
        return Contexts.read(path, 2, np.array(users, np.int64), columns)
