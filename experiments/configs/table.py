"""Runs on own events: any CSV, JSON lines or Parquet files. docs/your_data.md says more.

python -m experiments.train --config=table --config.data.raw_dir=events.parquet --workdir=runs/own
"""

from ultra_hstu.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RankConfig,
    TrainConfig,
)
from ultra_hstu.fields import changed

# The next item of every user, the epoch chosen on the item before the test item. Small batches give
# a small table enough steps; training stops once five epochs bring nothing better.
TABLE = Config(
    name="table",
    data=DataConfig(source="table", batch_users=64),
    model=ModelConfig(width=64, qk_width=64, v_width=64),
    train=TrainConfig(epochs=50, protocol="validated", patience=5),
)
# What a user does with given items. Tasks are rules about columns:
# --config.data.table.tasks.like='rating>=4'.
TABLE_RANK = changed(
    TABLE,
    name="table_rank",
    model={"preset": "production", "relative_bias": False, "heads": 2, "layers": 3}
    | {"qk_width": 32, "v_width": 32},
    optim=OptimConfig(clip_norm=1.0),
    rank=RankConfig(targets=16),
    train={"epochs": 20, "patience": 4},
)
CONFIGS = (TABLE, TABLE_RANK)
