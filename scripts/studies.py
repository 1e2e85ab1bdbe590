"""What `scripts.study` trains: runs as plain data, the most valuable first.

A run is a configuration with a few fields changed, under some seeds; its name is that of its record
and of its folder.
"""

import dataclasses
import hashlib
from collections.abc import Mapping

from experiments import configs
from ultra_hstu.config import Config
from ultra_hstu.fields import Values, changed, flat

THREE, FIVE = (42, 43, 44), (42, 43, 44, 45, 46)


@dataclasses.dataclass(frozen=True)
class Run:
    """Some seeds of one configuration.

    Attributes:
      config: a name of `experiments/configs`.
      overrides: values in place of the configuration's, by field: {"loss.kind": "full"}.
      seconds: a guess at what one seed takes, until a record of the same configuration tells.
      trial: of a search: measured on the validation items, the test items left alone.
    """

    name: str
    config: str
    overrides: Mapping[str, object] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = THREE
    seconds: float = 60.0
    trial: bool = False

    def made(self) -> Config:
        """The configuration. Raises ValueError for a name, a field or a value that is not there."""
        config = configs.named(self.config)
        for field, value in self.overrides.items():
            config = with_field(config, field, value)
        config.validate()
        return config

    @property
    def recipe(self) -> str:
        """A digest of the configuration, whatever its name: records of another one are no match."""
        fields = flat(dataclasses.asdict(self.made())) | {"name": ""}
        return hashlib.sha256(repr(sorted(fields.items())).encode()).hexdigest()[:12]

    def flags(self) -> list[str]:
        """The run as arguments of `experiments.train`."""
        return [
            f"--config={self.config}",
            *(f"--config.{field}={value}" for field, value in self.overrides.items()),
            f"--seeds={','.join(map(str, self.seeds))}",
            *["--split=validation"] * self.trial,
        ]


def with_field(config: Config, field: str, value: object) -> Config:
    """The configuration with one field changed: with_field(config, "loss.kind", "full")."""
    *sections, last = field.split(".")
    values: Values = {last: value}
    for section in reversed(sections):
        values = {section: values}
    return changed(config, **values)


def has_field(field: str) -> bool:
    """Whether configurations have such a field."""
    return field in flat(dataclasses.asdict(Config()))


def difference(config: str, base: str) -> dict[str, object]:
    """The fields, but the name, in which a configuration differs from another one."""
    one, other = (flat(dataclasses.asdict(configs.named(name))) for name in (config, base))
    return {
        field: value for field, value in one.items() if field != "name" and value != other[field]
    }


# Protocols, and random ties: the order of the public table. The first is what readers see first.
CONDITIONS: dict[str, dict[str, object]] = {
    "validated": {"train.protocol": "validated"},
    "random_ties": {"data.ties": "random"},
    "validated_all": {"train.protocol": "validated", "eval.hide": "all"},
    "published": {},
    "temporal": {"train.protocol": "temporal"},
}
# Seconds of a seed, guessed, by the end of a configuration's name.
SECONDS = {"sasrec": 60.0, "hstu": 30.0, "ultra": 45.0, "ultra_60": 45.0}


def conditions(config: str, *names: str, seeds: tuple[int, ...] = THREE) -> list[Run]:
    """A configuration under these conditions, or under all."""
    kind = config.partition("_")[2]
    return [
        Run(f"{config}_{name}", config, CONDITIONS[name], seeds, SECONDS.get(kind, 90.0))
        for name in names or CONDITIONS
    ]


def with_mol() -> list[Run]:
    """The recipe with a mixture of logits: what `ml1m_hstu_large_mol` changes, changed in it."""
    if "ml1m_hstu_large_mol" not in configs.CONFIGS:
        return []
    mixture = difference("ml1m_hstu_large_mol", "ml1m_hstu_large") | {"name": "ml1m_best_mol"}
    return [
        Run(f"ml1m_best_mol_{name}", "ml1m_best", mixture | changes, seconds=180.0)
        for name, changes in CONDITIONS.items()
    ]


def ml1m() -> list[Run]:
    """MovieLens-1M: what the first table shows comes first, one condition after the other."""
    known = [
        name
        for name in (
            "ml1m_hstu_large",
            "ml1m_hstu",
            "ml1m_sasrec",
            "ml1m_ultra",
            "ml1m_ultra_60",
            "ml1m_hstu_large_mol",
            "ml1m_hstu_mol",
        )
        if name in configs.CONFIGS
    ]
    runs = conditions("ml1m_best", "validated", "random_ties", "validated_all", seeds=FIVE)
    runs += conditions("ml1m_ultra_60", "published", "validated")
    runs += with_mol()[:2]
    for condition in ("validated", "random_ties", "published", "temporal"):
        runs += [run for name in known for run in conditions(name, condition)]
        runs += conditions("ml1m_best", condition, seeds=FIVE)
    for name in ("ml1m_hstu_large", "ml1m_hstu"):  # RecTools hides all that a user has seen
        runs += conditions(name, "validated_all")
    return unique(runs + with_mol())


def small() -> list[Run]:
    """MovieLens-100K, latest-small and Amazon Beauty: minutes on a CPU, but the last."""
    runs = []
    for data in ("ml100k", "latest"):
        for condition in ("validated", "published"):
            for kind in ("hstu", "sasrec", "best"):
                runs += conditions(f"{data}_{kind}", condition)
    for kind in ("hstu", "sasrec", "best"):
        runs += [Run(f"beauty_{kind}_validated", f"beauty_{kind}", seconds=60.0)]
    return runs


def published() -> list[Run]:
    """MovieLens-20M and Amazon Books, for somebody with their data: the public code's grid."""
    return [
        Run(f"{data}_{kind}_published", f"{data}_{kind}", seeds=(42,), seconds=seconds)
        for kind, seconds in (("hstu", 1800.0), ("hstu_large", 7200.0), ("sasrec", 1800.0))
        for data in ("ml20m", "books")
    ]


def unique(runs: list[Run]) -> list[Run]:
    """Each record once, where it stands first."""
    return list({run.name: run for run in runs}.values())


STUDIES = {"ml1m": ml1m, "small": small, "published": published}
