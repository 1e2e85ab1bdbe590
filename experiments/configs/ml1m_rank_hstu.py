"""HSTU on MovieLens-1M, the ranking task: will a movie be rated 4 or more, and how many stars? Movies and ratings interleaved.

    python -m experiments.train --config=experiments/configs/ml1m_rank_hstu.py --workdir=runs/ml1m_rank_hstu

Gender, age and occupation are contextual tokens in front of the history. Meant for a GPU.
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
        name="ml1m_rank_hstu",
        data=DataConfig(source="ml-1m", max_history=512, batch_users=128),
        model=ModelConfig(
            width=64, layers=3, heads=2, qk_width=32, v_width=32, preset="production", relative_bias=False,
            input_dropout=0.2, linear_dropout=0.2, dtype="bfloat16",
        ),
        rank=RankConfig(
            tasks=("rating_at_least_4", "rating"), input="interleaved", signals=("rating",),
            contextual=("gender", "age", "occupation"), targets=16, head_width=128,
        ),
        optim=OptimConfig(learning_rate=1e-3, clip_norm=1.0),
        train=TrainConfig(protocol="chronological", epochs=20, patience=4),
    )  # fmt: skip
    return to_config_dict(config)
