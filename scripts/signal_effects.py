"""What each signal is worth, on logs in KuaiRand's format where that is known beforehand.

python -m scripts.signal_effects --workdir=runs/signals
    --record=experiments/results/signal_effects.json [--users=400] [--events=40] [--seeds=42,43,44]

A user has three hidden traits, each one way or the other. They decide how likely a click is. Each
shows in one signal alone: likes (explicit), watch times (implicit), comments (explicit). So the
lowest possible NE of clicks is known, with all signals and without each. kuairand_rank_ultra, made
small, is trained on the logs with all signals, without each, and without any. Fifteen runs are
predicted to take `10 minutes` of two CPU cores; those that are done are not trained again.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags
from jaxtyping import Float

from experiments import command, configs
from experiments.record import Json
from scripts import ablation
from ultra_hstu import report
from ultra_hstu.config import Config
from ultra_hstu.data.interactions import load_interactions
from ultra_hstu.fields import changed
from ultra_hstu.model_config import ChannelConfig

FLAGS = flags.FLAGS

HEADER = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,"
    "is_hate,long_view,play_time_ms,duration_ms,profile_stay_time,comment_stay_time,"
    "is_profile_enter,is_rand,tab"
)
# What a trait adds to the logit of a click, one way; the other way it takes away as much.
EFFECTS = {"is_like": 1.6, "watch_time": 1.2, "is_comment": 0.8}
ALL, NONE = "ultra", "without_any"
VIDEOS = 50


class Known(NamedTuple):
    """The lowest NE of clicks on average: of users drawn so, by who knows all their traits but one.

    Attributes:
      whole: with all signals.
      without: by the signal that is not read.
    """

    whole: float
    without: dict[str, float]


def write_logs(folder: Path, *, users: int, events: int, seed: int = 0) -> Known:
    """Writes the two logs of kuairand-1k, half of each user's events in each."""
    rng = np.random.default_rng(seed)
    trait_U3 = rng.integers(0, 2, (users, len(EFFECTS)))
    click_U = _clicks(trait_U3)
    first = 1_650_000_000_000
    logs: list[list[str]] = [[HEADER], [HEADER]]
    for user in range(users):
        like, watch, comment = np.where(trait_U3[user], 0.9, 0.1)
        for event in range(events):
            columns = dict.fromkeys(HEADER.split(","), 0) | {
                "user_id": user,
                "video_id": int(rng.integers(VIDEOS)),
                "date": 20220415,
                "hourmin": 1200,
                "time_ms": first + 60_000 * (users * event + user),
                "is_click": int(rng.random() < click_U[user]),
                "is_like": int(rng.random() < like),
                "is_follow": int(rng.random() < 0.5),  # says nothing
                "is_comment": int(rng.random() < comment),
                # Eight times as long, more or less: a trait shows in no single event.
                "play_time_ms": int(4000 * 8 ** (rng.random() < watch) * rng.lognormal(0, 0.5)),
                "duration_ms": 60_000,
            }
            logs[2 * event >= events].append(",".join(map(str, columns.values())))
    folder.mkdir(parents=True, exist_ok=True)
    for dates, lines in zip(("4_08_to_4_21", "4_22_to_5_08"), logs, strict=True):
        (folder / f"log_standard_{dates}_1k.csv").write_text("\n".join(lines) + "\n")
    return known(trait_U3)


def known(trait_U3: np.ndarray) -> Known:
    """What can be reached for users with these traits."""
    click_U = _clicks(trait_U3)
    base = _entropy(click_U, np.full_like(click_U, click_U.mean()))
    without = {}
    for place, name in enumerate(EFFECTS):
        one, other = trait_U3.copy(), trait_U3.copy()
        one[:, place], other[:, place] = 0, 1
        without[name] = _entropy(click_U, (_clicks(one) + _clicks(other)) / 2) / base
    return Known(_entropy(click_U, click_U) / base, without)


def _clicks(trait_U3: np.ndarray) -> Float[np.ndarray, " U"]:
    """How likely a click is."""
    logit_U = (2 * trait_U3 - 1) @ np.array(list(EFFECTS.values()))
    return 1 / (1 + np.exp(-logit_U))


def _entropy(click_U: Float[np.ndarray, " U"], said_U: Float[np.ndarray, " U"]) -> float:
    """The log loss of predictions, in expectation."""
    return float(-np.mean(click_U * np.log(said_U) + (1 - click_U) * np.log(1 - said_U)))


def study(raw_dir: Path, data_dir: Path, *, events: int) -> Config:
    """kuairand_rank_ultra at a size for a CPU. No channel may show what a missing signal says."""
    channels = {
        "shown": ChannelConfig(
            max_history=events, layers=2, truncate_after=1, truncate_length=events // 2
        ),
        "followed": ChannelConfig("is_follow", 1.0, max_history=events // 2, layers=1, width=16),
    }
    return changed(
        configs.named("kuairand_rank_ultra"),
        name="signal_effects",
        data={
            "raw_dir": str(raw_dir),
            "data_dir": str(data_dir),
            "max_history": events,
            "batch_users": 32,
        },
        model={
            "width": 32,
            "qk_width": 16,
            "v_width": 16,
            "dtype": "float32",
            "window": (events // 4,),
            "full_rows": (events // 8,),
            "truncate_after": None,
            "truncate_length": None,
            "channels": channels,
            "divide_by": "length",
            "implementation": "reference",
        },
        rank={
            "tasks": ("is_click",),
            "signals": tuple(EFFECTS),
            "features": (),
            "contextual": (),
            "targets": 8,
            "head_width": 32,
        },
        optim={"learning_rate": 3e-3},
        train={"epochs": 8, "patience": 3},
    )


def variants(config: Config) -> dict[str, Config]:
    """All signals, without each, without any."""
    names = config.rank.signals
    few = {f"without_{name}": tuple(one for one in names if one != name) for name in names}
    return {ALL: config} | {
        name: changed(config, rank={"signals": signals})
        for name, signals in (few | {NONE: ()}).items()
    }


def main(_: list[str]) -> None:
    folder, events = Path(FLAGS.workdir), FLAGS.events
    best = write_logs(folder / "raw", users=FLAGS.users, events=events)
    config = study(folder / "raw", folder / "data", events=events)
    about: Json = {"users": FLAGS.users, "events": events, "known": best._asdict()}
    ablation.run(
        variants(config),
        load_interactions(config.data),
        [int(seed) for seed in FLAGS.seeds],
        folder / "runs",
        FLAGS.record,
        report.make_console(),
        about=about,
    )


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "runs/signals", "folder of the logs and the runs")
    flags.DEFINE_integer("users", 400, "users")
    flags.DEFINE_integer("events", 40, "events of each")
    flags.DEFINE_list("seeds", ["42", "43", "44"], "each variant is trained once with each")
    command.define_record()
    command.run(main)
