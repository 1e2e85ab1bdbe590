"""Configurations: every file is valid, and every impossible value is named."""

import dataclasses
import re
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from experiments import configs
from experiments.command import ConfigParser
from kernels import fp8
from tests.serving.small_serving import unchecked
from ultra_hstu import criteria, fields
from ultra_hstu.config import Config, ModelConfig, from_config_dict, to_config_dict
from ultra_hstu.effects import without_effect
from ultra_hstu.fields import Section, changed, difference
from ultra_hstu.model_config import CHANNEL_OPTIONS, ChannelConfig
from ultra_hstu.nn.hstu import HSTU
from ultra_hstu.nn.remat import policy_of
from ultra_hstu.serving.scoring import ScoringModel

ROOT = Path(__file__).parent.parent
NAMES = """
    ml100k_sasrec ml100k_best latest_hstu latest_sasrec latest_best beauty_best
    ml1m_best ml1m_ultra_60 ml1m_hstu_mol ml1m_hstu_large_mol
    synthetic ml100k_hstu ml1m_sasrec ml1m_hstu ml1m_hstu_large ml1m_ultra ml20m_sasrec ml20m_hstu
    ml20m_hstu_large books_sasrec books_hstu books_hstu_large beauty_sasrec beauty_hstu
    assistments_rank_hstu assistments_rank_ultra ml1m_rank_hstu ml1m_rank_ultra kuairand_rank_hstu
    ml1m_hstu_features ml100k_hstu_features kuairand_rank_ultra long_ultra long_ultra_paper
    long_mst table table_rank everything assistments_rank_din ml1m_rank_din synthetic_rank_hstu
    synthetic_hstu synthetic_hstu_softmax synthetic_transformer synthetic_long_rank_hstu
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
        ("data.synthetic_long.length", 2, "synthetic_long.length=2 must be at least 3"),
        ("data.synthetic_long.likes", 0.0, "synthetic_long.likes=0.0 must be greater than 0"),
        ("data.new_users_fraction", 1.0, r"new_users_fraction=1.0 must be in \(0, 1\)"),
        ("train.steps", 0, "train.steps=0 must be greater than 0"),
        ("train", {"protocol": "windows", "steps": 5}, "train.steps=5 does .*: set windows.steps"),
        ("optim.learning_rate", float("nan"), "learning_rate=nan"),
        ("model.remat", "full", "model.remat='full' is not allowed: use 'none', 'selective'"),
        ("model.projection_gradient", "fp8", "under model.projection='same'.*projection='fp8'"),
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
        ("--config.colour=red", "colour: there are name, data, model, loss,"),
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


def with_flags(path, overrides):
    """The configuration that a command makes of --config and --config.FIELD, not validated."""
    argv = ["command", f"--config={path}"]
    argv += [f"--config.{name}={value}" for name, value in overrides.items()]
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", None, "", values, sys_argv=argv)
    values["config"].parser = ConfigParser("config")
    values(argv)
    return fields.build(Config, holder.value.to_dict())


def leaves(section, prefix=""):
    """(name, type, value) of every field of a configuration, those of channels too."""
    for name, hint in get_type_hints(type(section)).items():
        value = getattr(section, name)
        parts = value if isinstance(value, dict) else {"": value}
        for key, part in parts.items():
            path = f"{prefix}{name}{key and '.' + key}"
            if isinstance(part, fields.Section):
                yield from leaves(part, f"{path}.")
            else:
                yield path, hint, part


def another(hint, value):
    """A value of the type, written as on a command line, and as it is."""
    if get_origin(hint) is Literal:
        return get_args(hint)[-1], get_args(hint)[-1]
    if get_origin(hint) is tuple:
        values = (3, 4) if get_args(hint)[0] is int else ("a", "b")
        return values, values
    kind = hint if isinstance(hint, type) else get_args(hint)[0]
    return {bool: (not value, not value), int: ("5", 5), float: ("2", 2.0), str: ("x", "x")}[kind]


@pytest.mark.parametrize("name", configs.CONFIGS)
def test_flags_set_every_field(name):
    """Through the flag parser itself: with a value of its type, and None where the type has it."""
    fields_of = {path: (hint, value) for path, hint, value in leaves(configs.named(name))}
    texts = {path: another(*field)[0] for path, field in fields_of.items()}
    found = {path: value for path, _, value in leaves(with_flags(name, texts))}
    assert found == {path: another(*field)[1] for path, field in fields_of.items()}
    optional = [path for path, (hint, _) in fields_of.items() if type(None) in get_args(hint)]
    nothing = {path: value for path, _, value in leaves(with_flags(name, dict.fromkeys(optional)))}
    assert {"data.raw_dir", "optim.clip_norm", "train.patience"} <= set(optional)
    assert nothing == {path: value for path, (_, value) in fields_of.items()} | dict.fromkeys(
        optional
    )


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
        (
            lambda: HSTU([], 1, attention="relu"),
            "attention='relu' must be one of silu, softmax, ma",
        ),
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


@pytest.mark.filterwarnings("ignore:the load_module")  # by ml_collections
@pytest.mark.parametrize(
    "returned",
    [
        "Config(name='own', model=ModelConfig(channels=channels))",
        "to_config_dict(Config(name='own', model=ModelConfig(channels=channels)))",
        "{'name': 'own', 'model': {'channels': {name: {} for name in channels}}}",
    ],
)
def test_own_files_and_names_of_methods(tmp_path, returned):
    """Channels may have the names of ConfigDict's methods, as the field `items` has."""
    channels = ["items", "get", "update", "values", "keys"]
    file = tmp_path / "own.py"
    file.write_text(
        "from ultra_hstu.config import ChannelConfig, Config, ModelConfig, to_config_dict\n"
        f"channels = dict.fromkeys({channels}, ChannelConfig())\n"
        f"def get_config(): return {returned}\n"
    )
    overrides = {f"model.channels.{name}.layers": 7 for name in channels}
    found = with_flags(str(file), overrides | {"data.synthetic.items": 50, "optim.clip_norm": 3})
    assert (found.name, found.data.synthetic.items, found.optim.clip_norm) == ("own", 50, 3.0)
    assert {name: one.layers for name, one in found.model.channels.items()} == dict.fromkeys(
        channels, 7
    )


@pytest.mark.filterwarnings("ignore:the load_module")  # by ml_collections
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return None", "own.py makes no configuration: get_config.. returned None"),
        ("return 3", "own.py makes no configuration: get_config.. returned 3"),
        ("return open('/no/such/file')", "own.py makes no configuration: .*/no/such/file"),
        ("return {'train': 3}", "config section train is 3"),
    ],
)
def test_own_files_that_make_no_configuration(tmp_path, body, message):
    file = tmp_path / "own.py"
    file.write_text(f"def get_config(): {body}\n")
    with pytest.raises(ValueError, match=message):
        parsed(str(file))


@dataclasses.dataclass(frozen=True)
class Limits(fields.Section):
    sizes: tuple[fields.Positive[int], ...] = ()
    share: fields.BelowOne[float] | Literal["auto"] = "auto"
    steps: fields.Positive[int] | None = None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sizes": (3, 0)}, r"sizes=\(3, 0\) must be greater than 0"),
        ({"share": 1.5}, r"share=1.5 must be in \[0, 1\)"),
        ({"steps": -1}, "steps=-1 must be greater than 0"),
    ],
)
def test_limits_inside_types(values, message):
    assert fields.check_limits(Limits(sizes=(1, 2), share=0.5, steps=3)) is None
    assert fields.check_limits(Limits()) is None
    with pytest.raises(ValueError, match=message):
        fields.check_limits(Limits(**values))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"truncate_after": 2}, "model.truncate_after=2 must be below model.channels.b.layers=1"),
        ({"window": (3, 3)}, "one for each of model.channels.b.layers=1"),
    ],
)
def test_depths_of_channels_are_named(model, message):
    channels = {"a": ChannelConfig(layers=3), "b": ChannelConfig(layers=1)}
    model = {"channels": channels, "truncate_length": 4, "truncate_after": 1} | model
    if "window" in model:
        model |= {"truncate_length": None, "truncate_after": None}
        channels["a"] = ChannelConfig(layers=2)
    with pytest.raises(ValueError, match=message):
        changed(Config(), model=model, rank={"tasks": ("like",)}).validate()


@pytest.mark.parametrize(
    ("channel", "message"),
    [
        ({"window": (3, 3)}, "model.channels.b.window=(3, 3) must hold one value, or one for each "
         "of model.channels.b.layers=1"),
        ({"truncate_length": 4}, "model.truncate_after=None and "
         "model.channels.b.truncate_length=4: give both, or neither"),
        ({"truncate_after": 1, "truncate_length": 4},
         "model.channels.b.truncate_after=1 must be below model.channels.b.layers=1"),
        ({"width": 0}, "model.channels.b.width=0 must be greater than 0"),
    ],
)  # fmt: skip
def test_options_of_a_channel_are_named(channel, message):
    channels = {"a": ChannelConfig(), "b": ChannelConfig(layers=1, **channel)}
    with pytest.raises(ValueError, match=re.escape(message)):
        changed(Config(), model={"channels": channels}, rank={"tasks": ("like",)}).validate()


def test_a_channel_has_the_options_of_the_model_or_its_own():
    own = ChannelConfig(layers=3, width=8, window=(-1,), truncate_length=7)
    channels = {"a": ChannelConfig(), "b": own, "c": dataclasses.replace(own, prefix=(0,))}
    cut = {"truncate_after": 1, "truncate_length": 5}
    model = ModelConfig(width=4, window=(2,), prefix=(1,), channels=channels, **cut)
    a, b, c = model.encoders.values()
    assert (a.width, a.window, a.truncate_length, a.layers) == (4, (2,), 5, 2)
    assert (b.width, b.window, b.truncate_length, b.truncate_after) == (8, (-1,), 7, 1)
    assert (b.prefix, c.prefix) == ((1,), (0,))
    assert ModelConfig(layers=7).encoders == {"": ModelConfig(layers=7)}
    every = {name: dataclasses.replace(own, truncate_after=2) for name in channels}
    for given, without in (
        (channels, set()),
        (every, {"model.window", *map("model.".__add__, cut)}),
    ):
        config = changed(Config(), model={"channels": given}, rank={"tasks": ("like",)})
        found = without_effect(config)
        assert without == found.keys() & {f"model.{name}" for name in CHANNEL_OPTIONS}
    assert "set model.channels.a.window or model.channels.b.window" in found["model.window"]


def test_options_of_a_channel_that_do_nothing_are_refused():
    """As those of the model are: an encoder without attention has no masks."""
    for option in ({"window": (3,)}, {"truncate_after": 1, "truncate_length": 5}):
        channels = {"a": ChannelConfig(), "b": ChannelConfig(width=8, full_rows=(0,), **option)}
        model, (name, *_) = {"kind": "din", "channels": channels}, option
        config = changed(Config(), model=model, rank={"tasks": ("like",)})
        with pytest.raises(ValueError, match=f"model.channels.b.{name}=.* does nothing under mod"):
            config.validate()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"divide_by": "kept"}, "model.divide_by='kept' divides by what a truncation leaves, and "
         "there is none"),
        ({"divide_by": "length", "attention": "softmax"}, "model.divide_by='length' does nothing "
         "under model.attention='softmax'"),
        ({"divide_by": "length", "kind": "sasrec"}, "model.divide_by='length' does nothing under "
         "model.kind='sasrec'"),
    ],
)  # fmt: skip
def test_divisors_that_cannot_work_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        changed(Config(), model=model).validate()
    own = {"a": ChannelConfig(), "b": ChannelConfig(truncate_after=1, truncate_length=3)}
    kept = {"divide_by": "kept", "channels": own}
    changed(
        Config(), model=kept, rank={"tasks": ("like",)}, train={"protocol": "chronological"}
    ).validate()
