"""Mini-sequences over Ulysses (MsT, arXiv 2407.15892, with DeepSpeed-Ulysses) on histories of 65,536 events, on two GPUs of one host.

    python -m experiments.train --config=experiments/configs/long_mst.py --workdir=runs/long_mst [--config.parallel.context=4]

Attention is whole and full causal: two all-to-alls give every device all rows of its heads and take them back. Everything else works on the device's own
rows, 4,096 at a time, and is computed again in the backward: of a layer's wide activations no more than one such piece exists. Meant for Hopper GPUs, as
many as divide the four heads.
"""

import ml_collections

from ultra_hstu.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    ParallelConfig,
    SyntheticConfig,
    TrainConfig,
    to_config_dict,
)

HISTORY = 65536


def get_config() -> ml_collections.ConfigDict:
    config = Config(
        name="long_mst",
        data=DataConfig(
            source="synthetic",
            max_history=HISTORY,
            batch_users=1,
            batch_tokens=HISTORY,
            synthetic=SyntheticConfig(users=64, length=HISTORY + 3, items=20000, categories=100),
        ),
        model=ModelConfig(
            width=512,
            layers=8,
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
            remat="selective",
            chunk_rows=4096,
        ),
        loss=LossConfig(negatives=128),
        train=TrainConfig(epochs=2, steps_per_call=4, eval_users=1),
        parallel=ParallelConfig(context=2, strategy="ulysses"),
    )
    return to_config_dict(config)
