"""ULTRA-HSTU at the paper's scale (arXiv 2602.16986) on synthetic histories of 16,384 events: 18 layers of width 512, semi-local attention, truncation.

    python -m scripts.bench.long --config=experiments/configs/long_ultra.py --record=experiments/results/long_ultra_h200.json
    python -m experiments.train --config=experiments/configs/long_ultra.py --workdir=runs/long_ultra

For one Hopper GPU. The paper names neither how many layers stand below its truncation nor what length it keeps. With 3,072 events kept after 3 layers a forward
pass of the encoder takes 0.445 TFLOP a sample, and the paper's table 2 has 0.436 for 18 layers on 16,384 events. Its dropout is unknown too; here there is none.
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

HISTORY = 16384


def get_config() -> ml_collections.ConfigDict:
    config = Config(
        name="long_ultra",
        data=DataConfig(
            source="synthetic",
            max_history=HISTORY,
            batch_users=4,
            batch_tokens=4 * HISTORY,
            synthetic=SyntheticConfig(users=256, length=HISTORY + 3, items=20000, categories=100),
        ),
        model=ModelConfig(
            width=512,
            layers=18,
            heads=4,
            qk_width=128,
            v_width=128,
            preset="production",
            relative_bias=False,
            output_slots=0,
            input_dropout=0.0,
            linear_dropout=0.0,
            dtype="bfloat16",
            implementation="mosaic",
            window=(256,),
            full_rows=(256,),
            truncate_after=3,
            truncate_length=3072,
            remat="selective",
        ),
        loss=LossConfig(negatives=128),
        train=TrainConfig(epochs=2, steps_per_call=4, eval_users=4),
    )
    return to_config_dict(config)
