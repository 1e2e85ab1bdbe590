"""HSTU on MovieLens-100K, the smallest real set: the hyperparameters of ml1m_hstu.

    python -m experiments.train --config=experiments/configs/ml100k_hstu.py --workdir=runs/ml100k_hstu

HR@10 .1930, NDCG@10 .1028 (best of 51 epochs, one seed); two minutes on two CPU cores.
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
        name="ml100k_hstu",
        data=DataConfig(source="ml-100k"),
        model=ModelConfig(),
        loss=LossConfig(),
        train=TrainConfig(epochs=51),
    )
    return to_config_dict(config)
