"""Writes small files in the official formats, for tests."""

import zipfile
from pathlib import Path

from ultra_hstu.config import DataConfig
from ultra_hstu.data.interactions import Interactions, load_interactions

ML1M_RATINGS = [
    "1::10::5::100",
    "1::30::3::90",
    "1::20::4::100",
    "2::30::1::70",
    "2::10::2::60",
    "2::20::3::80",
]
ML1M_MOVIES = [
    "10::Heat (1995)::Crime",
    "20::Misérables, Les (1995)::Drama|Musical",
    "30::M::A::S::H::War",
    "40::Ran::War",
]
ML1M_USERS = ["1::F::1::10::48067", "2::M::56::16::70072-1234", "3::M::25::0::55117"]
KUAIRAND_USER_HEADER = (
    "user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author,follow_user_num,follow_user_num_range,"
    "fans_user_num,fans_user_num_range,friend_user_num,friend_user_num_range,register_days,register_days_range,"
    + ",".join(f"onehot_feat{k}" for k in range(18))
)
KUAIRAND_HEADER = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
)


def write(path: Path, lines: list[str], encoding: str = "utf-8", end: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(("\n".join(lines) + end).encode(encoding))
    return path


def ml1m(folder: Path, ratings=ML1M_RATINGS, movies=ML1M_MOVIES, users=()) -> Path:
    """Without users there is no users.dat."""
    write(folder / "ratings.dat", list(ratings), "latin-1")
    if users:
        write(folder / "users.dat", list(users))
    write(folder / "movies.dat", list(movies), "latin-1")
    return folder


def ml1m_zip(path: Path, folder: Path) -> Path:
    ml1m(folder, users=ML1M_USERS)
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("ratings.dat", "movies.dat", "users.dat"):
            archive.write(folder / name, f"ml-1m/{name}")
    return path


def kuairand_line(user: int, video: int, time_ms: int, **actions: int) -> str:
    names = KUAIRAND_HEADER.split(",")
    values = dict.fromkeys(names, 0) | {
        "user_id": user,
        "video_id": video,
        "date": 20220408,
        "hourmin": 1200,
    }
    return ",".join(str(value) for value in (values | {"time_ms": time_ms} | actions).values())


def kuairand_user(user: int, **features: str) -> str:
    values = dict.fromkeys(KUAIRAND_USER_HEADER.split(","), "0") | {"user_id": str(user)} | features
    return ",".join(f'"{value}"' if "," in value else value for value in values.values())


def load(tmp_path: Path, source: str, raw_dir: Path | None = None, **options) -> Interactions:
    config = DataConfig(
        source=source,
        raw_dir=None if raw_dir is None else str(raw_dir),
        data_dir=str(tmp_path / "prepared"),
        **options,
    )
    return load_interactions(config)
