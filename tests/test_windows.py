"""Runs over windows, and runs that start from another one. Runs are tiny but real."""

import dataclasses
import io
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments import compare
from tests.ranking import rank_data
from tests.small_run import small_config, with_
from ultra_hstu import tasks, windows
from ultra_hstu.checkpoint import Checkpoints, load_state
from ultra_hstu.config import Config, WindowsConfig
from ultra_hstu.data.interactions import Interactions
from ultra_hstu.data.windows import until
from ultra_hstu.fields import changed, difference
from ultra_hstu.initial import _structure, like_of, parameters_of
from ultra_hstu.library import fit
from ultra_hstu.model_config import ChannelConfig
from ultra_hstu.report import read_metrics
from ultra_hstu.retrieval.loss import softmax_loss
from ultra_hstu.retrieval.metrics import ranks
from ultra_hstu.retrieval.negatives import drawn_uniformly
from ultra_hstu.retrieval.recipe import there_are
from ultra_hstu.serving import RecommendationModel
from ultra_hstu.serving.scoring import RunData
from ultra_hstu.train import train
from ultra_hstu.vocabulary import NEW, Vocabulary, carried
from ultra_hstu.workdir import Workdir

QUIET = Console(quiet=True)
SPAN = 1000  # seconds of a window
CLOCKS = {"seconds": 0, "compile_seconds": 0}


def stream(count=4, *, seed=0, later=lambda items, times: (items, times)):
    """Users of `count` spans of time: half of the events of each are by users of the one before.

    Items 500 - 3 i, of which more and more appear. `later` changes what lies in the last span.
    """
    rng = np.random.default_rng(seed)
    users, items, times = [], [], []
    for span in range(count):
        time = np.sort(rng.integers(0, SPAN, 96)) + span * SPAN
        user, item = rng.integers(8 * span, 8 * span + 16, 96), rng.integers(0, 20 + 6 * span, 96)
        if span == count - 1:
            item, time = later(item, time)
        users.append(user), items.append(500 - 3 * item), times.append(time)
    return Interactions.from_arrays(*map(np.concatenate, (users, items, times)))


def config_of(tmp_path, **fields):
    config = small_config(tmp_path, protocol="windows", epochs=2)
    config = with_(config, model__layers=1, model__relative_bias=False, windows__by="event")
    return with_(
        config,
        **{
            "windows__size": 80,
            "windows__steps": 3,
            "train__keep_checkpoints": 9,
            "train__steps_per_call": 1,
        }
        | fields,
    )


def trained(config, data, folder, console=QUIET):
    return train(config, folder, console=console, task=tasks.of(config, data))


PROGRAMS = windows._KeptPrograms()


@pytest.fixture(scope="module", autouse=True)
def compile_once():
    """Programs of runs of one configuration, whose shapes differ if anything does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "_KeptPrograms", lambda: PROGRAMS)
        yield


def unclocked(result):
    rows = [row | CLOCKS for row in result["windows"]]
    return result | CLOCKS | {"windows": rows}


def state_of(folder, config, data):
    """The newest state in the folder of a window."""
    task = tasks.of(Workdir(folder).read_config(), data)
    return load_state(Workdir(folder), like_of(task)).state


def assert_same_bits(one, other):
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), one, other
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder, screen = tmp_path_factory.mktemp("finished"), Console(file=io.StringIO(), width=160)
    config, data = config_of(folder / "data"), stream()
    return config, data, folder / "run", trained(config, data, folder / "run", screen), screen


def test_every_window_is_judged_and_then_learned(finished):
    config, data, folder, result, screen = finished
    rows = result["windows"]
    assert len(rows) > 3 and json.loads((folder / "result.json").read_text()) == result
    assert rows[0]["metrics"] == {} and rows[0]["note"] == "the first window"
    assert [row["steps"] for row in rows[1:]] == [3] * (len(rows) - 1)
    assert [row["step"] for row in rows] == np.cumsum([row["steps"] for row in rows]).tolist()
    assert all({"hr@10", "ndcg@10", "repeats"} <= row["metrics"].keys() for row in rows[1:])
    targets = [row["targets"] for row in rows[1:]]
    values = [row["metrics"]["hr@10"] for row in rows[1:]]
    assert result["best"]["hr@10"] == pytest.approx(np.average(values, weights=targets))
    assert sum(row["events"] for row in rows) <= data.num_events
    assert [line["window"] for line in read_metrics(Workdir(folder).metrics)] == list(
        range(len(rows))
    )
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    said = [line for line in screen.file.getvalue().splitlines() if line.startswith("window ")]
    assert len(said) == len(rows) and "80 events" not in said[0]
    assert trained(config, data, folder) == result, "a finished run gives its result again"


def test_later_windows_change_nothing_before_them(finished, tmp_path):
    """Other items, a new one among them, and other times, from a window on."""
    config, data, folder, result, _ = finished
    changed = stream(later=lambda items, times: (items[::-1] + 17, np.sort(SPAN * 7 - times)))
    assert changed.num_items != data.num_items
    again = trained(with_(config, windows__count=3), changed, tmp_path / "run")
    for row, expected in zip(again["windows"], result["windows"], strict=False):
        if row["window"] < 2:
            assert row | CLOCKS == expected | CLOCKS
            name = f"window_{row['window']:03d}"
            assert_same_bits(
                state_of(tmp_path / "run" / name, config, changed),
                state_of(folder / name, config, data),
            )
            one, other = (
                Vocabulary.load(Workdir(run / name)) for run in (tmp_path / "run", folder)
            )
            assert one.catalog.raw_ids.tolist() == other.catalog.raw_ids.tolist()


def test_a_run_that_is_killed_goes_on_with_the_same_bits(finished, tmp_path, monkeypatch):
    """Inside the first window and a later one, behind its last step, and between two windows."""
    config, data, folder, expected, _ = finished
    config = with_(config, windows__count=3)
    often = with_(config, train__checkpoint_minutes=1e-9)
    save, write, deaths = Checkpoints.save, windows.write_json, []

    def save_and_die(self, step, *arguments, **options):
        save(self, step, *arguments, **options)
        self.wait()
        first = expected["windows"][0]["steps"]
        if step in (1, first + 1, first + 3) and step not in deaths:
            deaths.append(step)
            raise KeyboardInterrupt

    def write_and_die(path, value):
        write(path, value)
        if path.parent.name == "window_001" and "between" not in deaths:
            deaths.append("between")
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", save_and_die)
    monkeypatch.setattr(windows, "write_json", write_and_die)
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            trained(often, data, tmp_path / "run")
    result = trained(often, data, tmp_path / "run")
    assert len(deaths) == 4
    rows = [row | {"period": ""} for row in unclocked(expected)["windows"]]
    assert [row | {"period": ""} for row in unclocked(result)["windows"]] == rows[:3]
    name = "window_002"
    assert_same_bits(
        state_of(tmp_path / "run" / name, config, data), state_of(folder / name, config, data)
    )


def test_a_window_is_a_run_for_every_command(finished):
    """Its model is evaluated on the next window, and serves what was known at its end."""
    config, data, folder, result, _ = finished
    *_, before, last = result["windows"]
    model = folder / f"window_{before['window']:03d}"
    own = tasks.as_known(Workdir(model).read_config(), data)
    Workdir(model).check_data(own)
    ahead = tasks.of(with_(Workdir(model).read_config(), windows__number=last["window"]), data)
    step, params = tasks.params_of_run(Workdir(model), ahead)
    assert step == before["step"]
    found = ahead.evaluator("test")(params)
    assert found == pytest.approx(last["metrics"])
    served = RecommendationModel(str(model))
    assert served.catalog.num_items == own.num_items < data.num_items
    assert len(served.recommend(served.catalog.encode([500, 497]), k=3)) == 3
    assert Workdir(folder).newest().path.name == f"window_{last['window']:03d}"
    with pytest.raises(ValueError, match=r"holds the models of \d windows: name one .*window_00"):
        RecommendationModel(str(folder))
    with pytest.raises(ValueError, match="there is no window 9 in the data, whose newest is"):
        tasks.of(with_(config, windows__number=9), data)


def test_arrays_go_on_and_runs_are_compared(finished, capsys):
    """The run keeps its data once, and every window reads it."""
    config, data, folder, _, _ = finished
    arrays = folder.parent / "arrays"
    result = fit(with_(config, windows__count=3), data, arrays, console=QUIET)
    assert (arrays / "interactions.npz").exists()
    assert not (arrays / "window_001/interactions.npz").exists()
    task = tasks.of_run(Workdir(arrays / "window_001"), ahead=True)
    assert task.config.windows.number == 2 and len(result["windows"]) == 3
    compare.main(["compare", str(folder), str(arrays)])
    printed = capsys.readouterr().out
    assert re.search(r"2: 1970\S+ .* 0?\.\d{4} +0?\.\d{4}", printed)
    assert "windows.count" in printed


def test_a_window_whose_data_has_changed_is_refused(finished, tmp_path):
    config, _, _, _, _ = finished
    data, other = stream(), stream(seed=1)
    trained(with_(config, windows__count=2), data, tmp_path / "run")
    with pytest.raises(ValueError, match="the data is not what .*window_001 was trained on"):
        trained(with_(config, windows__count=3), other, tmp_path / "run")
    two = trained(with_(config, windows__count=2, windows__steps=3), data, tmp_path / "run")
    assert len(two["windows"]) == 2


def test_checkpoints_of_old_windows_are_removed(tmp_path):
    data = stream()
    config = config_of(tmp_path, windows__count=3, train__keep_checkpoints=1)
    trained(config, data, tmp_path / "run")
    kept = [
        (one.path / "checkpoints").exists() for one in Workdir(tmp_path / "run").windows.values()
    ]
    assert kept == [False, False, True]
    with pytest.raises(ValueError, match="train.keep_checkpoints=1 newest windows keep theirs"):
        state_of(tmp_path / "run/window_000", config, data)


def test_new_users_alone_are_learned_but_judge_nothing(tmp_path):
    """Where the first event of a window is asked about, somebody must have been there before."""
    users = np.repeat(np.arange(16), 10)
    times = np.arange(160) + 86400 * (users >= 8)
    data = Interactions.from_arrays(users, np.arange(160) % 20, times)
    config = config_of(tmp_path, windows__by="day", windows__size=1)
    first, second = trained(config, data, tmp_path / "run")["windows"]
    assert second["targets"] == 0 and second["metrics"] == {} and second["steps"] == 3
    assert second["new_users"] == second["users"] > 0
    assert second["note"] == "no event with a history"


def test_ranking_goes_on_too(tmp_path):
    data = rank_data.interactions((9, 12, 20, 15, 12, 17), seed=3)
    config = rank_data.config(train={"protocol": "windows", "epochs": 1}, model={"layers": 1})
    config = dataclasses.replace(config, windows=WindowsConfig(by="event", size=20, count=3))
    result = trained(config, data, tmp_path / "run")
    rows = result["windows"]
    assert len(rows) > 2 and all("mse" in row["metrics"] for row in rows[1:])
    # Every event of a window is asked about once.
    assert [row["targets"] for row in rows[1:]] == [row["events"] for row in rows[1:]]
    skills = json.loads((tmp_path / "run/window_000/vocabulary.json").read_text())["features"]
    assert set(skills["skill"]) <= {"5", "6", "7", "8"}
    users = RunData(str(tmp_path / "run/window_001"))
    assert users.config.windows.number == 1


# --- starts from another run ---


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parent")
    config = small_config(folder / "data", epochs=1)
    config = with_(config, model__layers=1, model__relative_bias=False)
    data = until(stream(), 2 * SPAN)
    train(config, folder / "run", console=QUIET, task=tasks.of(config, data))
    return config, data, folder / "run"


def item_rows(params, vocabulary):
    table = np.asarray(params["embedding"]["item_table"][...])
    return dict(zip(vocabulary.catalog.raw_ids[1:].tolist(), table[1:], strict=False))


def test_items_keep_their_rows_and_new_ones_of_retrieval_are_drawn(parent):
    """The mean of all vectors lies near every user: new items would come first for all of them."""
    config, data, folder = parent
    screen = Console(file=io.StringIO(), width=160)
    task = tasks.of(config, stream())
    params, origin = parameters_of(folder, task, screen)
    old_task = tasks.of(config, data)
    state = load_state(Workdir(folder), like_of(old_task)).state
    old, new = item_rows(state.params, old_task.vocabulary), item_rows(params, task.vocabulary)
    assert old.keys() < new.keys()
    assert list(old) != list(new)[: len(old)], "ids move"
    for raw_id, row in old.items():
        np.testing.assert_array_equal(new[raw_id], row)
    drawn = np.array([row for raw_id, row in new.items() if raw_id not in old])
    assert len(np.unique(drawn[:, 0])) == len(drawn) > 1
    assert 0.5 < drawn.std() / config.model.item_std < 1.5
    assert np.abs(drawn.mean(axis=0)).max() < np.abs(drawn).max()
    count = {"kept": len(old) + 1, "new": len(new) - len(old)}
    assert origin["tables"] == {"item_table": count} and origin["step"] > 0
    assert f"{count['new']} new drawn" in screen.file.getvalue()
    same = jax.tree.leaves(params["encoder"]), jax.tree.leaves(state.params["encoder"])
    assert_same_bits(*same)


def test_new_items_of_ranking_start_from_the_mean():
    state = {"embedding": {"item_table": jnp.arange(8.0).reshape(4, 2)}}
    like = {"embedding": {"item_table": jax.ShapeDtypeStruct((5, 2), jnp.float32)}}
    tables = {"embedding.item_table": np.array([0, 2, NEW, 3], np.int32)}
    like = jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), like)
    moved = carried(state, like, tables, item_std=None)["embedding"]["item_table"]
    np.testing.assert_array_equal(moved, [[0, 1], [4, 5], [5, 6], [6, 7], [0, 0]])


def test_a_start_is_recorded_and_needs_the_folder_once(parent, tmp_path):
    config, data, folder = parent
    config = with_(config, train__init_from=str(folder), train__epochs=1)
    task = tasks.of(config, data)
    result = train(config, tmp_path / "run", console=QUIET, task=task)
    assert result["init_from"]["run"] == str(folder)
    start = json.loads((tmp_path / "run/run.json").read_text())["runs"][0]
    assert start["init_from"] == result["init_from"]
    gone = with_(config, train__init_from=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="gone': the folder is not there. Name one that exp"):
        train(gone, tmp_path / "other", console=QUIET, task=task.with_config(gone))


def test_windows_may_start_from_another_run(parent, tmp_path):
    """The first of them; later ones go on."""
    _, _, folder = parent
    config = config_of(tmp_path, train__init_from=str(folder), windows__count=2)
    result = trained(config, stream(), tmp_path / "run")
    assert result["init_from"] == result["windows"][0]["init_from"]
    assert "init_from" not in result["windows"][1]
    start = json.loads((tmp_path / "run/run.json").read_text())["runs"][0]
    assert start["init_from"]["run"] == str(folder)


def test_another_model_is_refused_with_every_field(parent):
    config, data, folder = parent
    other = with_(
        config, model__layers=2, model__width=8, data__max_history=9, model__dtype="bfloat16"
    )
    with pytest.raises(ValueError) as error:
        parameters_of(folder, tasks.of(other, data), QUIET)
    lines = str(error.value).splitlines()
    assert lines[1:-1] == [
        "  data.max_history: 10 -> 9",
        "  model.layers: 1 -> 2",
        "  model.width: 16 -> 8",
    ]


def test_what_is_no_part_of_the_model_may_change(parent):
    """Its checkpoint holds the state of another optimizer."""
    config, data, folder = parent
    other = with_(
        config,
        optim__state_dtype="bfloat16",
        optim__tables="lazy_adam",
        optim__clip_norm=1.0,
        model__layer_implementation="xla",
        model__projection="fp8",
        model__projection_gradient="fp8",
        rank__train_targets=1,
        rank__requests="one",
    )
    params, _ = parameters_of(folder, tasks.of(other, data), QUIET)
    plain, _ = parameters_of(folder, tasks.of(config, data), QUIET)
    assert_same_bits(jax.tree.leaves(params), jax.tree.leaves(plain))


def test_masks_of_channels_may_change():
    """They add no parameters; a width does."""
    a, b = ChannelConfig(), ChannelConfig(window=(3,), prefix=(1,))
    one, other, wide = (
        _structure(changed(Config(), model={"channels": {"a": channel}}))
        for channel in (a, b, dataclasses.replace(b, width=8))
    )
    assert one == other != wide


@pytest.mark.parametrize("biased", [True, False])
def test_targets_may_change_where_no_bias_counts_them(biased):
    ranking = changed(Config(), model={"relative_bias": biased}, rank={"tasks": ("like",)})
    more = changed(ranking, rank={"targets": 17})
    assert difference(_structure(ranking), _structure(more)) == ["rank.targets: 16 -> 17"] * biased


def test_items_that_are_gone_are_named(parent, caplog):
    config, data, folder = parent
    fewer = until(stream(), SPAN)
    params, origin = parameters_of(folder, tasks.of(config, fewer), QUIET)
    assert origin["lost_items"] == data.num_items - fewer.num_items > 0
    lost = sorted(set(data.catalog.raw_ids.tolist()) - set(fewer.catalog.raw_ids.tolist()))
    assert f"are not here any more, and their entries are left out: {lost[0]!r}" in caplog.text
    others = dataclasses.replace(
        data, catalog=dataclasses.replace(data.catalog, raw_ids=data.catalog.raw_ids + 10**6)
    )
    with pytest.raises(ValueError, match="knows none of the .* items here"):
        parameters_of(folder, tasks.of(config, others), QUIET)


def test_a_mesh_starts_with_the_same_rows(parent):
    """Tables are divided by entries there."""
    config, data, folder = parent
    task = tasks.of(config, stream())
    alone, _ = parameters_of(folder, task, QUIET)
    meshed = with_(config, parallel__data=8)
    params, _ = parameters_of(folder, tasks.of(meshed, stream()), QUIET)
    table = params["embedding"]["item_table"][...]
    assert len(table.sharding.device_set) == 8
    entries = task.interactions.num_items + 1
    np.testing.assert_allclose(
        np.asarray(table)[:entries], np.asarray(alone["embedding"]["item_table"][...]), atol=1e-7
    )
    assert not np.asarray(table)[entries:].any()


# --- room in tables ---


@pytest.mark.parametrize("kind", ["sampled", "full"])
def test_entries_that_are_but_room_are_no_items(kind):
    """Neither negatives nor parts of a softmax, nor ranked, whatever they hold."""
    rng = np.random.default_rng(0)
    h_TD, table_ID = (jnp.asarray(rng.normal(size=(n, 4)), jnp.float32) for n in (6, 9))
    roomy_ID = jnp.concatenate([table_ID, 9 * jnp.ones((7, 4))])
    items_1 = jnp.array([8], jnp.int32)
    known_I = there_are(items_1, roomy_ID)
    target_T, key = jnp.asarray(rng.integers(1, 9, 6)), jax.random.key(0)
    options = {"temperature": 1.0, "l2_normalize": False, "chunk_rows": 4}
    found = []
    for table_XD, items, corpus_I in ((table_ID, 8, None), (roomy_ID, items_1[0], known_I)):
        drawn = drawn_uniformly(jax.random.split(key, 6), 5, items) if kind == "sampled" else None
        number = None if corpus_I is None else items
        fixed = {"num_items": number, "negatives": drawn, **options}

        def loss(h_TD, table_XD, fixed=fixed):
            return softmax_loss(h_TD, table_XD, target_T, jnp.ones(6), **fixed)[0]

        value, (dh, dtable) = jax.value_and_grad(loss, (0, 1))(h_TD, table_XD)
        assert not np.asarray(dtable)[9:].any()
        rank_T = ranks(h_TD, table_XD, target_T, l2_normalize=False, corpus_I=corpus_I)
        found.append((value, dh, dtable[:9], rank_T))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *found)
