"""Small ranking data made in memory: users with a few events, ratings, flags, a skill and times."""

import numpy as np

from ultra_hstu.config import Config, DataConfig, ModelConfig, OptimConfig, RankConfig, TrainConfig
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.data.interactions import Interactions
from ultra_hstu.model_config import ChannelConfig

ITEMS = 30


def interactions(lengths=(9, 3, 20, 5, 12, 7), *, seed=0, times=True) -> Interactions:
    rng = np.random.default_rng(seed)
    events = int(sum(lengths))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    moment = np.sort(rng.integers(0, 10**6, events))
    return Interactions(
        users=np.arange(len(lengths)),
        items=rng.integers(1, ITEMS + 1, events).astype(np.int32),
        offsets=offsets,
        timestamps=10**9 + moment if times else None,
        actions={
            "rating": rng.integers(1, 6, events).astype(np.float32),
            "is_click": rng.integers(0, 2, events).astype(np.int32),
            "skill": rng.integers(5, 9, events).astype(np.int32),
        },
        catalog=Catalog.from_ids(np.arange(1, ITEMS + 1)),
    )


def config(data_dir="unused", **sections) -> Config:
    """config(rank=dict(input="interleaved")) replaces fields."""
    fields = {
        "data": dict(max_history=8, batch_users=4, data_dir=str(data_dir)),
        "model": dict(width=8, layers=1, heads=2, qk_width=4, v_width=4,
                      preset="production", relative_bias=False,
                      input_dropout=0.0, linear_dropout=0.0, output_slots=0),
        "rank": dict(tasks=("rating_at_least_4", "rating"), signals=("rating", "is_click"),
                     features=("skill",), targets=3,
                     head_width=8, validation_fraction=0.2, test_fraction=0.2),
        "train": dict(epochs=2, protocol="chronological", eval_users=4, steps_per_call=2),
        "optim": dict(learning_rate=1e-2),
    }  # fmt: skip
    merged = {name: fields.get(name, {}) | sections.get(name, {}) for name in fields | sections}
    return Config(
        name="small_rank",
        data=DataConfig(**merged["data"]),
        model=ModelConfig(**merged["model"]),
        rank=RankConfig(**merged["rank"]),
        train=TrainConfig(**merged["train"]),
        optim=OptimConfig(**merged["optim"]),
    )


OWN_OPTIONS = {  # beside model.window=(3,), for one
    "consumption": ChannelConfig(
        max_history=6, layers=2, width=12, full_rows=(1,), truncate_after=1, truncate_length=3
    ),
    "engagement": ChannelConfig(
        signal="is_click", at_least=1.0, max_history=4, layers=2, window=(-1, 2), prefix=(0, 1)
    ),
}
MIXTURE = {
    "consumption": ChannelConfig(max_history=6, layers=1),
    "engagement": ChannelConfig(signal="is_click", at_least=1.0, max_history=4, layers=2),
}
