"""HSTU on Amazon Beauty (5-core, one user a line); hyperparameters of the Books runs with two layers.
The source has no timestamps: the bias of every pair is its position and time bucket 0.

    python -m experiments.train --config=experiments/configs/beauty_hstu.py --workdir=runs/beauty_hstu

Early stopping on the validation item. Test HR@10 .0862, NDCG@10 .0509 (one seed, stopped after 32 epochs);
six minutes on two CPU cores. No published figure under this protocol.
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
        name="beauty_hstu",
        data=DataConfig(source="amazon-beauty", max_history=50),
        model=ModelConfig(
            width=64,
            layers=2,
            heads=2,
            qk_width=32,
            v_width=32,
            input_dropout=0.5,
            linear_dropout=0.5,
        ),
        loss=LossConfig(negatives=512),
        train=TrainConfig(epochs=201, protocol="validated", eval_every=2),
    )
    return to_config_dict(config)
