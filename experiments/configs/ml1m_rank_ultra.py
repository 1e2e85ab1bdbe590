"""ULTRA-HSTU on MovieLens-1M, the ranking task: will a movie be rated 4 or more, and how many stars? Movie and rating in one token.

    python -m experiments.train --config=experiments/configs/ml1m_rank_ultra.py --workdir=runs/ml1m_rank_ultra

Its baseline is `ml1m_rank_hstu.py`. One transducer reads all ratings, one those of four stars or more. Meant for a GPU.
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
        name="ml1m_rank_ultra",
        data=DataConfig(source="ml-1m", max_history=512, batch_users=128, stochastic_length=1.8),
        model=ModelConfig(
            width=64, layers=5, heads=2, qk_width=32, v_width=32, preset="production", relative_bias=False,
            input_dropout=0.2, linear_dropout=0.2, dtype="bfloat16", window=(128,), full_rows=(32,),
            truncate_after=2, truncate_length=256,
            channels={
                "ratings": ChannelConfig(max_history=512, layers=5),
                "liked": ChannelConfig(signal="rating", at_least=4.0, max_history=256, layers=3),
            },
        ),
        rank=RankConfig(
            tasks=("rating_at_least_4", "rating"), signals=("rating",),
            contextual=("gender", "age", "occupation"), targets=16, head_width=128,
        ),
        optim=OptimConfig(learning_rate=1e-3, clip_norm=1.0),
        train=TrainConfig(protocol="chronological", epochs=20, patience=4),
    )  # fmt: skip
    return to_config_dict(config)
