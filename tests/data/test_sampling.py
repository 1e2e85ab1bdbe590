"""Stochastic length against golden numbers and definitions; the load balancer."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.bench import load_balance as bench_load_balance
from scripts.tables import records
from scripts.tables import sampling as sampling_tables
from tests import golden
from ultra_hstu.sampling import (
    RECALIBRATION_WEIGHT,
    LoadBalancer,
    keep_probability,
    moved_probability,
    stochastic_length,
    subsequence,
    threshold,
)

ROOT = Path(__file__).parents[2]

# --- lengths ---


def test_golden_lengths():
    file = golden.load("stochastic_length")
    for row, (length, alpha) in enumerate(
        zip(file["max_seq_len"].tolist(), file["alpha"].tolist(), strict=True)
    ):
        assert threshold(length, alpha) == file["threshold"][row]
        np.testing.assert_allclose(
            keep_probability(file["lengths"], length, alpha), file["keep_prob"][row], rtol=1e-6
        )
        kept = stochastic_length(file["lengths"], length, alpha, file["uniform"][row])
        np.testing.assert_array_equal(kept, file["sampled_lengths"][row])


def test_thresholds_of_the_paper():
    """HSTU's table: 776 events of 4096 at alpha 1.6."""
    assert [threshold(n, 1.6) for n in (1024, 2048, 4096, 8192)] == [256, 445, 776, 1351]


def test_expected_cost_is_the_one_of_the_paper():
    """N events stay whole with probability N^(alpha - 2); a cut history has N^alpha pairs."""
    rng = np.random.default_rng(0)
    kept = stochastic_length(np.full(200_000, 1000), 1000, 1.7, rng.random(200_000))
    assert np.mean(kept == 1000) == pytest.approx(1000 ** (1.7 - 2), rel=0.02)
    assert set(kept) == {1000, threshold(1000, 1.7)}


@pytest.mark.parametrize("alpha", [1.0, 0.5, 2.1, float("nan")])
def test_alpha_outside_its_range(alpha):
    with pytest.raises(ValueError, match=r"must be in \(1, 2\]"):
        threshold(100, alpha)
    with pytest.raises(ValueError, match=r"must be in \(1, 2\]"):
        LoadBalancer(100, alpha, 1.5)


# --- subsequences ---


@settings(max_examples=60)
@given(st.data(), st.sampled_from(["recent", "random", "weighted"]))
def test_subsequences_are_sorted_and_of_exact_size(data, kind):
    length = data.draw(st.integers(0, 40))
    keep = data.draw(st.integers(0, length))
    times = data.draw(
        st.none()
        | st.lists(st.integers(0, 50), min_size=length, max_size=length).map(
            lambda t: np.sort(t).astype(np.int64)
        )
    )
    chosen = subsequence(
        kind, length, keep, np.random.default_rng(data.draw(st.integers(0, 9))), times
    )
    assert len(chosen) == keep == len(set(chosen.tolist()))
    assert (np.diff(chosen) > 0).all() and (keep == 0 or (chosen[0] >= 0 and chosen[-1] < length))
    if kind == "recent":
        np.testing.assert_array_equal(chosen, np.arange(length)[length - keep :])


def probabilities(weights, keep):
    """How often each set comes out when events are drawn one after another without replacement."""
    result = {}
    for order in itertools.permutations(range(len(weights)), keep):
        left, probability = sum(weights), 1.0
        for event in order:
            probability *= weights[event] / left
            left -= weights[event]
        result[tuple(sorted(order))] = result.get(tuple(sorted(order)), 0) + probability
    return result


@pytest.mark.parametrize(
    "kind, times, weights",
    [
        ("random", [0, 10, 100, 101], [1, 1, 1, 1]),
        ("weighted", [0, 60, 80, 100], [1 - 100 / 160, 1 - 40 / 160, 1 - 20 / 160, 1]),
        ("weighted", None, [1 - 3 / 6, 1 - 2 / 6, 1 - 1 / 6, 1]),
        ("weighted", [7, 7, 7, 7], [1, 1, 1, 1]),
    ],
)
def test_draws_follow_their_weights(kind, times, weights):
    rng = np.random.default_rng(0)
    times = None if times is None else np.array(times)
    tries = 12_000
    counts = {}
    for _ in range(tries):
        chosen = tuple(subsequence(kind, 4, 2, rng, times).tolist())
        counts[chosen] = counts.get(chosen, 0) + 1
    for chosen, probability in probabilities(weights, 2).items():
        assert counts[chosen] / tries == pytest.approx(
            probability, abs=4 * np.sqrt(probability / tries)
        )


def test_weights_of_zero_come_last():
    """One event in the past has all the age there is, so its weight is 0."""
    for seed in range(20):
        assert subsequence("weighted", 2, 1, np.random.default_rng(seed)).tolist() == [1]
    assert subsequence("weighted", 2, 2, np.random.default_rng(0)).tolist() == [0, 1]


def test_bad_subsequences():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="cannot be kept of 3"):
        subsequence("random", 3, 4, rng)
    with pytest.raises(ValueError, match="2 times for 3 events"):
        subsequence("weighted", 3, 1, rng, np.zeros(2, np.int64))


# --- load balance ---

N, ALPHA, GAMMA = 400, 1.6, 1.5


def draws(steps, ranks, users=24, seed=0):
    """Histories, half of them long as in industrial data, and a uniform number for each."""
    rng = np.random.default_rng(seed)
    length = np.minimum(rng.lognormal(4.6, 1.0, (steps, ranks, users)).astype(np.int64) + 1, N)
    return length, rng.random(length.shape)


class AllReduce:
    """The means that all devices agree on, one a call."""

    def __init__(self, means):
        self.left = list(means)

    def __call__(self, own):
        return float(self.left.pop(0))


def loads(steps=40, ranks=8):
    """Load of every device at every step, plain and balanced; devices share the mean of all."""
    length, uniform = draws(steps, ranks)
    plain = stochastic_length(length, N, ALPHA, uniform)
    means = (
        (plain.astype(float) ** GAMMA).sum(-1).reshape(-1, 10, ranks).mean((1, 2))
    )  # what the ranks agree on every 10 steps
    balancers = [LoadBalancer(N, ALPHA, GAMMA, 10, mean=AllReduce(means)) for _ in range(ranks)]
    kept = np.array(
        [
            [balancer.choose(length[s, r], uniform[s, r]) for r, balancer in enumerate(balancers)]
            for s in range(steps)
        ]
    )
    return (
        length,
        plain,
        kept,
        (plain.astype(float) ** GAMMA).sum(-1),
        (kept.astype(float) ** GAMMA).sum(-1),
    )


def test_spread_of_the_load_falls():
    length, plain, kept, before, after = loads()
    np.testing.assert_array_equal(kept[:10], plain[:10])  # warm-up draws plainly
    slowest = lambda load: np.mean(load[10:].max(1) / load[10:].mean(1))  # noqa: E731
    assert slowest(after) < 1 + 0.6 * (slowest(before) - 1)
    assert after[10:].std() < 0.6 * before[10:].std()
    assert after[10:].mean() == pytest.approx(before[10:].mean(), rel=0.1)
    assert set(np.unique(kept[kept != length])) == {threshold(N, ALPHA)}


LENGTHS = {  # of users, up to a longest one
    "like ASSISTments": (3000, lambda rng, shape: rng.gamma(2.0, 280.0, shape)),
    "lognormal": (400, lambda rng, shape: rng.lognormal(4.6, 1.0, shape)),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_histories_of_any_length_stay_whole_as_often_as_equation_4_says(name):
    """By sixths of the longest length, over many batches; and yet the load spreads less."""
    rng, (longest, draw) = np.random.default_rng(0), LENGTHS[name]
    length_SU = np.clip(draw(rng, (3000, 32)).astype(np.int64), 1, longest)
    uniform_SU = rng.random(length_SU.shape)
    plain_SU = stochastic_length(length_SU, longest, ALPHA, uniform_SU)
    balancer = LoadBalancer(longest, ALPHA, GAMMA, recalibrate_every=10**6)
    balancer.calibrate([balancer.load(plain_U) for plain_U in plain_SU])
    kept_SU = np.array([balancer.choose(*both) for both in zip(length_SU, uniform_SU, strict=True)])
    law_SU = np.minimum(keep_probability(length_SU, longest, ALPHA), 1)
    sixth_SU = (length_SU - 1) * 6 // longest
    for sixth in range(6):
        here = sixth_SU == sixth
        whole, law = (kept_SU == length_SU)[here].mean(), law_SU[here].mean()
        error = np.sqrt(law * (1 - law) / here.sum())
        assert whole == pytest.approx(law, abs=3 * error + 0.03 * law), sixth
    before, after = ((kept.astype(float) ** GAMMA).sum(1) for kept in (plain_SU, kept_SU))
    assert after.std() < 0.6 * before.std()
    assert after.mean() == pytest.approx(before.mean(), rel=0.01)


def test_draws_move_each_other_and_no_probability():
    """In one batch: each history as often as its moved probability says, and little spread."""
    length, _ = (x[0, 0] for x in draws(1, 1))
    balancer, cut = LoadBalancer(N, ALPHA, GAMMA, 10**6), threshold(N, ALPHA)
    long = np.flatnonzero(length > cut)
    law = keep_probability(length[long], N, ALPHA)
    more = length[long].astype(float) ** GAMMA - float(cut) ** GAMMA
    wanted = 1.2 * float(law @ more)
    balancer.target = balancer.load(np.minimum(length, cut)) + wanted
    probability = moved_probability(law, more, wanted)
    assert probability @ more == pytest.approx(wanted) and (probability > law).all()
    rng, tries, kept = np.random.default_rng(0), 2000, []
    for _ in range(tries):
        balancer.behind = 0.0
        kept.append(balancer.choose(length, rng.random(len(length))))
    whole = (np.array(kept) == length)[:, long].mean(0)
    np.testing.assert_allclose(whole, probability, atol=4.5 * np.sqrt(0.25 / tries))
    independent = np.sqrt((probability * (1 - probability) * more**2).sum())
    assert (np.array(kept, float) ** GAMMA).sum(1).std() < 0.4 * independent


@pytest.mark.parametrize("wanted, c", [(-1e9, -1), (1e9, 1)])
def test_loads_out_of_reach(wanted, c):
    p, load = np.array([0.1, 0.5]), np.array([5.0, 2.0])
    np.testing.assert_allclose(moved_probability(p, load, wanted), p + c * p * (1 - p))
    assert moved_probability(p[:0], load[:0], wanted).shape == (0,)


def test_capacity_bounds_the_choice():
    length, uniform = (x[0, 0] for x in draws(1, 1))
    cut = np.minimum(length, threshold(N, ALPHA)).sum()

    def events(capacity):
        balancer = LoadBalancer(N, ALPHA, GAMMA, target=1e12)
        return balancer.choose(length, uniform, capacity).sum()

    free = events(None)
    assert events(int(free)) == free > events(int(free) - 1) > cut
    assert events(0) == cut  # nothing further can be cut


def test_recalibration_is_the_only_communication():
    length, uniform = draws(7, 1)
    asked = []
    balancer = LoadBalancer(
        N, ALPHA, GAMMA, 3, mean=lambda own: asked.append(own) or 1000.0 * len(asked)
    )
    targets = []
    for s in range(7):
        balancer.choose(length[s, 0], uniform[s, 0])
        targets.append(balancer.target)
    plain = (stochastic_length(length, N, ALPHA, uniform).astype(float) ** GAMMA).sum(-1)[:, 0]
    np.testing.assert_allclose(asked, [plain[:3].mean(), plain[3:6].mean()])
    moved = 1000.0 + RECALIBRATION_WEIGHT * 1000.0
    assert targets == [None, None, 1000.0, 1000.0, 1000.0, moved, moved]


@pytest.mark.parametrize("field, value", [("gamma", 0.0), ("recalibrate_every", 0)])
def test_bad_settings(field, value):
    with pytest.raises(ValueError, match=f"{field}={value} must be"):
        LoadBalancer(**{"max_length": N, "alpha": ALPHA, "gamma": GAMMA} | {field: value})


def test_benchmark_at_a_small_size(monkeypatch, tmp_path):
    """The loads of devices are those of the definitions; a picture comes out."""
    for name, value in {"STEPS": 20, "RECALIBRATE": 10, "USERS": 6}.items():
        monkeypatch.setattr(bench_load_balance, name, value)
    length_U = np.random.default_rng(0).integers(1, 300, 50)
    found = bench_load_balance.measure(length_U, timed_steps=1)
    assert 1 < found["gamma"] < 2 and found["longest"] == length_U.max()
    _, kept = bench_load_balance.simulate(length_U, 299, 2.0, 4)
    load_SR = (kept["plain"][10:].astype(float) ** 2).sum(2)
    spread = bench_load_balance.spread(kept["plain"], 2.0)
    assert spread["max_over_mean"] == pytest.approx(
        np.mean([max(load_R) / np.mean(load_R) for load_R in load_SR])
    )
    assert sum(spread["histogram"]["counts"]) + spread["histogram"]["beyond"] == load_SR.size
    for policy in ("plain", "balanced"):
        step = found["step"][policy]
        assert step["rows"] % 128 == 0 and np.shape(step["seconds"]) == (1, 8)
        assert step["slowest"] == max(step["seconds"][0])
    assert (
        found["load"]["8"]["balanced"]["std_over_mean"]
        < found["load"]["8"]["plain"]["std_over_mean"]
    )
    monkeypatch.setattr(sampling_tables, "load", lambda name: {"sets": {"small": found}})
    monkeypatch.setattr(records, "FIGURES", tmp_path)
    sampling_tables.load_balance_figure()
    assert (tmp_path / "load_balance.png").read_bytes().startswith(b"\x89PNG")
