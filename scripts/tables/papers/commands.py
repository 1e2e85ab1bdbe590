"""Commands of records that no docstring of a script names: a module and its flags."""

import shlex

# The small ablation: sizes of the configuration with all pieces and of the baseline, and pieces.
SIZES = """data.max_history=128 data.batch_users=64 model.width=32 model.heads=1
    model.qk_width=32 model.v_width=32 model.dtype=float32 rank.targets=64 rank.head_width=64
    train.epochs=3 train.eval_users=64 optim.decay_steps=540"""
PIECES = """data.stochastic_length=1.6 model.layers=3 model.window=(32,) model.full_rows=(8,)
    model.truncate_after=1 model.truncate_length=32
    model.channels.attempts.max_history=128 model.channels.attempts.layers=3
    model.channels.right.max_history=64 model.channels.right.layers=2"""


def _sampled(kind: str) -> str:
    flags = f"--config.data.stochastic_length=1.6 --config.data.subsequence={kind}"
    return f"train --config=ml100k_hstu --workdir=runs/sl_{kind} {flags}"


def _steps(config: str) -> str:
    return f"bench.step --config={config} --config.train.steps_per_call=4"


def _small_ablation() -> str:
    words = ["ablation", "--config=assistments_rank_ultra", "--baseline=assistments_rank_hstu"]
    words += [f"--config.{one}" for one in f"{SIZES} {PIECES}".split()]
    words += [f"--baseline.{one}" for one in f"{SIZES} model.layers=2".split()]
    return shlex.join([*words, "--workdir=runs/ablation_small", "--seeds=42,43"])


_OF = {
    **{f"ml100k_hstu_sl_{kind}": _sampled(kind) for kind in ("recent", "weighted", "random")},
    **{f"step_{config}_cpu": _steps(config) for config in ("ml1m_hstu", "ml1m_sasrec")},
    "ablation_assistments_small": _small_ablation(),
}
COMMANDS = {
    record: f"{command} --record=experiments/results/{record}.json"
    for record, command in _OF.items()
}
