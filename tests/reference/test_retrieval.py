"""Retrieval from raw files to quoted numbers, against plain definitions."""

import random

import jax
import numpy as np
import pytest

from tests.data.data_files import ml1m
from tests.reference import plain
from tests.small_run import small_config, with_
from ultra_hstu import tasks
from ultra_hstu.retrieval import baselines
from ultra_hstu.retrieval.batch import Events, HistoryGather

LONGEST = 8  # of a history, in events


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """40 users of 2 to 24 ratings of 45 of 50 movies: equal times, movies seen again, repeats."""
    draw = random.Random(0)
    movies = draw.sample(range(1, 400), 50)
    lines = []
    for user in draw.sample(range(1, 900), 40):
        time = draw.randrange(10**9, 10**9 + 600)
        for _ in range(draw.randrange(2, 25)):
            time += draw.choice((0, 0, 7, 90))
            lines.append(f"{user}::{draw.choice(movies[:45])}::{draw.randrange(1, 6)}::{time}")
    lines += draw.sample(lines, 10)
    draw.shuffle(lines)
    titles = [f"{movie}::Movie {movie}::Drama" for movie in movies]
    return ml1m(tmp_path_factory.mktemp("raw"), lines, titles)


@pytest.fixture(scope="module")
def config(raw, tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("data")
    config = small_config(data_dir, protocol="validated", eval_users=7)
    fields = {"source": "ml-1m", "raw_dir": str(raw), "max_history": LONGEST}
    return with_(config, **{f"data__{name}": value for name, value in fields.items()})


@pytest.fixture(scope="module")
def histories(raw):
    return plain.read_histories(raw / "ratings.dat")


def as_raw(task, examples):
    """The product's examples in raw ids and seconds: (user, history, target)."""
    data = task.interactions
    ids, times = data.catalog.decode(data.items), data.timestamps
    for user, start, stop in zip(examples.user, examples.start, examples.stop, strict=True):
        events = list(zip(ids.tolist(), times.tolist(), strict=True))[start : stop + 1]
        yield data.users[user].item(), events[:-1], events[-1]


EVERYTHING = 10**9
PARTS = [
    (protocol, part)
    for protocol in ("published", "validated", "temporal")
    for part in ("train", "validation", "test")
    if (protocol, part) != ("published", "validation")
]


@pytest.mark.parametrize(("protocol", "part"), PARTS)
def test_splits(protocol, part, config, histories):
    """Order, targets, and which events of a history are kept."""
    task = tasks.load(with_(config, train__protocol=protocol))
    expected = [
        (user, [(event.item, event.time) for event in history], (target.item, target.time))
        for user, history, target in plain.examples(histories, protocol, part, LONGEST)
    ]
    assert len(expected) > 5
    assert list(as_raw(task, task.examples(part))) == expected


def hidden_items(histories, longest):
    """The items of each test user's newest `longest` events before the target."""
    found = plain.examples(histories, "validated", "test", longest)
    return {user: {event.item for event in history} for user, history, _ in found}


def test_catalogue(raw, config):
    """Every movie of the file, rated or not, in ascending order."""
    catalog = tasks.load(config).interactions.catalog
    assert catalog.raw_ids[1:].tolist() == plain.read_catalogue(raw / "movies.dat")


@pytest.mark.parametrize("hide", ["window", "all"])
def test_metrics(hide, raw, config, histories):
    """Ranks and their means over the test users, with vectors that the model makes one by one."""
    task = tasks.load(with_(config, eval__hide=hide))
    params = task.recipe.init(3).params
    model = task.recipe.model(params)
    movies = plain.read_catalogue(raw / "movies.dat")
    table = dict(zip(movies, np.asarray(model.item_table[...])[1:].tolist(), strict=True))
    encode = jax.jit(
        lambda events, stop: model.users(
            HistoryGather(LONGEST)(events, {"start": 0 * stop, "stop": stop})
        )
    )
    ranks, repeats = [], []
    hidden = hidden_items(histories, LONGEST if hide == "window" else EVERYTHING)
    for user, history, target in plain.examples(histories, "validated", "test", LONGEST):
        events = [*history, target] + [target] * (LONGEST - len(history))
        items = np.array([1 + movies.index(event.item) for event in events])
        times = np.array([event.time for event in events])
        stop = np.array([len(history)], np.int32)
        (vector,) = np.asarray(encode(Events.from_arrays(items, times), stop)).tolist()
        scores = {movie: plain.cosine(vector, row) for movie, row in table.items()}
        ranks.append(plain.rank(scores, target.item, hidden[user]))
        repeats.append(target.item in hidden[user])
    assert plain.NOT_FOUND in ranks  # a movie that was seen before is hidden, target or not
    evaluator = task.evaluator("test")
    assert evaluator.predict(params).tolist() == ranks
    found = {name: value for name, value in evaluator(params).items() if "/" not in name}
    assert found == pytest.approx(plain.retrieval_metrics(ranks, repeats), rel=1e-12)


@pytest.mark.parametrize(
    ("neighbours", "recent", "hide", "repeats"),
    [(100, 100, "window", "hide"), (3, 5, "all", "hide"), (3, 5, "window", "rank")],
)
def test_baselines(neighbours, recent, hide, repeats, config, histories, monkeypatch):
    for name, value in {"NEIGHBOURS": neighbours, "RECENT": recent}.items():
        monkeypatch.setattr(baselines, name, value)
    for name in ("BLOCK_EVENTS", "BLOCK_USERS"):
        monkeypatch.setattr(baselines, name, 7)
    task = tasks.load(with_(config, eval__hide=hide, eval__repeats=repeats))
    train = plain.examples(histories, "validated", "train", LONGEST)
    order = plain.by_popularity(train, task.interactions.catalog.raw_ids[1:].tolist())
    followers, similar = (
        plain.strongest(scores, order, neighbours)
        for scores in (plain.followers(train), plain.cosines(train, recent))
    )
    ranks = {"popularity": [], "last item's neighbours": [], "item-item": []}
    chances, met = [], []  # the metrics of a random order, a user's mean over all of them
    before = hidden_items(histories, LONGEST if hide == "window" else EVERYTHING)
    for user, history, target in plain.examples(histories, "validated", "test", LONGEST):
        met.append(target.item in before[user])
        hidden = before[user] if repeats == "hide" else set()
        known = sorted({event.item for event in history[-recent:]}, key=order.index)
        summed = {}
        for item in known:
            for other, score in similar[item].items():
                summed[other] = summed.get(other, 0.0) + score
        for name, scores in zip(ranks, ({}, followers[history[-1].item], summed), strict=True):
            ranks[name].append(plain.rank_in_order(scores, order, target.item, hidden))
        places = range(1, 1 + len(order) - len(hidden))
        lost = target.item in hidden
        chances.append(plain.retrieval_metrics([plain.NOT_FOUND] if lost else places, met))
    expected = {name: plain.retrieval_metrics(found, met) for name, found in ranks.items()}
    expected["random"] = {
        name: sum(chance[name] for chance in chances) / len(chances) for name in chances[0]
    } | {"repeats": sum(met) / len(met)}
    assert 0 < sum(met) < len(met)
    found = task.baselines("test")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-12), name


def test_kept_lengths_of_stochastic_length(config, histories):
    """Histories of n events above N^(alpha / 2) stay whole with probability N^alpha / n^2."""
    longest, alpha, epochs = 20, 1.5, 400
    config = with_(config, data__max_history=longest, data__stochastic_length=alpha)
    task = tasks.load(config)
    loader = task.loader("train", batch_users=8, steps_per_call=1)
    whole = [
        len(history) for _, history, _ in plain.examples(histories, "validated", "train", longest)
    ]
    cut = int(longest ** (alpha / 2))
    assert cut == 9 and max(whole) == longest
    times_whole = dict.fromkeys(whole, 0)
    for epoch in range(epochs):
        columns = loader.plan(seed=1, epoch=epoch).examples.columns
        kept = (columns["stop"] - columns["start"]).tolist()
        for before, after in zip(whole, kept, strict=True):
            assert after == before if before <= cut else after in (cut, before)
            times_whole[before] += after == before
    for length in set(whole):
        draws = epochs * whole.count(length)
        chance = min(longest**alpha / length**2, 1) if length > cut else 1
        deviation = (draws * chance * (1 - chance)) ** 0.5
        assert abs(times_whole[length] - draws * chance) <= 4 * deviation
    test = plain.examples(histories, "validated", "test", longest)
    assert task.examples("test").lengths.tolist() == [len(history) for _, history, _ in test]
