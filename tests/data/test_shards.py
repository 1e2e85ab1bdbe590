"""Events on the disk: the same numbers as from memory, in bounded memory; damage is named."""

import dataclasses
import shutil
import tracemalloc

import jax
import numpy as np
import pytest
from rich.console import Console

from tests.small_run import SYNTHETIC, small_config, with_
from ultra_hstu import tasks
from ultra_hstu.config import SyntheticLongConfig, TableConfig
from ultra_hstu.data import shards, synthetic_long
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.data.interactions import Interactions, load_interactions
from ultra_hstu.report import read_metrics
from ultra_hstu.train import train
from ultra_hstu.workdir import Workdir

QUIET = Console(quiet=True)


@pytest.fixture
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def on_disk(config):
    return with_(config, data__placement="shards")


def events(users, length, seed=0):
    """Users of about so many events."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 2 * length, users)
    count = int(lengths.sum())
    return Interactions(
        users=np.arange(users) * 7,
        items=rng.integers(1, 100, count).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        timestamps=np.sort(rng.integers(10**9, 10**9 + 10**6, count)),
        actions={"rating": rng.integers(1, 6, count).astype(np.float32)},
        catalog=Catalog(np.arange(100)),
    )


def parts(whole, size):
    """The users of `whole`, some at a time."""
    for first in range(0, whole.num_users, size):
        users = slice(first, first + size)
        bounds = whole.offsets[first : first + size + 1]
        span = slice(bounds[0], bounds[-1])
        yield dataclasses.replace(
            whole,
            users=whole.users[users],
            offsets=bounds - bounds[0],
            items=whole.items[span],
            timestamps=whole.timestamps[span],
            actions={"rating": whole.actions["rating"][span]},
        )


def test_training_from_shards_has_the_bits_of_training_from_the_device(data_dir, tmp_path):
    config = small_config(data_dir, protocol="validated", epochs=2)
    results = [
        train(one, tmp_path / name, console=QUIET)
        for name, one in (("device", config), ("shards", on_disk(config)))
    ]
    timing = ("seconds", "compile_seconds")
    for result in results:
        for name in timing:
            result.pop(name)
    assert results[0] == results[1]
    losses = [
        [record["loss"] for record in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("device", "shards")
    ]
    assert losses[0] == losses[1]
    Workdir(tmp_path / "device").check_data(tasks.load(on_disk(config)).interactions)


def test_every_batch_of_every_group_is_that_of_memory(data_dir):
    """On a mesh of eight data groups, with signals: no user is lost or comes twice."""
    config = with_(
        small_config(data_dir), parallel__data=8, rank__signals=("rating",), data__layout="padded"
    )
    whole = events(users=50, length=20)
    store = shards.open_or_write(data_dir / "shards", lambda: parts(whole, 16))
    loaders = [
        tasks.of(one, data).loader("train", batch_users=16, steps_per_call=2)
        for one, data in (
            (with_(config, data__placement="stream"), whole),
            (on_disk(config), store),
        )
    ]
    seen = []
    for epoch in range(2):
        plans = [loader.plan(seed=1, epoch=epoch) for loader in loaders]
        np.testing.assert_array_equal(plans[0].place_SB, plans[1].place_SB)
        seen.append(np.sort(plans[0].place_SB[plans[0].place_SB >= 0]))
        groups = [list(loader.groups(plan)) for loader, plan in zip(loaders, plans, strict=True)]
        for one, other in zip(*groups, strict=True):
            jax.tree.map(np.testing.assert_array_equal, one.feed, other.feed)
        resumed = list(loaders[1].groups(plans[1], first=2))
        jax.tree.map(np.testing.assert_array_equal, resumed[0].feed, groups[0][1].feed)
    for users in seen:
        np.testing.assert_array_equal(users, np.arange(50))


def test_what_is_written_is_what_was_there(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 4096)
    whole = events(users=40, length=30)
    store = shards.open_or_write(tmp_path / "shards", lambda: parts(whole, 7))
    assert len(list((tmp_path / "shards").glob("*.array_record"))) > 3
    assert store.fingerprint() == whole.fingerprint()
    chosen = np.array([5, 39, 0, 5])
    spans = [slice(whole.offsets[user], whole.offsets[user + 1]) for user in chosen]
    read = store.read(chosen)
    for name, column in (("items", whole.items), ("rating", whole.actions["rating"])):
        np.testing.assert_array_equal(read[name], np.concatenate([column[span] for span in spans]))
    assert store.timed and store.num_events == whole.num_events
    with pytest.raises(NotImplementedError, match="data.placement=stream"):
        store.items  # noqa: B018


@pytest.mark.parametrize("ties", ["stable", "random"])
def test_a_prepared_source_is_the_same_from_both(data_dir, ties, monkeypatch):
    data = dataclasses.replace(
        small_config(data_dir).data, ties=ties, synthetic=dataclasses.replace(SYNTHETIC, users=50)
    )
    assert shards.load(data).fingerprint() == load_interactions(data).fingerprint()


def test_events_of_another_generator_are_not_read(data_dir, monkeypatch):
    """What a newer version draws under the same settings is written anew."""
    settings = SyntheticLongConfig(users=5, length=6, categories=3)
    data = dataclasses.replace(
        small_config(data_dir).data, source="synthetic_long", synthetic_long=settings
    )
    old = shards.load(data).fingerprint()
    other = synthetic_long.draw(dataclasses.replace(settings, seed=1))
    monkeypatch.setattr(synthetic_long, "draw", lambda _: other)
    monkeypatch.setattr(synthetic_long, "VERSION", "of tomorrow")
    assert old != shards.load(data).fingerprint() == load_interactions(data).fingerprint()


def test_own_files_are_written_as_shards(data_dir, tmp_path):
    path = tmp_path / "events.csv"
    lines = [f"u{n % 5},i{n % 7},{10**9 + n}" for n in range(60)]
    path.write_text("\n".join(["user,item,time", *lines]) + "\n")
    data = dataclasses.replace(
        small_config(data_dir).data, source="table", raw_dir=str(path), table=TableConfig()
    )
    store = shards.load(data)
    assert store.fingerprint() == load_interactions(data).fingerprint()
    assert shards.load(data).num_users == 5


def test_memory_does_not_grow_with_the_events(data_dir, monkeypatch):
    monkeypatch.setattr(shards, "USERS", 50)
    peaks = []
    for users in (200, 3200):
        whole = events(users, length=40)
        store = shards.open_or_write(data_dir / f"{users}", lambda: parts(whole, 50))  # noqa: B023
        task = tasks.of(on_disk(small_config(data_dir)), store)
        loader = task.loader("train", batch_users=16, steps_per_call=2)
        groups = loader.groups(loader.plan())
        next(groups)
        for work in (lambda: [None for _ in groups], task.popularity):  # noqa: B023
            tracemalloc.start()
            work()
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    # Of 16 times the events: some numbers of each user stay.
    assert max(peaks[2:]) < whole.num_events * store.dtype.itemsize / 2, peaks


def test_damage_is_named_and_mended(tmp_path, caplog):
    whole = events(users=30, length=20)

    def opened():
        return shards.open_or_write(tmp_path / "shards", lambda: parts(whole, 10))

    opened()
    (path,) = (tmp_path / "shards").glob("*.array_record")
    content = path.read_bytes()
    path.write_bytes(content[:-100])  # cut off
    assert opened().fingerprint() == whole.fingerprint()
    assert f"{path} has {len(content) - 100} bytes, and {len(content)} were written" in caplog.text
    path.unlink()
    opened()
    assert f"{path} is missing" in caplog.text
    (tmp_path / "shards" / shards.FILES).write_text("{")
    opened()
    assert f"{shards.FILES} is missing or damaged" in caplog.text

    store = opened()
    content = bytearray(path.read_bytes())
    content[200:400] = bytes(200)  # of the same size
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path / 'shards'} is damaged"):
        shards.ShardedInteractions(store.folder).read(np.arange(30))


def test_a_killed_writer_leaves_nothing_that_is_read(tmp_path):
    whole = events(users=30, length=20)

    def killed():
        yield next(parts(whole, 10))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shards.open_or_write(tmp_path / "shards", killed)
    assert not (tmp_path / "shards").exists()
    store = shards.open_or_write(tmp_path / "shards", lambda: parts(whole, 10))
    assert store.fingerprint() == whole.fingerprint()
    shutil.rmtree(tmp_path / "shards")
    with pytest.raises(ValueError, match="no users"):
        shards.write(tmp_path / "shards", [])
    late = dataclasses.replace(whole, timestamps=whole.timestamps * 10_000)
    with pytest.raises(ValueError, match="Give seconds"):
        shards.write(tmp_path / "shards", parts(late, 10))


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"train__protocol": "temporal"}, "train.protocol='temporal'"),
        ({"train__protocol": "windows"}, "train.protocol='windows'"),
        ({"rank__contextual": ("age",)}, "rank.contextual"),
        ({"rank__tasks": ("good",), "train__protocol": "chronological"}, "rank.tasks"),
        (
            {"data__stochastic_length": 1.5, "data__subsequence": "random"},
            "data.subsequence='random'",
        ),
    ],
)
def test_what_needs_all_events_is_refused_by_name(data_dir, fields, named):
    config = with_(on_disk(small_config(data_dir)), **fields)
    with pytest.raises(NotImplementedError, match=f"{named}.*data.placement=stream"):
        tasks.check(config)


def test_events_of_a_program_are_refused(data_dir):
    data = dataclasses.replace(small_config(data_dir).data, source="arrays", raw_dir="x")
    with pytest.raises(ValueError, match="use 'stream'"):
        shards.load(data)
