"""Configurations: every file is valid, and every impossible value is named."""

import dataclasses
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import experiments.configs
from ultra_hstu.config import Config, difference, from_config_dict, to_config_dict

FILES = [module.name for module in pkgutil.iter_modules(experiments.configs.__path__)]


@pytest.mark.parametrize("name", FILES)
def test_config_file(name):
    module = importlib.import_module(f"experiments.configs.{name}")
    config = from_config_dict(module.get_config())
    assert config.name == name
    assert f"--config=experiments/configs/{name}.py --workdir=runs/{name}" in module.__doc__


def test_the_promised_files_exist():
    promised = "synthetic ml100k_hstu ml1m_sasrec ml1m_hstu ml1m_hstu_large ml20m_sasrec ml20m_hstu ml20m_hstu_large"
    promised += " books_sasrec books_hstu books_hstu_large beauty_sasrec beauty_hstu"
    assert set(promised.split()) <= set(FILES)


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
        ("train.sed", 1, "unknown config field train.sed"),
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


def test_sasrec_heads_must_divide_width():
    values = dataclasses.asdict(Config())
    values["model"] |= {"kind": "sasrec", "heads": 3}
    with pytest.raises(ValueError, match="model.width=50 must be a multiple of model.heads=3"):
        from_config_dict(values)


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
        "import sys; from absl import app, flags; from ml_collections import config_flags\n"
        "from ultra_hstu.config import from_config_dict\n"
        "config = config_flags.DEFINE_config_file('config', lock_config=True)\n"
        "def main(_):\n"
        "    c = from_config_dict(config.value)\n"
        "    print(c.data.raw_dir, c.train.patience, c.optim.clip_norm, c.data.batch_tokens, c.model.implementation)\n"
        "app.run(main)"
    )
    root = Path(__file__).parent.parent
    command = [
        sys.executable,
        "-c",
        code,
        f"--config={root}/experiments/configs/ml1m_hstu.py",
        *flags,
    ]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "here 3 0.5 4096 None", done.stdout + done.stderr
