"""HSTU-large on MovieLens-20M, published hyperparameters of the HSTU paper's public code (arXiv 2402.17152, table 4).

    python -m experiments.train --config=experiments/configs/ml20m_hstu_large.py --workdir=runs/ml20m_hstu_large

Published HR@10 .3556, NDCG@10 .2098. For a GPU; not measured here.
"""

import ml_collections

from ultra_hstu.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    TrainConfig,
    to_config_dict,
)


def get_config() -> ml_collections.ConfigDict:
    config = Config(
        name="ml20m_hstu_large",
        data=DataConfig(source="ml-20m", max_history=200),
        model=ModelConfig(
            width=256,
            layers=16,
            heads=8,
            qk_width=32,
            v_width=32,
            input_dropout=0.2,
            linear_dropout=0.2,
        ),
        loss=LossConfig(negatives=128),
        train=TrainConfig(epochs=101),
    )
    return to_config_dict(config)
