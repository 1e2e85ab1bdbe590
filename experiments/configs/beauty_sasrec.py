"""SASRec on Amazon Beauty (5-core, one user a line); hyperparameters of the Books runs with two layers.

    python -m experiments.train --config=experiments/configs/beauty_sasrec.py --workdir=runs/beauty_sasrec

Early stopping on the validation item. No published figure under this protocol, and not measured yet; meant for a GPU.
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
        name="beauty_sasrec",
        data=DataConfig(source="amazon-beauty", max_history=50),
        model=ModelConfig(
            kind="sasrec",
            width=64,
            layers=2,
            heads=2,
            ffn_width=64,
            input_dropout=0.5,
            linear_dropout=0.5,
        ),
        loss=LossConfig(negatives=512),
        train=TrainConfig(epochs=201, protocol="validated", eval_every=2),
    )
    return to_config_dict(config)
