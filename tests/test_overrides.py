"""What a command makes of --config and its overrides, before it reads any data."""

import dataclasses
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from experiments import command, configs
from tests import commands
from ultra_hstu import effects, fields, tasks
from ultra_hstu.config import Config
from ultra_hstu.fields import changed


def made(monkeypatch, name, *overrides):
    """The configuration that a command works with."""
    monkeypatch.setattr(sys, "argv", ["train", *(f"--config.{one}" for one in overrides)])
    sys.argv.insert(2, f"--config={name}")
    command.put_first("config")
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", None, "", values, sys_argv=sys.argv)
    values["config"].parser = command.ConfigParser("config")
    values(sys.argv)
    return command.resolved(holder.value)


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("ml1m_rank_ultra", "data.max_history=9", "set model.channels.liked.max_history or model."),
        ("ml1m_rank_ultra", "model.layers=5", "beside model.channels: set model.channels.liked.la"),
        ("ml1m_hstu", "data.ties_seed=1", "under data.ties=stable"),
        ("ml1m_hstu", "data.temporal_test_fraction=0.1", "under train.protocol=published"),
        ("ml1m_hstu", "data.new_users_fraction=0.1", "'new_users' reads it"),
        ("synthetic", "data.synthetic_long.users=9", "under data.source=synthetic"),
        ("ml1m_hstu", "data.subsequence=recent", "without data.stochastic_length"),
        ("ml1m_hstu", "data.recalibrate_every=5", "without data.load_balance"),
        ("ml1m_hstu", "data.synthetic.users=9", "under data.source=ml-1m"),
        ("table", "data.table.sample_seed=1", "without data.table.sample_users"),
        ("table", "data.table.item_title=name", "without data.table.items_file"),
        ("ml1m_sasrec", "model.qk_width=9", "under model.kind=sasrec: use hstu"),
        ("ml1m_hstu", "model.ffn_width=9", "under model.kind=hstu"),
        ("ml1m_rank_din", "model.heads=9", "under model.kind=din: use hstu"),
        ("ml1m_hstu", "rank.requests=one", "retrieval asks for the next item"),
        ("synthetic", "model.time_buckets=9", "under model.relative_bias=False"),
        ("ml1m_rank_hstu", "loss.temperature=0.1", "for ranking"),
        ("ml1m_hstu", "loss.log_q=False", "under loss.kind=sampled"),
        ("ml1m_hstu", "rank.head_width=8", "retrieval asks for the next item"),
    ],
)
def test_overrides_without_effect_are_refused(monkeypatch, name, override, message):
    field = override.split("=")[0]
    with pytest.raises(ValueError, match=f"--config.{field} has no effect .*{message}"):
        made(monkeypatch, name, override)


def test_a_public_set_has_its_own_columns(monkeypatch):
    with pytest.raises(ValueError, match="data.table.user='u' does nothing under data.source='ml-"):
        made(monkeypatch, "ml1m_hstu", "data.table.user=u")


def test_overrides_with_effect_are_taken(monkeypatch):
    own = [f"model.channels.liked.{one}" for one in ("layers=4", "window=(3,)", "width=16")]
    config = made(monkeypatch, "ml1m_rank_ultra", *own, "train.epochs=2")
    liked = config.model.channels["liked"]
    assert (liked.layers, liked.window, liked.width) == (4, (3,), 16) and config.train.epochs == 2
    loss = made(monkeypatch, "ml1m_hstu", "loss.kind=in_batch", "loss.log_q=False").loss
    assert (loss.kind, loss.log_q) == ("in_batch", False)
    assert made(monkeypatch, "ml1m_hstu", "loss.rows_per_draw=4").loss.rows_per_draw == 4
    with pytest.raises(ValueError, match="loss.rows_per_draw has no effect under loss.kind=full"):
        made(monkeypatch, "ml1m_hstu", "loss.kind=full", "loss.rows_per_draw=4")
    # The same command goes on where there is one device.
    assert made(monkeypatch, "ml1m_hstu", "parallel.strategy=ulysses").parallel.context == 1


@pytest.mark.parametrize("name", configs.CONFIGS)
def test_fields_without_effect_exist(name):
    """So that a renamed field is not forgotten."""
    config = configs.named(name)
    known = set(fields.paths(dataclasses.asdict(config)))
    assert effects.without_effect(config).keys() <= known


def test_show_marks_what_the_encoder_or_the_task_does_not_read():
    names = ("ml1m_sasrec", "long_ultra_paper", "everything")
    idle = {name: effects.without_effect(configs.named(name)).keys() for name in names}
    assert idle["ml1m_sasrec"] >= {"model.window", "model.divide_by", "model.uvqk_std"}
    assert not idle["ml1m_sasrec"] & {"model.ffn_width", "model.remat", "model.chunk_rows"}
    assert "model.alpha" in idle["long_ultra_paper"] and "model.uvqk_std" in idle["everything"]
    assert not idle["long_ultra_paper"] & {"model.window", "model.uvqk_std", "eval.hide"}
    assert idle["everything"] >= {"eval.hide", "eval.repeats", "features.merge"}


def test_paths_are_absolute_from_then_on(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    data = made(monkeypatch, "table", "data.raw_dir=a/*.csv", "data.table.items_file=~/i").data
    assert (data.raw_dir, data.data_dir) == (f"{tmp_path}/a/*.csv", None)
    assert data.table.items_file == str(Path.home() / "i")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": {"signals": ("loved",)}}, "rank.signals: unknown signal 'loved': .* rating"),
        (
            {"rank": {"tasks": ("like",)}, "train": {"protocol": "chronological"}},
            "rank.tasks: unknown task 'like'",
        ),
        ({"rank": {"features": ("tab",)}}, "rank.features: unknown feature 'tab'"),
        ({"data": {"source": "ml-20m"}, "rank": {"contextual": ("age",)}}, "rank.contextual=.*"),
        ({"data": {"source": "synthetic", "raw_dir": "x"}}, "data.raw_dir='x' must be None"),
        ({"data": {"source": "assistments-2017"}, "eval": {"time": "last"}}, "eval.time='last'"),
        ({"data": {"source": "amazon-beauty", "ties": "random"}}, "data.ties='random' needs times"),
        ({"model": {"implementation": "cuda"}}, "model.implementation='cuda' is not allowed: use"),
    ],
)
def test_what_a_source_lacks_is_known_before_it_is_read(monkeypatch, fields, message):
    monkeypatch.setattr(tasks, "load_interactions", lambda config: pytest.fail("data is read"))
    config = changed(Config(), data={"source": "ml-1m"})
    with pytest.raises(ValueError, match=message):
        tasks.load(changed(config, **fields))


@pytest.mark.parametrize(
    ("order", "argv"),
    [
        ("--config.a=1 --config=x --b=2", "--config=x --config.a=1 --b=2"),
        ("--b=2 --config.a=1 --config x", "--config x --b=2 --config.a=1"),
        ("--b=2", "--config=table --b=2"),
    ],
)
def test_flags_may_stand_in_any_order(monkeypatch, order, argv):
    monkeypatch.setattr(sys, "argv", ["train", *order.split()])
    command.put_first("config", "table")
    assert sys.argv[1:] == argv.split()


def test_show_prints_what_would_be_trained(tmp_path):
    arguments = ["--config.model.width=64", "--show", "--config=ml1m_hstu"]
    done = commands.run("experiments.train", *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "* model.width 64 (default 50)" in lines and "model.layers 2" in lines
    assert "model.ffn_width 50 (no effect)" in lines and not list(tmp_path.iterdir())
    assert lines[-1] == "pieces: none"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.width=wide", "model.width=wide is not allowed: use int"),
        ("data.batch_tokens=1.5", "data.batch_tokens=1.5 is not allowed: use int or None"),
        ("model.channels.liked.layers=x", "model.channels.liked.layers=x is not allowed: use int"),
        ("model.channels.liked=x", "model.channels.liked=x is not allowed: use its fields"),
        ("train=3", "train=3 is not allowed: use its fields"),
        ("model.channels=[]", "model.channels=[] is not allowed: use a section for each name"),
        ("model.window=[1.5]", "model.window=(1.5,) is not allowed: use tuple of int"),
    ],
)
def test_misfits_name_the_whole_field_and_its_type(monkeypatch, capsys, override, message):
    values = flags.FlagValues()
    monkeypatch.setattr(flags, "FLAGS", values)
    argv = ["train", "--config=ml1m_rank_ultra", f"--config.{override}"]
    monkeypatch.setattr(sys, "argv", argv)
    holder = config_flags.DEFINE_config_file("config", None, "", values, sys_argv=argv)
    values["config"].parser = command.ConfigParser("config")
    try:
        command.parse(argv)
        command.resolved(holder.value)
    except ValueError as error:
        assert str(error) == message
    except SystemExit:
        assert f"error: {message}\n" in capsys.readouterr().err
    else:
        pytest.fail("nothing is refused")
