"""Synthetic data of known structure: HSTU's study of its appendix C, and long histories.

The study (arXiv 2402.17152, appendix C) has 20,000 items and 1,000,000 records of 128 events, the
first 90 % to learn from. It publishes neither widths nor depths, nor how often the stream is
trained on: here all three models have the same, and pass over it once. docs/scaling.md.
"""

from experiments.configs import ranking
from ultra_hstu.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RankConfig,
    SyntheticConfig,
    TrainConfig,
)
from ultra_hstu.fields import changed

STREAM = Config(
    name="synthetic_hstu",
    data=DataConfig(
        source="synthetic",
        max_history=127,
        batch_users=512,
        placement="device",
        synthetic=SyntheticConfig(users=1_000_000, length=128, items=20_000, categories=100),
    ),
    model=ModelConfig(
        width=256,
        layers=4,
        heads=4,
        qk_width=64,
        v_width=64,
        ffn_width=1024,
        relative_bias=False,
        input_dropout=0.0,
        linear_dropout=0.0,
    ),
    loss=LossConfig(negatives=512),
    optim=OptimConfig(warmup_steps=100, decay_steps=1758),
    train=TrainConfig(protocol="new_users", epochs=1),
)
# Will the user like an item of this category? The newest tenth of every new user's events is asked
# about, 1,024 at a time, with 16,384 events before them or more.
LONG = changed(
    ranking.hstu(
        "synthetic_long",
        DataConfig(source="synthetic_long", max_history=16384),
        RankConfig(tasks=("liked",), signals=("liked",), features=("category",), targets=1024),
        dropout=0.0,
        train=TrainConfig(),
    ),
    data={"batch_users": 2, "placement": "device"},
    model={"width": 128, "qk_width": 64, "v_width": 64, "output_slots": 0},
    optim={"learning_rate": 3e-3},
    train={"protocol": "new_users", "epochs": 1, "eval_users": 8},
)
CONFIGS = (
    # Published: HR@10 .0893 and HR@50 .3170, quoted from arXiv 2402.17152, table 2, which has the
    # other two as well: .0617 and .2496 with softmax, .0442 and .2025 of a Transformer.
    STREAM,
    changed(STREAM, name="synthetic_hstu_softmax", model={"attention": "softmax"}),
    changed(STREAM, name="synthetic_transformer", model={"kind": "sasrec"}),
    LONG,
)
