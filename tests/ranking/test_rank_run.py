"""Ranking runs by the command lines, from files in the publishers' formats to a result.

A killed run goes on as if it had not been killed.
"""

import contextlib
import dataclasses
import json
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments import configs
from scripts import ablation
from scripts.signal_effects import EFFECTS, write_logs
from tests import commands
from tests.data.data_files import (
    KUAIRAND_HEADER,
    KUAIRAND_USER_HEADER,
    kuairand_line,
    kuairand_user,
    write,
)
from tests.ranking import rank_data
from tests.small_run import with_
from ultra_hstu import signals, tasks
from ultra_hstu.checkpoint import Checkpoints, abstract
from ultra_hstu.data.interactions import load_interactions
from ultra_hstu.fields import changed
from ultra_hstu.ranking.task import RankingTask
from ultra_hstu.run import Interrupted
from ultra_hstu.serving.schema import ScoreRequest
from ultra_hstu.serving.service import ServingOptions, open_service
from ultra_hstu.train import train

ROOT = Path(__file__).parents[2]
NAMES = [
    f"{source}_rank_{kind}"
    for source in ("assistments", "ml1m", "kuairand")
    for kind in ("hstu", "ultra")
] + ["assistments_rank_din", "ml1m_rank_din"]


def assistments(folder: Path, learners=10, steps=20) -> Path:
    """Learners who answer right when problem and learner add up to an even number."""
    rng = np.random.default_rng(0)
    for fold in range(5):
        lines = []
        for learner in range(fold * learners // 5 + 1, (fold + 1) * learners // 5 + 1):
            problems = rng.integers(1, 9, steps)
            right = (problems + learner) % 2
            lines += [
                f"{learner},{steps}",
                *(",".join(map(str, column)) for column in (problems, problems % 3 + 1, right)),
            ]
        write(folder / f"fold{fold + 1}.csv", lines)
    return folder


def ml1m(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    movies = [f"{m}::Movie {m} (1999)::Drama" for m in range(1, 13)]
    ratings = [
        f"{u}::{rng.integers(1, 13)}::{rng.integers(1, 6)}::{1000 * u + 7 * i}"
        for u in range(1, 9)
        for i in range(12)
    ]
    write(folder / "ratings.dat", ratings)
    write(folder / "movies.dat", movies)
    write(
        folder / "users.dat",
        [f"{u}::{'MF'[u % 2]}::{(1, 18, 25)[u % 3]}::{u % 5}::12345" for u in range(1, 9)],
    )
    return folder


def kuairand(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    lines = [
        kuairand_line(
            u, int(rng.integers(0, 9)), 165 * 10**10 + 10**6 * (100 * u + i),
            is_click=int(rng.integers(0, 2)), long_view=int(rng.integers(0, 2)),
            is_like=int(rng.integers(0, 2)), play_time_ms=int(rng.integers(0, 9000)),
            duration_ms=int(rng.integers(0, 3)) * 4000, tab=u % 2,
        )
        for u in range(1, 9)
        for i in range(12)
    ]  # fmt: skip
    for number, part in enumerate(("4_08_to_4_21_1k", "4_22_to_5_08_1k")):
        write(folder / f"log_standard_{part}.csv", [KUAIRAND_HEADER, *lines[number::2]])
    write(
        folder / "user_features_1k.csv",
        [
            KUAIRAND_USER_HEADER,
            *(kuairand_user(u, register_days_range=f"{u % 3}+") for u in range(1, 9)),
        ],
    )
    return folder


def shrunk(name, tmp_path):
    """A configuration of the repository at a size for tests, on files of its source's format."""
    config = configs.named(name)
    make = {"assistments": assistments, "ml1m": ml1m, "kuairand": kuairand}[name.split("_")[0]]
    channels = {
        key: dataclasses.replace(channel, max_history=6, layers=2 + (channel.layers > 3))
        for key, channel in config.model.channels.items()
    }
    shorter = {"model__truncate_after": 1, "model__truncate_length": 3}
    shorter |= {"model__window": (2,), "model__full_rows": (1,)}
    return with_(
        config,
        data__raw_dir=str(make(tmp_path / "raw")), data__data_dir=str(tmp_path / "data"),
        data__max_history=6, data__batch_users=4,
        model__width=8, model__qk_width=4, model__v_width=4, model__layers=2,
        model__dtype="float32", model__channels=channels,
        rank__targets=2, rank__head_width=8, rank__test_fraction=0.2, rank__validation_fraction=0.2,
        train__epochs=1, train__eval_users=8, train__steps_per_call=2,
        **(shorter if config.model.channels else {}),
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_ranking_configuration_fits_its_data(name, tmp_path):
    """A step and a prediction are traced, with all the options of the file but its sizes."""
    task = tasks.load(shrunk(name, tmp_path))
    assert isinstance(task, RankingTask) and task.flops("test").inference > 0
    loader = task.loader("train", batch_users=4, steps_per_call=2)
    batch = next(iter(loader.groups(loader.plan()))).feed.batch(0)
    state, metrics = jax.eval_shape(lambda: task.recipe.step(task.recipe.init(0), batch))
    logits = jax.eval_shape(task.recipe.logits, state.params, batch)
    assert logits.shape == batch.label_PK.shape == (8, len(task.config.rank.tasks))


def test_the_command_line_trains_records_and_serves(tmp_path):
    """KuaiRand's logs to scores, on users whose likes, watch times and comments foretell clicks.

    Without any of these signals the NE that is reached cannot be reached.
    """
    record, events = tmp_path / "record.json", 20
    known = write_logs(tmp_path / "raw", users=90, events=events)
    options = {
        "data.raw_dir": tmp_path / "raw", "data.data_dir": tmp_path / "data",
        "data.batch_users": 16, "optim.learning_rate": 1e-2,
        "model.width": 16, "model.qk_width": 8, "model.v_width": 8, "model.dtype": "float32",
        "model.implementation": "reference", "model.divide_by": "length",
        "model.truncate_after": None, "model.truncate_length": None,
        "model.channels.shown.layers": 2, "model.channels.shown.max_history": events,
        "model.channels.shown.truncate_after": 1, "model.channels.shown.truncate_length": 16,
        "model.channels.clicked.signal": "is_follow", "model.channels.clicked.layers": 1,
        "model.channels.clicked.max_history": 8, "model.channels.clicked.width": 8,
        "rank.tasks": ("is_click",), "rank.signals": tuple(EFFECTS), "rank.contextual": (),
        "rank.features": (), "rank.targets": 4, "rank.head_width": 16, "rank.positions": "forwards",
        "train.epochs": 12, "train.eval_users": 32,
    }  # fmt: skip
    done = commands.run(
        "experiments.train",
        f"--config={ROOT}/experiments/configs/kuairand_rank_ultra.py",
        f"--workdir={tmp_path / 'run'}",
        "--seeds=1",
        f"--record={record}",
        *(f"--config.{name}={value}" for name, value in options.items()),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = json.loads(record.read_text())["runs"]
    assert run["seed"] == 1 and {"auc/is_click", "log_loss/is_click"} <= run["best"].keys()
    assert run["best"]["ne"] < min(known.without.values())
    # What it learnt goes into a file, which scores candidates by itself.
    out = tmp_path / "scorer.zip"
    trained = f"--workdir={tmp_path / 'run' / 'seed_1'}"
    done = commands.run("experiments.export", trained, f"--out={out}", "--candidates=8")
    assert done.returncode == 0, done.stdout + done.stderr
    service = open_service(str(out), options=ServingOptions(max_users=4))
    high = {"is_like": 1, "play_time_ms": 32_000, "is_comment": 1}
    low = {"is_like": 0, "play_time_ms": 4_000, "is_comment": 0}
    users = [high, *(high | {name: value} for name, value in low.items())]
    requests = [
        ScoreRequest(
            history=[1] * 15,
            times=list(range(15)),
            actions={name: [value] * 15 for name, value in (one | {"is_follow": 1}).items()},
            candidates=[2],
        )
        for one in users
    ]
    answers = service.answer([service.prepare(request) for request in requests])
    clicks = np.array([answer.candidates[0].scores["is_click"] for answer in answers])
    odds = clicks / (1 - clicks)
    order = [*EFFECTS, "nothing"]  # what is against a click, the strongest first
    assert sorted(order, key=dict(zip(order, np.roll(odds, -1), strict=True)).get) == order


class StopAfterFiveLooks(signals.Stop):
    """It stops at the sixth look, in the middle of an epoch."""

    def __init__(self):
        self.looks = 0

    @property
    def requested(self):
        self.looks += 1
        return int(signal.SIGTERM) if self.looks > 5 else 0


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, monkeypatch):
    """A run stopped within an epoch goes on there; requests are drawn again from (seed, epoch)."""
    config = rank_data.config(
        tmp_path,
        data=dict(batch_users=3),
        model=dict(layers=1),
        train=dict(epochs=2, protocol="chronological", steps_per_call=1),
    )
    task = tasks.of(config, rank_data.interactions((20, 18, 12)))
    whole = train(config, tmp_path / "whole", console=Console(quiet=True), task=task)
    assert whole["steps"] > 5
    monkeypatch.setattr(
        "ultra_hstu.signals.stopping", lambda _: contextlib.nullcontext(StopAfterFiveLooks())
    )
    steps = []
    while True:
        try:
            resumed = train(config, tmp_path / "stopped", console=Console(quiet=True), task=task)
            break
        except Interrupted as stop:
            steps.append(str(stop).split(",")[0])
    assert steps and all("step" in place for place in steps)

    def final(folder):
        state = abstract(jax.eval_shape(lambda: task.recipe.init(0)))
        return Checkpoints((folder / "checkpoints").absolute(), read_only=True).restore(state)

    jax.tree.map(
        np.testing.assert_array_equal, final(tmp_path / "whole")[1], final(tmp_path / "stopped")[1]
    )
    assert {**whole, "seconds": 0, "compile_seconds": 0} == {
        **resumed,
        "seconds": 0,
        "compile_seconds": 0,
    }


def test_ablation_takes_away_one_piece_at_a_time(tmp_path):
    config = shrunk("kuairand_rank_ultra", tmp_path)
    found = ablation.variants(config)
    assert list(found) == [
        "ultra", "interleaved_input", "full_attention", "no_truncation", "one_transducer",
        "fewer_signals", "whole_histories", "fp8_projections", "relative_bias", "softmax",
        "paper_layer",
    ]  # fmt: skip
    interactions = load_interactions(config.data)
    cost = {}
    for name, variant in found.items():
        variant.validate()
        cost[name] = ablation.describe(tasks.of(variant, interactions))["inference_gflop"]
    assert (
        cost["interleaved_input"] > cost["ultra"]
        and cost["no_truncation"] > cost["ultra"] > cost["one_transducer"]
    )
    assert found["fewer_signals"].rank.signals == ("is_click",)
    assert cost["paper_layer"] < cost["ultra"]
    own = changed(config, model={"channels": rank_data.OWN_OPTIONS, "window": (3,)})
    found = ablation.variants(own)
    for name in ("full_attention", "no_truncation"):
        encoders = found[name].model.encoders.values()
        assert all(one.truncate_after is None for one in encoders) == (name == "no_truncation")
        assert all(one.window == () for one in encoders) == (name == "full_attention")
    assert found["interleaved_input"].model.channels["engagement"].window == (-1, 4)
    # Softmax under windows, a truncation and a mixture: a prediction is traced.
    task = tasks.of(found["softmax"], interactions)
    loader = task.loader("test", batch_users=4, steps_per_call=1)
    batch = next(iter(loader.groups(loader.plan()))).feed.batch(0)
    params = jax.eval_shape(lambda: task.recipe.init(0)).params
    assert jax.eval_shape(task.recipe.logits, params, batch).shape == batch.label_PK.shape


def test_ablation_writes_its_record(tmp_path):
    """A second call trains nothing and writes the same numbers."""
    config = rank_data.config(
        tmp_path, train=dict(epochs=1, protocol="chronological"), model=dict(layers=1)
    )
    file = tmp_path / "results" / "record.json"
    results = []
    for _ in range(2):
        ablation.run(
            {"ultra": config},
            rank_data.interactions((12, 15, 20)),
            [1],
            tmp_path / "runs",
            file,
            Console(quiet=True),
        )
        entry = json.loads(file.read_text())["variants"]["ultra"]
        results.append({name: entry["runs"][0][name] for name in ("best", "steps", "seconds")})
        assert (
            entry["mean"] == entry["runs"][0]["best"]
            and entry["inference_gflop"] > 0
            and entry["parameters"] > 0
        )
    assert results[0] == results[1]


def test_ablation_lists_its_variants(tmp_path):
    command = [
        "scripts.ablation",
        f"--config={ROOT}/experiments/configs/assistments_rank_ultra.py",
        "--list",
        f"--config.data.raw_dir={assistments(tmp_path / 'raw')}",
        f"--config.data.data_dir={tmp_path / 'data'}",
        "--only=no_truncation,ultra",
    ]
    done = commands.run(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["ultra", "no_truncation"]
    done = commands.run(*command, "--only=nothing")
    assert (
        done.returncode == 1
        and "there is no variant 'nothing'; the variants are ultra, interleaved_input"
        in done.stderr
    )
