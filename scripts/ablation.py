"""Trains a ranking configuration with each ULTRA-HSTU piece taken away, one at a time.

python -m scripts.ablation --config=assistments_rank_ultra --baseline=assistments_rank_hstu
    --baseline.model.relative_bias=True --workdir=runs/ablation --seeds=42,43,44
    --record=experiments/results/ablation_assistments.json [--only=ultra,no_truncation] [--list]
python -m scripts.ablation --config=ml1m_rank_ultra --baseline=ml1m_rank_hstu
    --baseline.model.relative_bias=True --workdir=runs/ablation_ml1m
    --record=experiments/results/ablation_ml1m.json

The record is written after every run. Runs that are done already in --workdir are not trained
again, so a killed ablation goes on where it was. Any field can be overridden for all variants:
--config.train.epochs=5 (the baseline: --baseline.train.epochs=5). `--list` predicts the minutes of
an H200: `16 minutes` for the first command, `45 minutes` for the second.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable
from pathlib import Path

import jax
from absl import flags
from rich.console import Console

from experiments import command
from experiments.record import Json, Record
from kernels.mask import layer_masks
from ultra_hstu import report
from ultra_hstu.config import Config, ModelConfig, from_config_dict
from ultra_hstu.data.interactions import Interactions, load_interactions
from ultra_hstu.fields import changed
from ultra_hstu.model_config import CUTS, MASKS, ChannelConfig
from ultra_hstu.ranking.task import RankingTask
from ultra_hstu.train import train

FLAGS = flags.FLAGS
ULTRA, BASELINE = "ultra", "baseline"
# What narrow models reach on an H200, by `assistments_rank_hstu.json`: 6 ms a step and 30 TFLOP/s,
# four runs sharing it. Blockwise softmax in plain XLA: a guessed third.
START_SECONDS, STEP_SECONDS = 15, 0.006  # the first: to read and compile
GFLOP_A_SECOND = {"silu": 30_000, "masked_softmax": 10_000}


def variants(config: Config) -> dict[str, Config]:
    """The configuration itself, then one variant for each piece that it has, without it.

    Others switch something else: fp8 projections on (off, where they are on), the relative bias the
    same way, softmax in place of SiLU, and the layer that the paper writes down in place of the
    production layer.
    """
    change = functools.partial(changed, config)

    model, rank = config.model, config.rank
    found = {ULTRA: config}
    if rank.input == "merged":
        # An event is then two rows: windows reach as many events back as before.
        found["interleaved_input"] = change(
            rank={"input": "interleaved"},
            model=reach(model) | {"channels": each_channel(model, reach)},
        )
    encoders = model.encoders.values()
    if any(mask.windowed for one in encoders for mask in layer_masks(vars(one))):
        found["full_attention"] = without(config, {name: () for name in MASKS})
    if any(one.truncate_after is not None for one in encoders):
        found["no_truncation"] = without(config, dict.fromkeys(CUTS))
    if model.channels:
        found["one_transducer"] = change(model={"channels": {}})
    if rank.signals:
        # What is left is the first signal of several, or histories without any action.
        few = rank.signals[:1] if len(rank.signals) > 1 else ()
        found["fewer_signals"] = change(rank={"signals": few})
    if config.data.stochastic_length is not None:
        whole = {"stochastic_length": None, "load_balance": False}
        found["whole_histories"] = change(data=whole)
    if model.dtype == "bfloat16":
        found["float32"] = change(model={"dtype": "float32", "projection": "same"})
    if model.projection == "fp8":
        found["same_precision"] = change(model={"projection": "same"})
    else:
        found["fp8_projections"] = change(model={"projection": "fp8"})
    biased = "no_relative_bias" if model.relative_bias else "relative_bias"
    found[biased] = change(model={"relative_bias": not model.relative_bias})
    if model.attention == "silu":
        found["softmax"] = change(model={"attention": "masked_softmax", "implementation": None})
    if model.preset == "production":
        found["paper_layer"] = change(model={"preset": "research", "alpha": None})
    return found


def reach(section: ModelConfig | ChannelConfig) -> Json:
    """Options of masks, which count rows, for two rows an event."""
    return {
        name: tuple(2 * rows if rows > 0 else rows for rows in getattr(section, name))
        for name in MASKS
    }


def each_channel(
    model: ModelConfig, options: Callable[[ChannelConfig], Json]
) -> dict[str, ChannelConfig]:
    """The channels with other options."""
    return {
        name: dataclasses.replace(channel, **options(channel))
        for name, channel in model.channels.items()
    }


def without(config: Config, options: Json) -> Config:
    """The configuration without options of layers, those that channels have of their own, too."""
    channels = each_channel(config.model, lambda _: options)
    return changed(config, model=options | {"channels": channels})


def describe(task: RankingTask) -> dict[str, float]:
    """Operations of one request, parameters, and training requests of an epoch.

    Forward: the mean over the test requests; in training: over an epoch's.
    """
    examples = task.examples("train")
    assert callable(examples)
    params = jax.eval_shape(lambda: task.recipe.init(0)).params
    return {
        "inference_gflop": task.flops("test").inference / 1e9,
        "training_gflop": task.flops("train").training / 1e9,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "epoch_requests": len(examples(0, 0).lengths),
    }


def main(_: list[str]) -> None:
    console = report.make_console()
    config = from_config_dict(FLAGS.config)
    chosen = variants(config)
    if FLAGS.baseline is not None:
        chosen = {BASELINE: from_config_dict(FLAGS.baseline), **chosen}
    if unknown := sorted(set(FLAGS.only) - set(chosen)):
        raise ValueError(
            f"--only={','.join(FLAGS.only)}: there is no variant {unknown[0]!r}; "
            f"the variants are {', '.join(chosen)}"
        )
    chosen = {name: value for name, value in chosen.items() if name in (FLAGS.only or chosen)}
    interactions = load_interactions(config.data)
    seeds = [int(seed) for seed in FLAGS.seeds]
    if FLAGS.list:
        for name, variant in chosen.items():
            announce(name, describe(task_of(variant, interactions)), console, variant, seeds)
        return
    run(chosen, interactions, seeds, Path(FLAGS.workdir), FLAGS.record, console)


def announce(
    name: str, cost: dict[str, float], console: Console, config: Config, seeds: list[int]
) -> None:
    inference, training = cost["inference_gflop"], cost["training_gflop"]
    minutes = len(seeds) * predicted_seconds(config, cost) / 60
    console.print(
        f"{name}: {inference:.4g} GFLOP a request, {training:.4g} in training; "
        f"{minutes:.1f} min for {len(seeds)} seeds on an H200, predicted"
    )


def predicted_seconds(config: Config, cost: dict[str, float]) -> float:
    """Of one run on an H200: all epochs at `GFLOP_A_SECOND`, a step of `STEP_SECONDS` at least."""
    rate, users = GFLOP_A_SECOND[config.model.attention], config.data.batch_users
    request = max(cost["training_gflop"] / rate, STEP_SECONDS / users)
    return START_SECONDS + config.train.epochs * cost["epoch_requests"] * request


def task_of(config: Config, interactions: Interactions) -> RankingTask:
    config.validate()
    return RankingTask.of(config, interactions)


def run(
    chosen: dict[str, Config],
    interactions: Interactions,
    seeds: list[int],
    folder: Path,
    file: Path | str | None,
    console: Console,
    *,
    about: Json | None = None,
) -> None:
    """Trains every variant with every seed; the record is written to `file` after each run.

    Args:
      about: what else the record says.
    """
    first = next(iter(chosen.values()))
    record = Record(
        file,
        config=chosen.get(ULTRA, first).name,
        protocol=first.train.protocol,
        eval=first.evaluation,
        baselines=task_of(first, interactions).baselines("test"),
        **(about or {}),
    )
    found: dict[str, Json] = {}
    for name, variant in chosen.items():
        task = task_of(variant, interactions)
        cost = describe(task)
        announce(name, cost, console, variant, seeds)
        results: list[Json] = []
        for seed in seeds:
            seeded = changed(variant, train={"seed": seed})
            result = train(seeded, folder / name / f"seed_{seed}", console=console, task=task)
            per_epoch = result["seconds"] / result["epochs"]
            results.append(result | {"seconds_per_epoch": per_epoch})
            best = {metric: [done["best"][metric] for done in results] for metric in result["best"]}
            mean = {metric: statistics.mean(values) for metric, values in best.items()}
            found[name] = cost | {"runs": results, "mean": mean}
            if len(results) > 1:
                deviation = {metric: statistics.stdev(values) for metric, values in best.items()}
                found[name]["stdev"] = deviation
            record.add(variants=found)
        console.print(f"{name}: " + "  ".join(f"{metric} {x:.4f}" for metric, x in mean.items()))


if __name__ == "__main__":
    command.define_config(what="the configuration with all pieces")
    command.define_config("baseline", "a configuration to compare with", required=False)
    flags.DEFINE_string("workdir", "runs/ablation", "folder of the runs: VARIANT/seed_N")
    flags.DEFINE_list("seeds", ["42", "43", "44"], "each variant is trained once with each")
    flags.DEFINE_list("only", [], "names of the variants to train; all without it")
    flags.DEFINE_bool("list", False, "print the variants with their operations, and train nothing")
    command.define_record()
    command.run(main)
