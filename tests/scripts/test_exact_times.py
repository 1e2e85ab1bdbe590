"""Users whose times are exact, told apart, and the model that reads none."""

import jax
import numpy as np
import pytest

from experiments.configs import named
from scripts import exact_times
from ultra_hstu import tasks
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


def test_users_without_such_a_line_are_measured_apart(copy, tmp_path):
    config = changed(
        named("ml1m_hstu"),
        data={"raw_dir": str(copy), "data_dir": str(tmp_path), "max_history": 4},
        model={"layers": 1, "implementation": "reference"},
        train={"eval_users": 5, "protocol": "validated"},
    )
    task = tasks.load(config)
    params = jax.jit(task.recipe.init, static_argnums=0)(0).params
    unfit_N = exact_times.inexact_users(copy / "ratings.dat", copy / "rows.npz")
    others_N = np.setdiff1d(task.interactions.users, unfit_N)
    found, rest = (exact_times.measured(task, params, some_N) for some_N in (unfit_N, others_N))
    assert found["all"] == rest["all"]
    for metric, whole in found["all"].items():
        parts = 8 * found["exact"][metric] + 4 * rest["exact"][metric]
        np.testing.assert_allclose(parts, 12 * whole, err_msg=metric)
    assert found["exact"] != rest["exact"]
    runs = {seed: {part: found["all"] for part in exact_times.USERS} for seed in (1, 2)}
    of_seeds = exact_times.summary(runs)["exact"]
    assert of_seeds["mean"]["mrr"] == found["all"]["mrr"] and of_seeds["stdev"]["mrr"] == 0
