"""HSTU on MovieLens-20M, published hyperparameters of the HSTU paper's public code (arXiv 2402.17152, table 4).

    python -m experiments.train --config=experiments/configs/ml20m_hstu.py --workdir=runs/ml20m_hstu

Published HR@10 .3273, NDCG@10 .1895. For a GPU; not measured here.
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
        name="ml20m_hstu",
        data=DataConfig(source="ml-20m", max_history=200),
        model=ModelConfig(
            width=256,
            layers=4,
            heads=4,
            qk_width=64,
            v_width=64,
            input_dropout=0.2,
            linear_dropout=0.2,
        ),
        loss=LossConfig(negatives=128),
        train=TrainConfig(epochs=101),
    )
    return to_config_dict(config)
