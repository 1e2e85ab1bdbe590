"""Configurations: every file is valid, and every impossible value is named."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_origin, get_type_hints

import numpy as np
import pytest
from absl import flags

from experiments import configs
from experiments.command import ConfigParser
from tests.serving.small_serving import unchecked
from ultra_hstu import criteria
from ultra_hstu.config import ChannelConfig, Config, from_config_dict, to_config_dict
from ultra_hstu.fields import Section, changed, difference
from ultra_hstu.nn import fp8
from ultra_hstu.nn.hstu import HSTU
from ultra_hstu.nn.remat import policy_of
from ultra_hstu.serving.scoring import ScoringModel

ROOT = Path(__file__).parent.parent
NAMES = """
    synthetic ml100k_hstu ml1m_sasrec ml1m_hstu ml1m_hstu_large ml1m_ultra ml20m_sasrec ml20m_hstu
    ml20m_hstu_large books_sasrec books_hstu books_hstu_large beauty_sasrec beauty_hstu
    assistments_rank_hstu assistments_rank_ultra ml1m_rank_hstu ml1m_rank_ultra kuairand_rank_hstu
    kuairand_rank_ultra long_ultra long_mst
""".split()


@pytest.mark.parametrize("name", configs.CONFIGS)
def test_configurations_are_valid(name):
    config = configs.named(name)
    config.validate()
    assert config.name == name
    assert from_config_dict(to_config_dict(config)) == config


def test_the_promised_configurations_exist():
    assert set(NAMES) == configs.CONFIGS.keys()


def parsed(path):
    return from_config_dict(ConfigParser("config").parse(path))


@pytest.mark.parametrize(
    "path",
    [
        "ml1m_hstu",
        "experiments/configs/ml1m_hstu.py",
        "/any/where/experiments/configs/ml1m_hstu.py",
    ],
)
def test_a_name_and_the_path_of_records_are_the_same(path):
    assert parsed(path) == configs.named("ml1m_hstu")


@pytest.mark.filterwarnings("ignore:the load_module")  # by ml_collections
def test_own_files(tmp_path):
    file = tmp_path / "ml1m_hstu.py"
    file.write_text(
        "from experiments import configs\n"
        "from ultra_hstu.config import to_config_dict\n"
        "def get_config(name='synthetic'): return to_config_dict(configs.named(name))\n"
    )
    assert parsed(str(file)).name == "synthetic"
    assert parsed(f"{file}:ml20m_hstu").name == "ml20m_hstu"


@pytest.mark.parametrize(
    "path", ["ml2m_hstu", "experiments/configs/ml2m_hstu.py", "elsewhere/own.py:argument"]
)
def test_an_unknown_name_lists_the_known_ones(path):
    with pytest.raises(ValueError, match="no configuration .*: give the path of a file, or one of"):
        parsed(path)


def documents():
    yield ROOT / "README.md"
    yield from (ROOT / "docs").glob("*.md")
    yield from (ROOT / "experiments" / "results").glob("*.json")
    for folder in ("experiments", "scripts"):
        yield from (ROOT / folder).rglob("*.py")


def test_every_configuration_that_a_page_or_a_record_names_exists():
    named = {
        path
        for document in documents()
        for path in re.findall(r"--(?:config|baseline)=([\w./]+)", document.read_text())
    }
    assert {"experiments/configs/ml1m_hstu.py", "experiments/configs/long_ultra.py"} <= named
    for path in named - {"NAME", "..."}:
        assert parsed(path).name in NAMES, path


def test_round_trip():
    assert from_config_dict(to_config_dict(Config())) == Config()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model.width", 0, "model.width=0 must be greater than 0"),
        ("model.width", "wide", "model.width='wide' is not allowed: use int"),
        ("model.kind", "transformer", "use 'hstu', 'sasrec'"),
        ("model.input_dropout", 1.0, r"model.input_dropout=1.0 must be in \[0, 1\)"),
        ("data.ties", "last", "use 'stable', 'random'"),
        (
            "data.batch_tokens",
            50,
            "batch_tokens=50 cannot hold one history of data.max_history=200",
        ),
        ("data.temporal_test_fraction", 1.0, "temporal_test_fraction=1.0"),
        ("data.synthetic.length", 2, "synthetic.length=2 must be at least 3"),
        ("optim.learning_rate", float("nan"), "learning_rate=nan"),
        ("train.epochs", 2.5, "train.epochs=2.5 is not allowed: use int"),
        ("train.seed", -1, "train.seed=-1 must be at least 0"),
        ("train.seed", 2**32, "must be below 2\\^32"),
        ("loss.temperature", float("inf"), "loss.temperature=inf is not allowed"),
        ("data.synthetic.prior_categories", 0, "prior_categories=0 must be greater than 0"),
        ("data.synthetic.max_concentration", 0.5, "max_concentration=0.5 must be at least 1"),
        ("train.sed", 1, "unknown config field train.sed: did you mean train.seed"),
        ("evl", {}, "unknown config field evl: did you mean eval"),
        ("colour", 1, "unknown config field colour: there are name, data, model, .*, eval"),
        ("eval.hide", "some", "eval.hide='some' is not allowed: use 'window', 'all'"),
        ("eval.time", "request", "eval.time='request' is for ranking"),
    ],
)
def test_impossible_values_are_named(field, value, message):
    values = dataclasses.asdict(Config())
    *sections, name = field.split(".")
    target = values
    for section in sections:
        target = target[section]
    target[name] = value
    with pytest.raises(ValueError, match=message):
        from_config_dict(values)


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--config.evl.hide=all", "unknown config field evl.hide: did you mean eval.hide"),
        ("--config.eval.hid", "eval.hid: did you mean eval.hide"),
        ("--config.model.max_history=9", "did you mean .*data.max_history"),
        ("--noconfig.data.load_ballance", "did you mean data.load_balance"),
        ("--config.colour=red", "colour: there are data, eval, loss, model, name,"),
        ("--config.eval.hide=all", None),
        ("--config.eval=1", None),  # a value of the wrong type, which its own parser names
    ],
)
def test_overrides_of_unknown_fields_are_refused_with_near_names(monkeypatch, argument, message):
    monkeypatch.setattr(sys, "argv", ["train", "--config=ml1m_hstu", argument, "all"])
    if message is None:
        assert parsed("ml1m_hstu") == configs.named("ml1m_hstu")
        return
    with pytest.raises(flags.Error, match=message):
        parsed("ml1m_hstu")


@pytest.mark.parametrize("field, value", [("hide", "all"), ("repeats", "rank")])
def test_ranking_hides_nothing(field, value):
    config = changed(configs.named("ml1m_rank_hstu"), eval={field: value})
    with pytest.raises(ValueError, match=f"eval.{field}='{value}' cannot be used for ranking"):
        config.validate()
    assert changed(config, eval={field: "window" if field == "hide" else "hide"}).evaluation == {
        "time": "target"
    }


def test_sasrec_heads_must_divide_width():
    values = dataclasses.asdict(Config())
    values["model"] |= {"kind": "sasrec", "heads": 3}
    with pytest.raises(ValueError, match="model.width=50 must be a multiple of model.heads=3"):
        from_config_dict(values)


def test_limits_of_channels_are_checked():
    channels = {"all": ChannelConfig(), "liked": ChannelConfig(layers=0)}
    config = changed(Config(), model={"channels": channels}, train={"seed": 7})
    assert (config.train.seed, config.train.epochs) == (7, Config().train.epochs)
    with pytest.raises(ValueError, match="model.channels.liked.layers=0 must be greater than 0"):
        config.validate()


def test_difference_names_fields():
    old, new = dataclasses.asdict(Config()), dataclasses.asdict(Config())
    new["model"]["width"] = 64
    assert difference(old, new) == ["model.width: 50 -> 64"]


def test_flags_override_every_field_even_none(tmp_path):
    """Through the flag parser itself: a field that is None by default takes a value of its type."""
    flags = [
        "--config.data.raw_dir=here",
        "--config.train.patience=3",
        "--config.optim.clip_norm=0.5",
        "--config.data.batch_tokens=4096",
    ]
    code = (
        "from absl import app; from experiments import command\n"
        "from ultra_hstu.config import from_config_dict\n"
        "config = command.define_config()\n"
        "def main(_):\n"
        "    c = from_config_dict(config.value)\n"
        "    print(c.data.raw_dir, c.train.patience, c.optim.clip_norm, c.data.batch_tokens)\n"
        "    print(c.model.implementation, c.name)\n"
        "app.run(main)"
    )
    command = [sys.executable, "-c", code, "--config=ml1m_hstu", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["here", "3", "0.5", "4096", "None", "ml1m_hstu"], done.stderr


def choices(section):
    """The fields of a section, and of those within it, that are choices by name."""
    for name, hint in get_type_hints(type(section)).items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from choices(value)
        elif get_origin(hint) is Literal:
            yield section, name


@pytest.mark.parametrize(("section", "name"), list(choices(Config())))
def test_a_choice_that_is_not_there_is_refused_however_it_is_made(section, name):
    """Without validation, too: nothing falls through to another choice."""
    message = f"{type(section).__name__}.{name}='bce' is not allowed: use '"
    with pytest.raises(ValueError, match=message), unchecked():
        dataclasses.replace(section, **{name: "bce"})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: fp8.linear(np.ones((2, 2)), np.ones((2, 2)), precision="fp4"),
            "precision='fp4' must be 'same' or",
        ),
        (lambda: policy_of("some"), "remat='some' must be one of none, selective"),
        (lambda: HSTU([], 1, attention="relu"), "attention='relu' must be 'silu' or 'softmax'"),
        (
            lambda: ScoringModel(None, None, None, {"like": "ordinal"}),
            "a task is one of binary, regression, not 'ordinal'",
        ),
        (lambda: criteria.ranking({"like": "ordinal"}), "'binary' or 'regression', not 'ordinal'"),
        (lambda: configs.retrieval.of_grid("ml1m_gru", 2, 1), "ml1m_gru: the grid has DATA_sasrec"),
    ],
)
def test_names_outside_the_configuration(make, message):
    with pytest.raises(ValueError, match=message), unchecked():
        make()
