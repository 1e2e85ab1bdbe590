"""Training: exact resume after any death, protocols, clear stops. Runs are tiny but real."""

import dataclasses
import functools
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments.train import warn_below_floor
from tests.ranking import rank_data
from tests.small_run import small_config, with_
from ultra_hstu import tasks
from ultra_hstu.checkpoint import Checkpoints, Position, abstract, load_params
from ultra_hstu.criteria import RETRIEVAL, ranking
from ultra_hstu.data.interactions import ordered
from ultra_hstu.evaluate import Evaluator
from ultra_hstu.json_files import write_json
from ultra_hstu.progress import Epochs
from ultra_hstu.report import read_metrics
from ultra_hstu.retrieval.recipe import Recipe
from ultra_hstu.run import Interrupted
from ultra_hstu.serving import RecommendationModel
from ultra_hstu.step import run_steps
from ultra_hstu.train import train
from ultra_hstu.workdir import Workdir

QUIET = Console(quiet=True)
ROOT = Path(__file__).parent.parent
EPOCHS = 16  # of runs that are killed: ten after the last signal, so that it cannot come too late


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


SCREEN = Console(file=io.StringIO(), width=120)  # of the run that nothing disturbs


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """A run of three epochs that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    config = small_config(data_dir)
    return config, workdir, train(config, workdir, console=SCREEN)


def copy(workdir, folder):
    """The folder of a run, for a test that changes it."""
    return Path(shutil.copytree(workdir, folder / "copy"))


def final_state(config, workdir):
    task = tasks.load(config)
    state = abstract(jax.eval_shape(lambda: task.recipe.init(0)))
    return Checkpoints(Path(workdir).absolute() / "checkpoints", read_only=True).restore(state)


def assert_same_bits(one, other):
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), one, other
    )


def test_steps_end_a_run_within_an_epoch(data_dir, tmp_path):
    """Under `new_users`, whose 54 users that are learned from make seven steps an epoch."""
    config = small_config(data_dir, protocol="new_users", epochs=9, steps=10, eval_every=4)
    result = train(config, tmp_path / "run", console=QUIET)
    assert (result["steps"], result["epochs"], result["best_epoch"]) == (10, 2, 2)
    (first, last) = read_metrics(Workdir(tmp_path / "run").metrics)
    assert (first["step"], last["step"]) == (7, 10) and "ndcg@10" in last.keys() - first.keys()
    assert train(config, tmp_path / "run", console=QUIET) == result
    with pytest.raises(ValueError, match="train.steps"):
        train(with_(config, train__steps=11), tmp_path / "run", console=QUIET)


def test_learns_and_writes_everything(finished):
    config, workdir, result = finished
    folder = Workdir(workdir)
    records = read_metrics(folder.metrics)
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert records[-1]["loss"] < records[0]["loss"]
    assert json.loads(folder.result.read_text()) == result
    assert result["eval"] == {"hide": "window", "repeats": "hide", "time": "target"}
    assert all(record["repeats"] == result["best"]["repeats"] for record in records)
    assert result["best"]["ndcg@10"] == max(record["ndcg@10"] for record in records)
    assert result["last"] == {name: records[-1][name] for name in result["last"]}
    assert folder.curves.read_bytes().startswith(b"\x89PNG")
    assert list(folder.tensorboard.iterdir()) and folder.catalog.exists()


def test_one_compilation_for_all_batches(data_dir):
    """Every group of every epoch has the same shapes.

    For another one the compiled call of a run would raise: it does not compile again.
    """
    loader = tasks.load(small_config(data_dir)).loader("train", batch_users=8, steps_per_call=3)
    take = jax.jit(lambda feed, steps: steps)
    for epoch in range(3):
        groups = list(loader.groups(loader.plan(seed=1, epoch=epoch)))
        assert [int(take(group.feed, np.int32(group.steps))) for group in groups] == [3, 3, 2]
    assert take._cache_size() == 1


def command(config, workdir, **overrides):
    flags = [f"--config.{name.replace('__', '.')}={value}" for name, value in overrides.items()]
    return [
        sys.executable,
        "-m",
        "experiments.train",
        f"--config={ROOT}/tests/small_config.py:{config.data.data_dir}",
        f"--workdir={workdir}",
        *flags,
    ]


def start(command):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_epochs(process, workdir, count, seconds=120):
    metrics = Workdir(workdir).metrics
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and len(metrics.read_text().splitlines()) >= count:
            return
        time.sleep(0.002)
    output = process.communicate(timeout=5)[0] if process.poll() is not None else ""
    raise AssertionError(f"no {count} epochs in time; exit {process.poll()}\n{output}")


def test_killed_and_terminated_runs_end_with_the_same_bits(data_dir, tmp_path):
    config = small_config(data_dir, epochs=EPOCHS)
    train(config, tmp_path / "undisturbed", console=QUIET)
    disturbed = tmp_path / "disturbed"
    process = start(command(config, disturbed, train__epochs=EPOCHS))
    wait_for_epochs(process, disturbed, 3)
    process.kill()
    process.communicate()
    process = start(command(config, disturbed, train__epochs=EPOCHS))
    wait_for_epochs(process, disturbed, 6)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "stopped by SIGTERM" in output, output
    assert "SIGTERM: stopping: the " in output and "and the state is saved, in about" in output
    process = start(command(config, disturbed, train__epochs=EPOCHS))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "going on from step" in output, output

    step, state, position = final_state(config, disturbed)
    expected_step, expected_state, expected_position = final_state(config, tmp_path / "undisturbed")
    assert step == expected_step
    assert_same_bits(state, expected_state)
    clocks = {"seconds": 0, "compile_seconds": 0}
    assert position | clocks == expected_position | clocks
    epochs = [record["epoch"] for record in read_metrics(Workdir(disturbed).metrics)]
    assert epochs == list(range(1, EPOCHS + 1)), "every epoch stands in the log once"


def test_a_stop_in_the_last_call_of_an_epoch_keeps_its_evaluation(finished, tmp_path, monkeypatch):
    """All 8 batches of an epoch in one call, so that the stop is always in the last one.

    Calls of 3 give the same bits.
    """
    config, undisturbed, expected = with_(finished[0], train__steps_per_call=16), *finished[1:]
    calls = []
    evaluate = Evaluator.__call__

    def evaluate_and_signal(self, params):
        calls.append(1)
        if len(calls) in (
            2,
            3,
        ):  # SIGTERM arrives during the evaluation of the second epoch, and of the last one
            signal.raise_signal(signal.SIGTERM)
        return evaluate(self, params)

    monkeypatch.setattr(Evaluator, "__call__", evaluate_and_signal)
    for _ in range(2):
        with pytest.raises(Interrupted, match="stopped by SIGTERM"):
            train(config, tmp_path / "disturbed", console=QUIET)
    result = train(config, tmp_path / "disturbed", console=QUIET)
    clocks = {"seconds": 0, "compile_seconds": 0}
    assert result | clocks == expected | clocks
    assert_same_bits(
        final_state(config, tmp_path / "disturbed")[1], final_state(config, undisturbed)[1]
    )


def test_a_run_says_what_it_does_and_a_finished_one_says_so(finished):
    config, workdir, result = finished
    said = [line for line in SCREEN.file.getvalue().splitlines() if " so far" not in line]
    assert [line.split()[0] for line in said] == [
        *("data", "model", "pieces", "compile"),
        *["epoch"] * 3,
        "result",
    ]
    assert re.fullmatch(r"data .* 60 users, 120 items, 720 events \(\d+\.\d s\)", said[0])
    assert re.fullmatch(r"model     hstu, 3,576 parameters,( \w+ xla,)* 8 steps an epoch", said[1])
    assert said[2] == "pieces    a loss in chunks of 64 rows"
    assert re.fullmatch(r"epoch     1/3 +loss 8.* best  \S+ s, \S+ s left", said[4])
    assert "left" not in said[6] and "finished: 3 epochs in" in said[7]
    again = Console(file=io.StringIO(), width=120)
    assert train(config, workdir, console=again) == result
    text = again.file.getvalue()
    assert "finished before, after 3 epochs: its result is given again" in text
    assert "compil" not in text


def test_a_profiled_run_has_the_same_numbers_and_a_table(finished, tmp_path):
    config, workdir, _ = finished
    screen = Console(file=io.StringIO(), width=120)
    train(config, tmp_path / "run", console=screen, profile=True)
    losses = [
        [record["loss"] for record in read_metrics(folder / "metrics.jsonl")]
        for folder in (workdir, tmp_path / "run")
    ]
    assert losses[0] == losses[1]
    assert re.search(r"attention +\d", screen.file.getvalue())
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    with pytest.raises(ValueError, match="finished before.*--profile needs steps"):
        train(config, tmp_path / "run", console=QUIET, profile=True)


def test_after_a_signal_no_call_is_started(data_dir, tmp_path, monkeypatch):
    """It arrives when the first call was read and the second runs."""
    first = iter([signal.SIGINT])
    monkeypatch.setattr(Epochs, "reached", lambda *_: [*map(signal.raise_signal, first)])
    config = small_config(data_dir, epochs=1, steps_per_call=1)
    with pytest.raises(Interrupted, match="stopped by SIGINT at step 2, epoch 1; ") as stop:
        train(config, tmp_path, console=QUIET)
    assert stop.value.signal == signal.SIGINT
    assert final_state(config, tmp_path)[2]["batch"] == 2


def test_a_kill_in_a_long_epoch_loses_minutes(finished, tmp_path, monkeypatch):
    config, undisturbed, expected = finished
    often = with_(config, train__checkpoint_minutes=1e-9)
    save, saved = Checkpoints.save, []

    def save_and_die(self, step, *arguments, **options):
        save(self, step, *arguments, **options)
        self.wait()
        saved.append(step)
        if step == 11:  # the first call of the second epoch has ended
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train(often, tmp_path, console=QUIET)
    monkeypatch.undo()
    assert saved == [0, 3, 6, 8, 11]
    result = train(config, tmp_path, console=QUIET)
    clocks = {"seconds": 0, "compile_seconds": 0}
    assert result | clocks == expected | clocks
    assert_same_bits(final_state(config, tmp_path)[1], final_state(config, undisturbed)[1])


def test_other_data_is_refused_before_anything_is_written(finished, tmp_path):
    config, workdir, _ = finished
    tmp_path = copy(workdir, tmp_path)
    task = tasks.load(config)
    swapped = task.interactions.items.copy()
    swapped[:2] = swapped[1::-1]
    other = tasks.of(config, dataclasses.replace(task.interactions, items=swapped))
    before = (tmp_path / "catalog.npz").read_bytes()
    with pytest.raises(ValueError, match="the data is not what .* was trained on .*\n  sha256: "):
        train(config, tmp_path, console=QUIET, task=other)
    assert (tmp_path / "catalog.npz").read_bytes() == before


def test_fewer_epochs_than_trained_are_refused(finished, tmp_path):
    config, workdir, _ = finished
    with pytest.raises(ValueError, match="train.epochs=2, but this run has trained 3 epochs"):
        train(with_(config, train__epochs=2), copy(workdir, tmp_path), console=QUIET)


def test_a_damaged_best_checkpoint_is_no_other_epochs_result(finished, tmp_path, monkeypatch):
    config, _, _ = finished
    scores = iter([0.9, 0.1, 0.2, 0.3])
    monkeypatch.setattr(
        Evaluator, "__call__", lambda self, params: {"ndcg@10": next(scores), "hr@10": 0.0}
    )
    train(config, tmp_path, console=QUIET)
    for file in (tmp_path / "checkpoints" / "8").rglob("*"):
        if file.is_file():
            os.truncate(file, 0)
    with pytest.raises(
        ValueError, match="the best checkpoint, of epoch 1, cannot be read any more"
    ):
        train(config, tmp_path, console=QUIET)


def test_patience_counts_evaluated_epochs(data_dir, tmp_path, monkeypatch):
    config = small_config(data_dir, epochs=9, eval_every=4, patience=2)
    scores = iter([0.5, 0.4, 0.5])
    monkeypatch.setattr(
        Evaluator, "__call__", lambda self, params: {"ndcg@10": next(scores), "hr@10": 0.0}
    )
    result = train(config, tmp_path, console=QUIET)
    assert (result["epochs"], result["best_epoch"], result["last"]["ndcg@10"]) == (8, 4, 0.4)


def test_a_damaged_checkpoint_is_passed_over(finished, tmp_path, caplog):
    config, undisturbed, _ = finished
    tmp_path = copy(undisturbed, tmp_path)
    newest = max(
        (tmp_path / "checkpoints").iterdir(),
        key=lambda path: int(path.name) if path.name.isdigit() else -1,
    )
    for file in newest.rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)
    train(config, tmp_path, console=QUIET)
    assert "checkpoint cannot be read, trying the one before it" in caplog.text
    assert_same_bits(final_state(config, tmp_path)[1], final_state(config, undisturbed)[1])


def test_all_checkpoints_damaged_is_an_error(finished, tmp_path):
    config, workdir, _ = finished
    tmp_path = copy(workdir, tmp_path)
    for file in (tmp_path / "checkpoints").rglob("*"):
        if file.is_file():
            os.truncate(file, 0)
    with pytest.raises(ValueError, match="no checkpoint can be read"):
        train(with_(config, train__epochs=4), tmp_path, console=QUIET)


@pytest.mark.parametrize("protocol", ["validated", "temporal"])
def test_protocols_look_at_the_test_items_once(data_dir, tmp_path, protocol):
    config = with_(
        small_config(data_dir, protocol=protocol, patience=1, epochs=6),
        data__temporal_test_fraction=0.5,
    )
    if protocol == "temporal":
        # Records of the synthetic stream follow one another in time: interleave them, so that users
        # live on both sides of the cut.
        task = tasks.load(with_(config, train__protocol="published"))
        times = np.tile(np.arange(12), 60) * 1000 + np.repeat(np.arange(60), 12)
        task = tasks.of(config, ordered(dataclasses.replace(task.interactions, timestamps=times)))
    else:
        task = tasks.load(config)
    trial = train(config, tmp_path, console=QUIET, task=task, split="validation")
    assert trial["split"] == "validation" and "validation" not in trial
    result = train(config, tmp_path, console=QUIET, task=task)  # goes on to the test items
    assert result["validation"] == trial["best"] != result["best"]
    # Only some parts have targets that training has never seen.
    best, validation = ({k for k in result[of] if "/new" not in k} for of in ("best", "validation"))
    assert result["split"] == "test" and best == validation
    assert "last" not in result
    assert all(
        record["split"] == "validation" for record in read_metrics(Workdir(tmp_path).metrics)
    )


def test_a_trial_needs_validation_items(finished, tmp_path):
    config, _, _ = finished
    with pytest.raises(ValueError, match="'published' has no validation items to measure a trial"):
        train(config, tmp_path, split="validation")
    with pytest.raises(ValueError, match="split='valid' is not allowed"):
        train(config, tmp_path, split="valid")


def test_streamed_training_equals_training_from_the_device(finished, tmp_path):
    config, workdir, _ = finished
    streamed = with_(config, data__placement="stream")
    train(streamed, tmp_path, console=QUIET)
    assert_same_bits(final_state(streamed, tmp_path)[1], final_state(config, workdir)[1])


def test_padded_layout_trains_to_the_same_losses_without_dropout(data_dir, tmp_path):
    config = with_(
        small_config(data_dir, epochs=1),
        model__input_dropout=0.0,
        model__linear_dropout=0.0,
        loss__kind="full",
    )
    train(config, tmp_path / "jagged", console=QUIET)
    train(with_(config, data__layout="padded"), tmp_path / "padded", console=QUIET)
    jagged, padded = (
        read_metrics(Workdir(tmp_path / name).metrics)[0] for name in ("jagged", "padded")
    )
    assert jagged["loss"] == pytest.approx(padded["loss"], rel=1e-5)


@pytest.mark.parametrize("kind", ["in_batch", "full"])
def test_other_losses_learn(data_dir, tmp_path, kind):
    config = with_(small_config(data_dir), loss__kind=kind)
    train(config, tmp_path, console=QUIET)
    records = read_metrics(Workdir(tmp_path).metrics)
    assert records[-1]["loss"] < records[0]["loss"]


def test_a_loss_that_is_not_finite_stops_the_run(data_dir, tmp_path):
    config = with_(small_config(data_dir, epochs=1), model__kind="sasrec")
    train(config, tmp_path, console=QUIET)
    good = final_state(config, tmp_path)
    broken = with_(config, train__epochs=2, optim__learning_rate=1e38)
    write_json(
        tmp_path / "config.json", dataclasses.asdict(broken)
    )  # only a test may change a run's learning rate
    with pytest.raises(
        FloatingPointError,
        match=r"step \d+ .*learning rate 1e\+38, gradient norm .*last good checkpoint",
    ):
        train(broken, tmp_path, console=QUIET)
    assert final_state(config, tmp_path)[0] == good[0]
    assert_same_bits(final_state(config, tmp_path)[1], good[1])


def test_recipe_step_is_pure(finished):
    config, _, _ = finished
    task = tasks.load(config)
    loader = task.loader("train", batch_users=8, steps_per_call=1)
    group = next(iter(loader.groups(loader.plan())))
    recipe = Recipe(config, task.interactions.num_items)
    state = recipe.init(0)
    step = jax.jit(recipe.step)
    assert_same_bits(step(state, group.feed.batch(0)), step(state, group.feed.batch(0)))


def test_what_cannot_be_read_back_is_known_before_the_first_step(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoints, "_other_rows", lambda *_: 1 / 0)
    with pytest.raises(ValueError, match="just written cannot be read back: choose another --work"):
        train(small_config(data_dir), tmp_path, console=QUIET)
    assert not Workdir(tmp_path).metrics.exists()
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]


def test_a_run_killed_before_its_first_step_is_not_trained(finished, tmp_path):
    """Its folder may hold the checkpoint that was written to try it out."""
    recipe = Recipe(finished[0], 10)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(0, recipe.init(0), {})
    checkpoints.close()
    with pytest.raises(ValueError, match="has no checkpoint yet: train it first"):
        load_params(Workdir(tmp_path), recipe)


def test_a_position_of_another_version_is_named():
    assert Position.of({"epoch": 3}, "checkpoint 7").epoch == 3
    with pytest.raises(ValueError, match="checkpoint 7 holds epochs, which this version does not"):
        Position.of({"epochs": 3}, "checkpoint 7")


def test_exploded_weights_are_reported(data_dir, tmp_path, caplog):
    config = with_(small_config(data_dir, epochs=1), optim__learning_rate=1e20)
    result = train(config, tmp_path, console=QUIET)
    assert re.search(r"a parameter has grown to .*e\+20: the run has diverged", caplog.text)
    caplog.clear()
    baselines = {"popularity": {"ndcg@10": 0.1}, "last": {"ndcg@10": 0.9}}
    poor = result | {"best": {"ndcg@10": 0.2}, "last": {"ndcg@10": 0.05}}
    warn_below_floor(poor, baselines, RETRIEVAL)
    assert "last epoch: NDCG@10 is 0.0500, no better than 0.1000 of popularity" in caplog.text
    assert "best epoch" not in caplog.text
    caplog.clear()
    nothing = {"seed": 1, "best": {"ne": float("nan")}}
    warn_below_floor(nothing, {"base rate": {"ne": 1.0}}, ranking({"like": "binary"}))
    assert "seed 1, best epoch: NE is nan" in caplog.text


def test_without_jit_a_recipe_is_refused(finished):
    with jax.disable_jit(), pytest.raises(ValueError, match="JAX_DISABLE_JIT is set, but compiled"):
        Recipe(finished[0], 10)


def test_with_64_bits_the_numbers_are_the_same(finished, tmp_path):
    """JAX_ENABLE_X64 changes what an array without a dtype is: every one has a dtype."""
    config, workdir, expected = finished
    with jax.enable_x64(True):
        result = train(config, tmp_path / "run", console=QUIET)
        answer = RecommendationModel(str(tmp_path / "run")).recommend([3, 5], k=4)
    clocks = {"seconds": 0, "compile_seconds": 0}
    assert result | clocks == expected | clocks
    assert_same_bits(final_state(config, tmp_path / "run")[1], final_state(config, workdir)[1])
    assert answer == RecommendationModel(str(workdir)).recommend([3, 5], k=4)


def test_with_64_bits_ranking_is_the_same():
    task = tasks.of(rank_data.config(), rank_data.interactions())
    loader = task.loader("train", batch_users=4, steps_per_call=2)
    group = next(iter(loader.groups(loader.plan())))
    found = []
    for wide in (False, True):
        with jax.enable_x64(wide):
            run = jax.jit(functools.partial(run_steps, task.recipe))
            state, history = run(task.recipe.start(0), group.feed, np.int32(group.steps))
            found.append((state, history, task.evaluator("test").predict(state.params)))
    assert_same_bits(*found)
