"""Whole runs under a mesh, with all pieces of the four papers.

Checkpoints go from one mesh to another, and a trained run is evaluated and served on one device.
"""

import dataclasses

import numpy as np
import pytest
from rich.console import Console

from tests.ranking.small_everything import everything, write_ratings
from ultra_hstu import tasks
from ultra_hstu.fields import changed
from ultra_hstu.library import respond
from ultra_hstu.report import read_metrics
from ultra_hstu.serving import load_params
from ultra_hstu.serving.service import open_service
from ultra_hstu.train import train
from ultra_hstu.workdir import Workdir

QUIET = Console(quiet=True)


def test_a_run_goes_on_in_another_mesh(tmp_path):
    """An epoch on 2 x 4 devices, the next on one, with another size of the tables.

    Logs and metrics equal those of one device. Not in FP8: a sum in another order may round to the
    next of its few values, which later steps carry on.
    """
    write_ratings(tmp_path / "raw")

    def config(epochs, **parallel):
        small = everything(tmp_path, **parallel)
        return changed(small, model={"projection": "same"}, train={"epochs": epochs})

    expected = train(config(2), tmp_path / "one", console=QUIET)
    folder = Workdir(tmp_path / "run")
    train(config(1, data=2, context=4), folder.path, console=QUIET)
    many = train(config(2, groups=None), folder.path, console=QUIET)
    assert folder.read_config().parallel.groups == 8
    records, wanted = (read_metrics(Workdir(tmp_path / name).metrics) for name in ("run", "one"))
    assert [record["epoch"] for record in records] == [1, 2]
    for record, want in zip(records, wanted, strict=True):
        assert record["step"] == want["step"]
        for name in ("loss", "ne", "mse"):
            assert record[name] == pytest.approx(want[name], rel=1e-5), name
    assert many["steps"] == expected["steps"]

    with pytest.raises(
        ValueError,
        match="packs its batches in parallel.groups=8, which parallel.data=3 does not divide",
    ):
        train(config(2, data=3, groups=None), folder.path, console=QUIET)
    with pytest.raises(ValueError, match="parallel.groups: 8 -> 4"):
        train(config(2, data=4, context=2, groups=4), folder.path, console=QUIET)

    alone = folder.read_config().on_one_device()
    assert alone.parallel == dataclasses.replace(alone.parallel, data=1, context=1, groups=8)
    task = tasks.load(alone)
    _, params = load_params(folder, task.recipe)
    assert params["embedding"]["item_table"].shape == (61, 16)
    found = task.evaluator("test")(params)
    for name in ("ne", "mse"):
        assert found[name] == pytest.approx(many["best"][name], rel=1e-5)

    answer = respond(open_service(str(folder.path)), {"user": 3, "candidates": [7, 1, 7]})
    first, second, third = (item.scores["rating"] for item in answer.candidates)
    assert np.isfinite([first, second]).all() and first == pytest.approx(third)
