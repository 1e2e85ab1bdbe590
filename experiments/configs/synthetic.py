"""HSTU on the synthetic streaming data of the HSTU paper's appendix C, scaled down; what `make demo` trains.

    python -m experiments.train --config=experiments/configs/synthetic.py --workdir=runs/synthetic

About a minute on two CPU cores.
"""

import ml_collections

from ultra_hstu.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    SyntheticConfig,
    TrainConfig,
    to_config_dict,
)


def get_config() -> ml_collections.ConfigDict:
    config = Config(
        name="synthetic",
        data=DataConfig(source="synthetic", max_history=64, synthetic=SyntheticConfig()),
        model=ModelConfig(relative_bias=False),
        loss=LossConfig(),
        train=TrainConfig(epochs=6),
    )
    return to_config_dict(config)
