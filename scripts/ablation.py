"""Trains a ranking configuration with each ULTRA-HSTU piece taken away, one at a time, and writes one JSON for the ablation table.

python -m scripts.ablation --config=assistments_rank_ultra --baseline=assistments_rank_hstu
    --workdir=runs/ablation --seeds=42,43,44 --record=experiments/results/ablation_assistments.json [--only=ultra,no_truncation] [--list]

Runs that are done already in --workdir are not trained again, so a killed ablation goes on where it was; the record is written after every run.
Any field can be overridden for all variants: --config.train.epochs=5 (the baseline: --baseline.train.epochs=5).
"""

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags
from rich.console import Console

from experiments import command
from ultra_hstu import provenance, report, workdir
from ultra_hstu.config import Config, from_config_dict
from ultra_hstu.data.interactions import Interactions, load_interactions
from ultra_hstu.ranking.task import RankingTask
from ultra_hstu.train import train

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "the configuration with all pieces", lock_config=True
)
_BASELINE = config_flags.DEFINE_config_file(
    "baseline", None, "a configuration to compare with", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", "runs/ablation", "folder of the runs: VARIANT/seed_N")
_SEEDS = flags.DEFINE_list("seeds", ["42", "43", "44"], "each variant is trained once with each")
_ONLY = flags.DEFINE_list("only", [], "names of the variants to train; all without it")
_RECORD = flags.DEFINE_string("record", None, "JSON file for the results")
_LIST = flags.DEFINE_bool(
    "list", False, "print the variants with their operations, and train nothing"
)

ULTRA, BASELINE = "ultra", "baseline"


def variants(config: Config) -> dict[str, Config]:
    """The configuration itself, then one variant for each piece that it has, without it; and fp8 projections, which are off by default."""

    def change(**sections: dict[str, Any]) -> Config:
        return dataclasses.replace(
            config,
            **{
                name: dataclasses.replace(getattr(config, name), **fields)
                for name, fields in sections.items()
            },
        )

    model, rank = config.model, config.rank
    found = {ULTRA: config}
    if rank.input == "merged":
        # An event is then two rows: windows reach as many events back as before.
        reach = {
            name: tuple(2 * rows if rows > 0 else rows for rows in getattr(model, name))
            for name in ("window", "full_rows", "prefix")
        }
        found["interleaved_input"] = change(rank=dict(input="interleaved"), model=reach)
    if model.window:
        found["full_attention"] = change(model=dict(window=(), full_rows=(), prefix=()))
    if model.truncate_after is not None:
        found["no_truncation"] = change(model=dict(truncate_after=None, truncate_length=None))
    if model.channels:
        found["one_transducer"] = change(model=dict(channels={}))
    if rank.signals:
        # What is left is the first signal of several, or histories without any action.
        found["fewer_signals"] = change(
            rank=dict(signals=rank.signals[:1] if len(rank.signals) > 1 else ())
        )
    if config.data.stochastic_length is not None:
        found["whole_histories"] = change(data=dict(stochastic_length=None, load_balance=False))
    if model.dtype == "bfloat16":
        found["float32"] = change(model=dict(dtype="float32", projection="same"))
    found["same_precision" if model.projection == "fp8" else "fp8_projections"] = change(
        model=dict(projection="same" if model.projection == "fp8" else "fp8")
    )
    return found


def describe(task: RankingTask) -> dict[str, float]:
    """Operations of one request, forward (mean over the test requests) and in training (mean over an epoch's), and parameters."""
    params = jax.eval_shape(lambda: task.recipe.init(0)).params
    return {
        "inference_gflop": task.flops("test").inference / 1e9,
        "training_gflop": task.flops("train").training / 1e9,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
    }


def main(_: list[str]) -> None:
    console = report.make_console()
    config = from_config_dict(_CONFIG.value)
    chosen = variants(config)
    if _BASELINE.value is not None:
        chosen = {BASELINE: from_config_dict(_BASELINE.value), **chosen}
    if unknown := sorted(set(_ONLY.value) - set(chosen)):
        raise ValueError(
            f"--only={','.join(_ONLY.value)}: there is no variant {unknown[0]!r}; the variants are {', '.join(chosen)}"
        )
    chosen = {
        name: variant for name, variant in chosen.items() if not _ONLY.value or name in _ONLY.value
    }
    interactions = load_interactions(config.data)
    if _LIST.value:
        for name, variant in chosen.items():
            cost = describe(task_of(variant, interactions))
            console.print(
                f"{name}: {cost['inference_gflop']:.4g} GFLOP a request, {cost['training_gflop']:.4g} in training"
            )
        return
    run(
        chosen,
        interactions,
        [int(seed) for seed in _SEEDS.value],
        Path(_WORKDIR.value),
        Path(_RECORD.value) if _RECORD.value else None,
        console,
    )


def task_of(config: Config, interactions: Interactions) -> RankingTask:
    config.validate()
    return RankingTask.of(config, interactions)


def run(
    chosen: dict[str, Config],
    interactions: Interactions,
    seeds: list[int],
    folder: Path,
    file: Path | None,
    console: Console,
) -> dict[str, Any]:
    """Trains every variant with every seed; the record, which is written to `file` after each run."""
    first = next(iter(chosen.values()))
    record: dict[str, Any] = {
        "config": first.name,
        "protocol": first.train.protocol,
        **provenance.provenance(),
    }
    if ULTRA in chosen:
        record["config"] = chosen[ULTRA].name
    record |= {"baselines": task_of(first, interactions).baselines("test"), "variants": {}}
    for name, variant in chosen.items():
        task = task_of(variant, interactions)
        entry: dict[str, Any] = describe(task) | {"runs": []}
        record["variants"][name] = entry
        console.print(
            f"{name}: {entry['inference_gflop']:.4g} GFLOP a request, {entry['training_gflop']:.4g} in training"
        )
        for seed in seeds:
            seeded = dataclasses.replace(
                variant, train=dataclasses.replace(variant.train, seed=seed)
            )
            result = train(seeded, folder / name / f"seed_{seed}", console=console, task=task)
            entry["runs"].append(
                result | {"seconds_per_epoch": result["seconds"] / result["epochs"]}
            )
            best = [done["best"] for done in entry["runs"]]
            entry["mean"] = {
                metric: statistics.mean(done[metric] for done in best) for metric in best[0]
            }
            if len(best) > 1:
                entry["stdev"] = {
                    metric: statistics.stdev(done[metric] for done in best) for metric in best[0]
                }
            if file:
                file.parent.mkdir(parents=True, exist_ok=True)
                workdir.write_json(file, record)
        console.print(
            f"{name}: "
            + "  ".join(f"{metric} {value:.4f}" for metric, value in entry["mean"].items())
        )
    return record


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command.run(main)
