"""Users whose times are exact, told apart, and the model that reads none."""

import json

import numpy as np
import pytest

from experiments.configs import named
from scripts import exact_times
from tests import commands
from ultra_hstu.fields import changed

USERS, EVENTS = 12, 6


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """MovieLens-1M's files; every third user has a line whose time is not exact."""
    folder = tmp_path_factory.mktemp("ml-1m")
    rng = np.random.default_rng(0)
    lines = [
        f"{user}::{movie}::{rng.integers(1, 6)}::{978300000 + 60 * user + event}"
        for user in range(1, USERS + 1)
        for event, movie in enumerate(rng.choice(20, EVENTS, replace=False) + 1)
    ]
    (folder / "ratings.dat").write_text("\n".join(lines) + "\n")
    movies = [f"{movie}::Film {movie} (1990)::Drama" for movie in range(1, 21)]
    (folder / "movies.dat").write_text("\n".join(movies) + "\n")
    np.savez(folder / "rows.npz", row=[EVENTS * user for user in range(0, USERS, 3)])
    return folder


def test_lines_name_users(copy):
    ratings = copy / "ratings.dat"
    assert exact_times.inexact_users(ratings, copy / "rows.npz").tolist() == [1, 4, 7, 10]
    assert len(exact_times.inexact_users(ratings, None)) == 0
    np.savez(copy / "other.npz", row=[USERS * EVENTS])
    with pytest.raises(ValueError, match="names line 72, and .* 72 lines: it belongs to another"):
        exact_times.inexact_users(ratings, copy / "other.npz")


def test_arms():
    config = named("ml1m_hstu")
    found = exact_times.arms(config)
    assert found["times"] == config and found["no_times"].model.time_buckets == 0
    with pytest.raises(ValueError, match="ml1m_hstu has no bias of times"):
        exact_times.arms(changed(config, model={"relative_bias": False}))


def test_the_record(copy, tmp_path):
    done = commands.run(
        "scripts.exact_times",
        "--config=ml1m_hstu",
        f"--config.data.raw_dir={copy}",
        f"--config.data.data_dir={tmp_path}",
        "--config.data.max_history=4",
        "--config.model.layers=1",
        "--config.model.implementation=reference",
        "--config.train.epochs=1",
        "--config.train.protocol=validated",
        f"--rows={copy}/rows.npz",
        "--seeds=7",
        f"--workdir={tmp_path}/runs",
        f"--record={tmp_path}/record.json",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["exact_users"] == 8 and list(record["arms"]) == ["times", "no_times"]
    for name, arm in record["arms"].items():
        result = json.loads((tmp_path / f"runs/{name}/seed_7/result.json").read_text())
        assert arm["all"]["mean"]["hr@10"] == result["best"]["hr@10"]
        eighths, twelfths = (
            arm[part]["mean"]["hr@10"] * n for part, n in (("exact", 8), ("all", 12))
        )
        assert 0 <= round(twelfths) - round(eighths) <= 4 and eighths == round(eighths)
