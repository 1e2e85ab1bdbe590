"""Very long synthetic histories, for Hopper GPUs."""

import dataclasses

from ultra_hstu.config import (
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    SyntheticConfig,
    TrainConfig,
)


def events(history: int, users: int, batch_users: int) -> DataConfig:
    """Full batches of histories that are all this long."""
    return DataConfig(
        source="synthetic",
        max_history=history,
        batch_users=batch_users,
        batch_tokens=batch_users * history,
        synthetic=SyntheticConfig(users=users, length=history + 3, items=20000, categories=100),
    )


ENCODER = ModelConfig(
    width=512,
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
)
ULTRA = (
    # ULTRA-HSTU at the paper's scale (arXiv 2602.16986), for one GPU: 18 layers of width 512 on
    # 16,384 events, semi-local attention, truncation. The paper names neither how many layers stand
    # below its truncation nor what length it keeps. With 3,072 events kept after 3 layers a forward
    # pass of the encoder takes 0.445 TFLOP a sample; the paper's table 2 has 0.436. Its dropout is
    # unknown, too; here there is none. `scripts.bench.long` times its steps.
    Config(
        name="long_ultra",
        data=events(16384, users=256, batch_users=4),
        model=dataclasses.replace(
            ENCODER,
            layers=18,
            window=(256,),
            full_rows=(256,),
            truncate_after=3,
            truncate_length=3072,
        ),
        train=TrainConfig(epochs=2, steps_per_call=4, eval_users=4),
    )
)
CONFIGS = (
    ULTRA,
    # The same with the layer that the paper writes down: its equations 2 to 4 are the layer of
    # HSTU, with SiLU over u, q, k and v, and an output projection of Norm(A) * U alone, a third as
    # wide as that of the published production code. 0.345 TFLOP a sample.
    dataclasses.replace(
        ULTRA,
        name="long_ultra_paper",
        model=dataclasses.replace(ULTRA.model, preset="research"),
    ),
    # Mini-sequences over Ulysses (MsT, arXiv 2407.15892, with DeepSpeed-Ulysses) on 65,536 events,
    # for two GPUs of one host, or as many as divide the four heads
    # (--config.parallel.context=4). Attention is whole and full causal: two all-to-alls give every
    # device all rows of its heads and take them back. Everything else works on the device's own
    # rows, 4,096 at a time, and is computed again in the backward. So the normed input and the
    # input of the output projection exist for one such piece. u, v, q and k stand around attention
    # for all of the device's rows, of one layer at a time.
    Config(
        name="long_mst",
        data=events(65536, users=64, batch_users=1),
        model=dataclasses.replace(ENCODER, layers=8, chunk_rows=4096),
        train=TrainConfig(epochs=2, steps_per_call=4, eval_users=1),
        parallel=ParallelConfig(context=2, strategy="ulysses"),
    ),
)
