"""Whole runs under a mesh.

Checkpoints go from one mesh to another, and a trained run is evaluated on one device.
"""

import dataclasses

import numpy as np
import pytest
from rich.console import Console

from tests.small_run import small_config, with_
from ultra_hstu import tasks
from ultra_hstu.report import read_metrics
from ultra_hstu.serving import load_params
from ultra_hstu.train import train
from ultra_hstu.workdir import Workdir

QUIET = Console(quiet=True)


def config(folder, data, context, epochs=2, **fields):
    base = small_config(folder, epochs=epochs, steps_per_call=4)
    sizes = dict(
        data__batch_tokens=128,
        model__implementation="reference",
        model__relative_bias=False,
        model__layers=1,
        model__window=(4,),
    )
    return with_(base, **sizes, parallel__data=data, parallel__context=context, **fields)


def test_a_run_goes_on_in_another_mesh(tmp_path):
    """An epoch on 8 x 1, the next on 2 x 4 with another size of the tables.

    Logs and metrics equal those of one device.
    """
    one = train(
        config(tmp_path / "data", 1, 1, parallel__groups=8), tmp_path / "one", console=QUIET
    )
    first = config(tmp_path / "data", 8, 1, epochs=1)
    task = tasks.load(first)
    train(first, tmp_path / "run", console=QUIET, task=task)
    assert Workdir(tmp_path / "run").read_config().parallel.groups == 8
    many = train(
        config(tmp_path / "data", 2, 4, parallel__fsdp=True), tmp_path / "run", console=QUIET
    )
    records, expected = (read_metrics(Workdir(tmp_path / name).metrics) for name in ("run", "one"))
    assert [record["epoch"] for record in records] == [1, 2]
    for record, want in zip(records, expected, strict=True):
        assert record["step"] == want["step"] and record["loss"] == pytest.approx(
            want["loss"], rel=1e-4
        )
    assert many["steps"] == one["steps"] and many["best"]["mrr"] == pytest.approx(
        one["best"]["mrr"], rel=1e-2
    )

    with pytest.raises(
        ValueError,
        match="packs its batches in parallel.groups=8, which parallel.data=3 does not divide",
    ):
        train(config(tmp_path / "data", 3, 1), tmp_path / "run", console=QUIET)
    with pytest.raises(ValueError, match="parallel.groups: 8 -> 4"):
        train(config(tmp_path / "data", 4, 2, parallel__groups=4), tmp_path / "run", console=QUIET)

    alone = Workdir(tmp_path / "run").read_config().on_one_device()
    assert alone.parallel == dataclasses.replace(alone.parallel, data=1, context=1, groups=8)
    task = tasks.of(alone, task.interactions)
    _, params = load_params(Workdir(tmp_path / "run"), task.recipe)
    assert params["embedding"]["item_table"].shape == (121, 16)
    found = task.evaluator("test")(params)
    assert {name: found[name] for name in ("hr@10", "mrr")} == pytest.approx(
        {name: many["best"][name] for name in ("hr@10", "mrr")}, rel=1e-5
    )
    assert np.isfinite(found["ndcg@10"])
