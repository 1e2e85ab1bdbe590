"""A run small enough for tests: about a second of training on one core."""

import dataclasses

from ultra_hstu.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    SyntheticConfig,
    TrainConfig,
)

SYNTHETIC = SyntheticConfig(users=60, length=12, items=120, categories=10)


def small_config(data_dir, **train) -> Config:
    """HSTU with a layer of width 16 on 60 synthetic users of 12 events."""
    return Config(
        name="small",
        data=DataConfig(
            source="synthetic",
            data_dir=str(data_dir),
            max_history=10,
            batch_users=8,
            synthetic=SYNTHETIC,
        ),
        model=ModelConfig(width=16, layers=1, heads=2, qk_width=8, v_width=8, output_slots=2),
        loss=LossConfig(negatives=16, chunk_rows=64),
        train=TrainConfig(**{"epochs": 3, "eval_users": 32, "steps_per_call": 3} | train),
    )


def with_(config: Config, **fields) -> Config:
    """with_(config, model__width=8) replaces nested fields."""
    for name, value in fields.items():
        section, field = name.split("__")
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{field: value})}
        )
    return config
