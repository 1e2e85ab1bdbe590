"""HSTU on ASSISTments 2017, the ranking task: will the learner answer right? Problems and answers interleaved, two tokens an event.

    python -m experiments.train --config=experiments/configs/assistments_rank_hstu.py --workdir=runs/assistments_rank_hstu

The baseline of `assistments_rank_ultra.py`: the same data, requests, features, width, precision and head. Of every learner's steps the newest
tenth is tested on, the tenth before it chooses the best epoch; a request asks about 32 steps at once. Meant for a GPU.
"""

import ml_collections

from ultra_hstu.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RankConfig,
    TrainConfig,
    to_config_dict,
)


def get_config() -> ml_collections.ConfigDict:
    config = Config(
        name="assistments_rank_hstu",
        data=DataConfig(source="assistments-2017", max_history=3072, batch_users=128),
        model=ModelConfig(
            width=64, layers=3, heads=2, qk_width=32, v_width=32, preset="production", relative_bias=False,
            input_dropout=0.2, linear_dropout=0.2, dtype="bfloat16",
        ),
        rank=RankConfig(tasks=("correct",), input="interleaved", signals=("correct",), features=("skill",), targets=32, head_width=128),
        optim=OptimConfig(learning_rate=1e-3, clip_norm=1.0),
        train=TrainConfig(protocol="chronological", epochs=8, patience=4, eval_users=128),
    )  # fmt: skip
    return to_config_dict(config)
