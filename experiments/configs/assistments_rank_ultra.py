"""ULTRA-HSTU on ASSISTments 2017, the ranking task: will the learner answer right? Problem and answer in one token.

    python -m experiments.train --config=experiments/configs/assistments_rank_ultra.py --workdir=runs/assistments_rank_ultra

Deeper than the baseline `assistments_rank_hstu.py` and still cheaper at inference: half the rows, semi-local attention, and after two layers only
the newest 512 steps. A second transducer reads the right answers alone. Training cuts long histories (stochastic length). Meant for a GPU.
"""

import ml_collections

from ultra_hstu.config import (
    ChannelConfig,
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
        name="assistments_rank_ultra",
        data=DataConfig(source="assistments-2017", max_history=3072, batch_users=128, stochastic_length=1.8),
        model=ModelConfig(
            width=64, layers=5, heads=2, qk_width=32, v_width=32, preset="production", relative_bias=False,
            input_dropout=0.2, linear_dropout=0.2, dtype="bfloat16", window=(256,), full_rows=(64,),
            truncate_after=2, truncate_length=512,
            channels={
                "attempts": ChannelConfig(max_history=3072, layers=5),
                "right": ChannelConfig(signal="correct", at_least=1.0, max_history=512, layers=3),
            },
        ),
        rank=RankConfig(tasks=("correct",), signals=("correct",), features=("skill",), targets=32, head_width=128),
        optim=OptimConfig(learning_rate=1e-3, clip_norm=1.0),
        train=TrainConfig(protocol="chronological", epochs=8, patience=4, eval_users=128),
    )  # fmt: skip
    return to_config_dict(config)
