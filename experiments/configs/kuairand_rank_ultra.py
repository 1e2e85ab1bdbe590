"""ULTRA-HSTU on KuaiRand-1K, the ranking task: click, long view, like, and the share of the video that is watched; merged.

    python -m experiments.train --config=experiments/configs/kuairand_rank_ultra.py --workdir=runs/kuairand_rank_ultra

Its baseline is `kuairand_rank_hstu.py`. One transducer reads what was shown, one what was clicked (consumption and engagement). KuaiRand-Pure is smaller:
`--config.data.source=kuairand-pure`. Not measured: the data could not be had where this was written. Meant for a GPU.
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
        name="kuairand_rank_ultra",
        data=DataConfig(source="kuairand-1k", max_history=256, batch_users=128, stochastic_length=1.8),
        model=ModelConfig(
            width=64, layers=5, heads=2, qk_width=32, v_width=32, preset="production", relative_bias=False,
            input_dropout=0.1, linear_dropout=0.1, dtype="bfloat16", window=(64,), full_rows=(32,),
            truncate_after=2, truncate_length=128,
            channels={
                "shown": ChannelConfig(max_history=256, layers=5),
                "clicked": ChannelConfig(signal="is_click", at_least=1.0, max_history=128, layers=3),
            },
        ),
        rank=RankConfig(
            tasks=("is_click", "long_view", "is_like", "watched_share"),
            signals=("is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view", "watch_time", "watched_share"),
            features=("tab",), contextual=("user_active_degree", "follow_user_num_range", "register_days_range"), targets=16, head_width=128,
        ),
        optim=OptimConfig(learning_rate=1e-3, clip_norm=1.0),
        train=TrainConfig(protocol="chronological", epochs=5, patience=2),
    )  # fmt: skip
    return to_config_dict(config)
