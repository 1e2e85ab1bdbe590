"""All four papers in one step: MovieLens-1M, ranked, by 2 x 4 devices, or any other mesh.

HSTU (arXiv 2402.17152): a ranking task on jagged histories; stochastic length cuts the long ones.
ULTRA-HSTU (arXiv 2602.16986): item and action in one token, semi-local attention, truncation, a
mixture of two transducers, FP8 projections, selective rematerialisation, and sampling that gives
every device the same load. Context parallelism (arXiv 2508.04711): four devices share the rows of a
group's users; all eight divide the tables, whose entries are updated row-wise, and the matrices of
layers. Mini-sequences (arXiv 2407.15892): token-wise parts and the head work on some rows at once.

JAX_NUM_CPU_DEVICES=8 python -m experiments.train --config=everything --workdir=runs/everything
"""

from experiments.configs import ranking
from ultra_hstu.config import ParallelConfig
from ultra_hstu.fields import changed

EVERYTHING = changed(
    ranking.ML1M_ULTRA,
    name="everything",
    data={"load_balance": True},
    model={"projection": "fp8", "remat": "selective", "chunk_rows": 1024},
    optim={"tables": "rowwise_adagrad"},
    parallel=ParallelConfig(data=2, context=4, fsdp=True),
)
CONFIGS = (EVERYTHING,)
