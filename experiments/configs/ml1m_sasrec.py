"""SASRec on MovieLens-1M, published hyperparameters of the HSTU paper's public code (arXiv 2402.17152, table 4).

    python -m experiments.train --config=experiments/configs/ml1m_sasrec.py --workdir=runs/ml1m_sasrec

Published HR@10 .2853, NDCG@10 .1603 (ties in arbitrary order); the public code on the true order: .2925, .1670.
Ours: .2970, .1693 (three seeds). About 45 minutes on two CPU cores, far less on a GPU.
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
        name="ml1m_sasrec",
        data=DataConfig(source="ml-1m", max_history=200),
        model=ModelConfig(
            kind="sasrec",
            width=50,
            layers=2,
            heads=1,
            ffn_width=50,
            input_dropout=0.2,
            linear_dropout=0.2,
        ),
        loss=LossConfig(negatives=128),
        train=TrainConfig(epochs=101),
    )
    return to_config_dict(config)
