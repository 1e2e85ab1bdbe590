"""What `scripts.study` trains: runs as plain data, the most valuable first.

A run is a configuration with a few fields changed, under some seeds; its name is that of its record
and of its folder.
"""

import dataclasses
import hashlib
from collections.abc import Mapping

from experiments import configs
from ultra_hstu.config import Config
from ultra_hstu.fields import Values, changed, flat, paths, unknown

THREE, FIVE = (42, 43, 44), (42, 43, 44, 45, 46)


@dataclasses.dataclass(frozen=True)
class StudyRun:
    """Some seeds of one configuration.

    Attributes:
      config: a name of `experiments/configs`.
      overrides: values in place of the configuration's, by field: {"loss.kind": "full"}.
      seconds: a guess at what one seed takes, until a record of the same configuration tells.
      trial: of a search: measured on the validation items, the test items left alone.
      baselines: also measure what needs no model; of 100,000,000 events that takes minutes.
    """

    name: str
    config: str
    overrides: Mapping[str, object] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = THREE
    seconds: float = 60.0
    trial: bool = False
    baselines: bool = True

    def made(self) -> Config:
        """The configuration. Raises ValueError for a name, a field or a value that is not there."""
        config = configs.named(self.config)
        for field, value in self.overrides.items():
            config = with_field(config, field, value)
        config.validate()
        return config

    @property
    def recipe(self) -> str:
        """A digest of the configuration: records of another one are no match."""
        return digest(self.made())

    def flags(self) -> list[str]:
        """The run as arguments of `experiments.train`."""
        return [
            f"--config={self.config}",
            *(f"--config.{field}={value}" for field, value in self.overrides.items()),
            f"--seeds={','.join(map(str, self.seeds))}",
            *["--split=validation"] * self.trial,
            *["--baselines=false"] * (not self.baselines),
        ]


def digest(config: Config) -> str:
    """Of all that a run's numbers depend on: whatever its name, wherever its data is.

    Of the fields that differ from their defaults alone, so that a field which is new since then,
    and leaves runs as they were, makes no other digest.
    """
    fields, defaults = (flat(dataclasses.asdict(one)) for one in (config, Config()))
    own = {
        field: value
        for field, value in fields.items()
        if field not in ("name", "data.raw_dir", "data.data_dir")
        and (field not in defaults or value != defaults[field])
    }
    return hashlib.sha256(repr(sorted(own.items())).encode()).hexdigest()[:12]


def with_field(config: Config, field: str, value: object) -> Config:
    """The configuration with one field changed: with_field(config, "loss.kind", "full").

    Raises:
      ValueError: there is no such field.
    """
    if field not in (known := list(paths(dataclasses.asdict(config)))):
        raise ValueError(unknown(field, known))
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


def conditions(config: str, *names: str, seeds: tuple[int, ...] = THREE) -> list[StudyRun]:
    """A configuration under these conditions, or under all."""
    kind = config.partition("_")[2]
    return [
        StudyRun(f"{config}_{name}", config, CONDITIONS[name], seeds, SECONDS.get(kind, 90.0))
        for name in names or CONDITIONS
    ]


def with_mol() -> list[StudyRun]:
    """The recipe with a mixture of logits: what `ml1m_hstu_large_mol` changes, changed in it."""
    if "ml1m_hstu_large_mol" not in configs.CONFIGS:
        return []
    mixture = difference("ml1m_hstu_large_mol", "ml1m_hstu_large") | {"name": "ml1m_best_mol"}
    return [
        StudyRun(f"ml1m_best_mol_{name}", "ml1m_best", mixture | changes, seconds=180.0)
        for name, changes in CONDITIONS.items()
    ]


def ml1m() -> list[StudyRun]:
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


def small() -> list[StudyRun]:
    """MovieLens-100K, latest-small and Amazon Beauty: minutes on a CPU, but the last."""
    runs = []
    for data in ("ml100k", "latest"):
        for condition in ("validated", "published"):
            for kind in ("hstu", "sasrec", "best"):
                runs += conditions(f"{data}_{kind}", condition)
    for kind in ("hstu", "sasrec", "best"):
        runs += [StudyRun(f"beauty_{kind}_validated", f"beauty_{kind}", seconds=60.0)]
    return runs


def published() -> list[StudyRun]:
    """MovieLens-20M and Amazon Books, for somebody with their data: the public code's grid."""
    return [
        StudyRun(f"{data}_{kind}_published", f"{data}_{kind}", seeds=(42,), seconds=seconds)
        for kind, seconds in (("hstu", 1800.0), ("hstu_large", 7200.0), ("sasrec", 1800.0))
        for data in ("ml20m", "books")
    ]


# Of a seed of ranking, predicted as `scripts.ablation.predicted_seconds` does.
RANKING_SECONDS = {"assistments": 25.0, "ml1m": 65.0}


def ranking_run(data: str, model: str, overrides: Values, *, ends: str, slower: float) -> StudyRun:
    """A ranking configuration with some fields changed, which takes so many times its seconds."""
    config = f"{data}_rank_{model}"
    seconds = slower * RANKING_SECONDS[data]
    return StudyRun(f"{config}{ends}", config, overrides, seconds=seconds)


def ranking_models() -> list[StudyRun]:
    """HSTU, ULTRA-HSTU and DIN as they are, and HSTU with a relative bias."""
    runs = [
        ranking_run(data, model, {}, ends="", slower=3 if model == "din" else 1)
        for data in RANKING_SECONDS
        for model in ("hstu", "ultra", "din")
    ]
    bias: Values = {"model.relative_bias": True}
    runs += [ranking_run(data, "hstu", bias, ends="_bias", slower=1.5) for data in RANKING_SECONDS]
    return runs


def ranking_positions() -> list[StudyRun]:
    """Positions that are counted forwards, beside `ranking_models`."""
    forwards: Values = {"rank.positions": "forwards"}
    return [
        ranking_run(data, model, forwards, ends="_forwards", slower=1)
        for data in RANKING_SECONDS
        for model in ("hstu", "ultra")
    ]


def ranking_softmax() -> list[StudyRun]:
    """Beside `ranking_models`: softmax in place of SiLU, and all three rows of the paper with the
    layer of the research code, whose HSTU has a relative bias.
    """
    softmax, research = {"model.attention": "masked_softmax"}, {"model.preset": "research"}
    rows: dict[str, Values] = {
        "softmax": {**softmax},
        "research_bias": {**research, "model.relative_bias": True},
        "research": {**research},
        "research_softmax": {**research, **softmax},
    }
    return [
        ranking_run(data, "hstu", overrides, ends=f"_{row}", slower=3 if "softmax" in row else 1.5)
        for data in RANKING_SECONDS
        for row, overrides in rows.items()
    ]


# Histories of 8,192 events. An epoch asks one request of each user, of 0.15 TFLOP in training where
# histories are whole; so does an evaluation.
LONG: Values = {
    "data.synthetic.length": 8192,
    "data.synthetic.users": 1000,
    "data.batch_users": 8,
    "rank.requests": "one",
    "rank.targets": 128,
    "rank.validation_fraction": 1 / 64,
    "rank.test_fraction": 1 / 64,
    "train.epochs": 16,
}


def sampled(length: int, alpha: float | None, subsequence: str = "recent") -> Values:
    """Stochastic length of an HSTU on histories of at most so many events; None: whole ones."""
    of_length: Values = {"data.max_history": length, "data.stochastic_length": alpha}
    return of_length if alpha is None else {**of_length, "data.subsequence": subsequence}


def stochastic_length() -> list[StudyRun]:
    """What stochastic length costs in NE: lengths and alphas, which events stay, long histories."""
    seconds = RANKING_SECONDS["assistments"]
    grid: list[tuple[int, float | None, str]] = [
        (length, alpha, "recent")
        for length in (1024, 2048, 3072)
        for alpha in (None, 1.6, 1.7, 1.8, 1.9)
    ]
    grid += [(3072, 1.6, "random"), (3072, 1.6, "weighted")]
    runs = []
    for length, alpha, kind in grid:
        end = "whole" if alpha is None else f"alpha{10 * alpha:.0f}"
        name = f"assistments_sl_{length}_{end}" + (f"_{kind}" if kind != "recent" else "")
        overrides = sampled(length, alpha, kind)
        runs += [StudyRun(name, "assistments_rank_hstu", overrides, seconds=seconds)]
    for end, alpha in (("whole", None), ("alpha16", 1.6), ("alpha18", 1.8)):
        overrides = LONG | sampled(8192, alpha)
        name = f"synthetic_sl_8192_{end}"
        runs += [StudyRun(name, "synthetic_rank_hstu", overrides, seconds=240.0)]
    return runs


def stream() -> list[StudyRun]:
    """HSTU's study of a synthetic stream (arXiv 2402.17152, appendix C): 900,000 records of 128
    events to learn from, once.
    """
    # A minute to start and to evaluate, and 25 TFLOP/s, as of `assistments_rank_hstu`.
    seconds = {"hstu": 105.0, "hstu_softmax": 105.0, "transformer": 155.0}
    return [
        StudyRun(f"stream_{model}", f"synthetic_{model}", seconds=guess, baselines=False)
        for model, guess in seconds.items()
    ]


def unique(runs: list[StudyRun]) -> list[StudyRun]:
    """Each record once, where it stands first."""
    return list({run.name: run for run in runs}.values())


RANKING = {
    "ranking_models": ranking_models,
    "ranking_positions": ranking_positions,
    "ranking_softmax": ranking_softmax,
    "stochastic_length": stochastic_length,
}
STUDIES = {"ml1m": ml1m, "small": small, "published": published, **RANKING, "stream": stream}
