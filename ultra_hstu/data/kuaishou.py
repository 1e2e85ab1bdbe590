"""KuaiRand (https://kuairand.com) and KuaiRec (https://kuairec.com): short videos, with many kinds
of feedback."""

import ast
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from ultra_hstu.data.delimited import Column, DelimitedFile
from ultra_hstu.data.download import Download
from ultra_hstu.data.public import PublicSet, SetFile
from ultra_hstu.data.table.source import Record, RecordFile
from ultra_hstu.data.text import MAX_ID, Line, records
from ultra_hstu.table_config import TableConfig

_INT32 = 2**31 - 1
_FLAGS = "is_click is_like is_follow is_comment is_forward is_hate long_view".split()
_LOG = (
    Column("user_id", np.int64),
    Column("video_id", np.int64),
    *Column.skipped("date", "hourmin"),
    Column.time("time_ms", "ms"),
    *(Column(name, np.int32, 0, 1) for name in _FLAGS),
    *(
        Column(name, np.int32, -_INT32, _INT32)  # the publisher states no range
        for name in ("play_time_ms", "duration_ms", "profile_stay_time", "comment_stay_time")
    ),
    Column("is_profile_enter", np.int32, 0, 1),
    Column("is_rand", np.int32, 0, 1),
    Column("tab", np.int32, 0, _INT32),  # the scenario
)
_DATES = ("4_08_to_4_21", "4_22_to_5_08")
_PARTS = {"Pure": ("",), "1K": ("",), "27K": ("_part1", "_part2")}  # of the logs of some dates
# The categorical columns of user_features*.csv; the others are the numbers that the ranges are made
# from. An empty field is unknown.
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
_USERS = (
    Column("user_id", np.int64),
    *(Column(name, np.str_, empty=True) for name in CONTEXTS),
)
_TEXTS = pa.list_(pa.string())
_VIDEO_TEXTS = ("author_id", "video_type", "upload_type", "music_id", "music_type")


def _users(name: str) -> SetFile:
    return SetFile(name, partial(DelimitedFile, columns=_USERS, header=True, others=True), True)


def _videos(path: Path) -> Iterator[tuple[Line, Record]]:
    """The videos of `video_features_basic_*.csv`; a video may have several tags."""
    header: list[str] = []
    for line, fields in records(path):
        if not header:
            header = fields
            if missing := [n for n in ("video_id", *_VIDEO_TEXTS, "tag") if n not in header]:
                raise line.error(f"the header lacks {', '.join(missing)}")
            continue
        if len(fields) != len(header):
            raise line.error(f"expected {len(header)} fields, found {len(fields)}")
        row = dict(zip(header, fields, strict=True))
        # Numbers that some rows lack are written as floats.
        yield (
            line,
            {
                "video_id": line.integer(row["video_id"], "video_id"),
                **{name: row[name].removesuffix(".0") or None for name in _VIDEO_TEXTS},
                "tag": [tag.strip() for tag in row["tag"].split(",") if tag.strip()],
            },
        )


def _kuairand(size: str, parts: tuple[str, ...]) -> PublicSet:
    """The standard logs, without those of randomly exposed videos.

    Ids count from 0. Every event is kept, whatever the user did. Events are ordered by the
    millisecond. The catalogue is the videos of the logs.
    """
    low = size.lower()
    kinds = {"video_id": pa.int64(), **dict.fromkeys(_VIDEO_TEXTS, pa.string()), "tag": _TEXTS}
    # 27K splits the videos into three files, whose columns could not be confirmed: none is read.
    videos = SetFile(
        f"video_features_basic_{low}.csv",
        lambda path: RecordFile(path, kinds, _videos),
        optional=True,
    )
    return PublicSet(
        name=f"kuairand-{low}",
        about="KuaiRand: clicks, likes, watch times and more; scenario; features of users"
        + ("" if size == "27K" else " and of videos"),
        events=tuple(
            SetFile(
                f"log_standard_{dates}_{low}{part}.csv",
                partial(DelimitedFile, columns=_LOG, header=True),
            )
            for dates in _DATES
            for part in parts
        ),
        items=None if size == "27K" else videos,
        users=_users(f"user_features_{low}.csv"),
        table=TableConfig(
            user="user_id",
            item="video_id",
            time="time_ms",
            time_unit="ms",
            actions=tuple(column.name for column in _LOG[5:-1]),
            features=("tab",),
            item_features=() if size == "27K" else (*_VIDEO_TEXTS, "tag"),
            unlisted_items="keep",
            catalog="counted",
        ),
        downloads=(Download(f"https://zenodo.org/records/10439422/files/KuaiRand-{size}.tar.gz"),),
    )


def _categories(path: Path) -> Iterator[tuple[Line, Record]]:
    """The videos of `item_categories.csv`: video_id,feat, where feat is a list such as [27, 9]."""
    rows = records(path)
    line, names = next(rows)
    if names != ["video_id", "feat"]:
        raise line.error("expected the header video_id,feat")
    for line, fields in rows:
        try:
            video, feat = fields
            kinds = [str(int(one)) for one in ast.literal_eval(feat)]
        except (ValueError, SyntaxError, TypeError):
            raise line.error("expected a video and a list of its categories") from None
        yield line, {"video_id": line.integer(video, "video_id"), "feat": kinds}


def _kuairec(name: str, matrix: str) -> PublicSet:
    """A matrix of KuaiRec 2.0. A view without a time, which the small one has, is left out."""
    columns = (
        Column("user_id", np.int64),
        Column("video_id", np.int64),
        Column("play_duration", np.int32, 0, _INT32),
        Column("video_duration", np.int32, 0, _INT32),
        *Column.skipped("time", "date"),
        Column("timestamp", np.float64, -MAX_ID, MAX_ID, "s", empty=True),
        Column("watch_ratio", np.float32, 0, 1e9),
    )
    return PublicSet(
        name=name,
        about=f"KuaiRec 2.0, {matrix}: watch ratios; categories of videos; features of users",
        events=(SetFile(f"{matrix}.csv", partial(DelimitedFile, columns=columns, header=True)),),
        items=SetFile(
            "item_categories.csv",
            lambda path: RecordFile(path, {"video_id": pa.int64(), "feat": _TEXTS}, _categories),
        ),
        users=_users("user_features.csv"),
        table=TableConfig(
            user="user_id",
            item="video_id",
            time="timestamp",
            time_unit="s",
            actions=("play_duration", "watch_ratio"),
            features=("video_duration",),
            item_features=("feat",),
            missing="drop",
        ),
        downloads=(
            Download(  # the checksum that Zenodo shows
                "https://zenodo.org/records/18164998/files/KuaiRec.zip",
                "md5:261550d472c48eff4990fb13c0e5bcf7",
            ),
        ),
    )


SETS = (
    *(_kuairand(size, parts) for size, parts in _PARTS.items()),
    _kuairec("kuairec", "big_matrix"),
    _kuairec("kuairec-small", "small_matrix"),
)
