"""SASRec on Amazon Books, published hyperparameters of the HSTU paper's public code (arXiv 2402.17152, table 4).

    python -m experiments.train --config=experiments/configs/books_sasrec.py --workdir=runs/books_sasrec

Published HR@10 .0306, NDCG@10 .0164. For a GPU; not measured here.
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
        name="books_sasrec",
        data=DataConfig(source="amazon-books", max_history=50),
        model=ModelConfig(
            kind="sasrec",
            width=64,
            layers=4,
            heads=4,
            ffn_width=64,
            input_dropout=0.5,
            linear_dropout=0.5,
        ),
        loss=LossConfig(negatives=512),
        train=TrainConfig(epochs=201, eval_every=5, checkpoint_every=5),
    )
    return to_config_dict(config)
