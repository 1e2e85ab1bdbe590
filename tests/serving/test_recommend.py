"""Recommendations and the command lines around them."""

import copy
import json
import re

import jax
import numpy as np
import pytest
from rich.console import Console

from tests import commands
from tests.small_run import small_config, with_
from ultra_hstu import tasks
from ultra_hstu.quantization import item_table, unpacked
from ultra_hstu.retrieval.metrics import PUBLISHED_CUTOFF
from ultra_hstu.serving import RecommendationModel, load_params
from ultra_hstu.train import train
from ultra_hstu.workdir import Workdir


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("recommend")
    config = small_config(root / "data", epochs=2)
    train(config, root / "run", console=Console(quiet=True))
    return config, root / "run"


@pytest.fixture(scope="module")
def model(run):
    return RecommendationModel(str(run[1]))


def test_best_unseen_items_in_order(model):
    history = [3, 14, 15, 92]
    answer = model.recommend(history, k=20)
    assert len(answer) == 20
    assert [item.score for item in answer] == sorted((item.score for item in answer), reverse=True)
    assert not {item.item for item in answer} & set(
        model.catalog.decode(np.array(history)).tolist()
    )
    assert answer[0].title.startswith("item ")


def test_the_same_scores_as_evaluation(run, model):
    """The rank that evaluation gives a test target is its place among the recommendations."""

    config, _ = run
    task = tasks.load(config)
    ranks = task.evaluator("test").predict(model.params)
    examples, interactions = task.splits.test, task.interactions
    targets = interactions.items[examples.stop]
    unseen = [
        user
        for user in range(len(examples))
        if targets[user] not in interactions.items[examples.start[user] : examples.stop[user]]
    ]
    assert len(unseen) > 10
    for user in unseen[:5]:
        events, target = slice(examples.start[user], examples.stop[user]), targets[user]
        now = int(interactions.timestamps[examples.stop[user]])
        answer = model.recommend(
            interactions.items[events],
            interactions.timestamps[events],
            now=now,
            k=interactions.num_items,
        )
        assert [item.item for item in answer].index(
            model.catalog.decode(np.array([target]))[0]
        ) + 1 == ranks[user]


def test_an_evaluation_that_hides_all_and_tells_no_future_ranks_as_serving_does(run, model):
    """The whole history is given, without the time of the request."""
    config = with_(run[0], eval__hide="all", eval__time="last")
    task = tasks.load(config)
    ranks = task.evaluator("test").predict(model.params)
    examples, interactions = task.splits.test, task.interactions
    served = []
    for user, stop in zip(examples.user[:8], examples.stop[:8], strict=True):
        events = slice(int(interactions.offsets[user]), int(stop))
        answer = model.recommend(
            interactions.items[events], interactions.timestamps[events], k=interactions.num_items
        )
        listed = [item.item for item in answer]
        target = model.catalog.decode(interactions.items[stop : stop + 1])[0]
        served.append(listed.index(target) + 1 if target in listed else PUBLISHED_CUTOFF + 1)
    assert served == ranks[:8].tolist() and max(served) > PUBLISHED_CUTOFF > min(served)


@pytest.mark.parametrize("tables", ["int8", "int4"])
def test_small_tables_stay_packed_and_answer_as_the_rows_they_give_back(run, model, tables):
    small = RecommendationModel(str(run[1]), tables=tables)
    dense = copy.copy(model)
    dense.params = unpacked(small.params)
    one, other = (served.recommend([3, 14, 15, 92], k=20) for served in (small, dense))
    assert [item.item for item in one] == [item.item for item in other]
    assert [item.score for item in one] == pytest.approx([item.score for item in other], abs=1e-6)
    assert [item.score for item in one] != [
        item.score for item in model.recommend([3, 14, 15, 92], k=20)
    ]
    items, width = item_table(model.params).shape
    saved = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)) - sum(
        leaf.nbytes for leaf in jax.tree.leaves(small.params)
    )
    assert (
        saved
        == items * {"int8": 4 * width - (width + 8), "int4": 4 * width - (width // 2 + 4)}[tables]
    )


def test_only_the_newest_events_count(model):
    newest = model.recommend(
        list(range(21, 31)), k=5, block=list(range(1, 21))
    )  # which the longer history hides
    assert model.recommend(list(range(1, 31)), k=5)[0].score == pytest.approx(newest[0].score)


@pytest.mark.parametrize(
    ("history", "options", "message"),
    [
        ([], {}, "history is empty"),
        ([1], {"k": 0}, "k=0 must be in 1..120"),
        ([1], {"k": 121}, "k=121"),
        ([1, 2], {"times": [5]}, "2 items but 1 times"),
        ([121], {}, "dense ids in 1..120, got 121..121"),
        ([1.5], {}, "must be dense ids .integers., got float64"),
        ([0], {}, "got 0..0"),
    ],
)
def test_bad_requests_are_named(model, history, options, message):
    with pytest.raises(ValueError, match=message):
        model.recommend(history, **options)


def call(module, *arguments):
    return commands.run(f"experiments.{module}", *arguments)


def test_recommend_command(run):
    done = call("recommend", f"--workdir={run[1]}", "--history=5,17, 3", "--k=3")
    assert done.returncode == 0, done.stderr
    assert "after 3 items" in done.stdout and "of category" in done.stdout
    assert "every item of the history is hidden" in done.stdout
    done = call("recommend", f"--workdir={run[1]}", "--user=7", "--k=3")
    assert done.returncode == 0 and "user 7, after 12 events" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--user=9999"], "unknown user 9999"),
        (["--history=1,99999"], "99999"),
        (["--history=1", "--user=3"], "give either --user=ID, or --history"),
        (["--history=1,", "17,", "3"], "what is '17, 3'?"),
        (["--history=1,,3"], "has an empty place"),
        (["--history=1_0"], "whole numbers, not '1_0'"),
        (["--histori=1"], "histori"),
    ],
)
def test_recommend_command_names_what_it_does_not_know(run, arguments, message):
    done = call("recommend", f"--workdir={run[1]}", *arguments)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_a_folder_without_a_run_is_named(tmp_path):
    done = call("recommend", f"--workdir={tmp_path}", "--history=1")
    assert done.returncode == 1 and "holds no run" in done.stderr


def test_evaluate_command(run):
    done = call("evaluate", f"--workdir={run[1]}")
    assert done.returncode == 0, done.stderr
    assert "HR@200" in done.stdout and "popularity" in done.stdout
    assert "eval.hide=window, eval.repeats=hide, eval.time=target" in done.stdout


def test_evaluate_command_takes_other_semantics_and_names_them(run, tmp_path):
    config, workdir = run
    given = ["--config.eval.hide=all", "--config.eval.time", "last"]
    done = call("evaluate", f"--workdir={workdir}", *given, f"--record={tmp_path / 'all.json'}")
    assert done.returncode == 0, done.stderr
    assert "eval.hide=all, eval.repeats=hide, eval.time=last" in done.stdout
    record = json.loads((tmp_path / "all.json").read_text())
    assert record["eval"] == {"hide": "all", "repeats": "hide", "time": "last"}
    task = tasks.load(with_(config, eval__hide="all", eval__time="last"))
    want = task.evaluator("test")(load_params(Workdir(workdir), task.recipe)[1])
    assert record["tables"]["float32"]["metrics"] == pytest.approx(want)
    assert record["baselines"] == task.baselines("test")
    assert len(record["baselines"]) == 4 and set(record["baselines"]) <= set(
        re.findall(r"^  (\S.*?)  ", done.stdout, re.M)
    )
    assert Workdir(workdir).read_config().eval.hide == "window"


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--config.eval.hid=all", "Did you mean: config.eval.hide"),
        ("--config.eval.hide=every", "eval.hide=every is not allowed: use 'window', 'all'"),
        ("--config.eval.time=request", "eval.time='request' is for ranking"),
        ("--config.model.width=8", "Unknown command line flag 'config.model.width'"),
    ],
)
def test_evaluate_command_refuses_other_fields_and_values(run, argument, message):
    done = call("evaluate", f"--workdir={run[1]}", argument)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
