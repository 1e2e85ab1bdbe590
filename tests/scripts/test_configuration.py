"""docs/configuration.md holds every field; `make --check` says that it is current."""

import dataclasses

import pytest

from scripts.tables import configuration
from ultra_hstu import fields
from ultra_hstu.config import Config
from ultra_hstu.model_config import ChannelConfig


@dataclasses.dataclass(frozen=True)
class Sizes(fields.Section):
    """Sizes of something."""

    # How many
    # there are.
    count: fields.Positive[int] | None = 3  # at one time
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Named(Sizes):
    colour: str = "red"  # of all


def test_comments_say_what_fields_mean():
    with pytest.raises(ValueError, match="Sizes.name: no comment says what it is"):
        configuration.meanings(Sizes)
    assert configuration.meanings(Named) == {"colour": "of all"}
    assert configuration.limits(fields.Positive[int] | None) == ["greater than 0"]


def test_every_field_is_shown():
    shown = configuration.field_tables()
    channel = {f"model.channels.NAME.{name}": 0 for name in dataclasses.asdict(ChannelConfig())}
    for field in fields.flat(dataclasses.asdict(Config())) | channel:
        assert shown.count(f"| `{field}` |") == 1, field
    row = "| `model.heads` | int | `1` | greater than 0 | H |"
    assert row in shown.splitlines()
