"""The configurations of the repository, by name: `--config=NAME` of every command.

python -m experiments.train --config=NAME --workdir=runs/NAME
"""

from experiments.configs import everything, long, ranking, retrieval, scaling, table
from ultra_hstu.config import Config

CONFIGS = {
    run.name: run
    for module in (retrieval, ranking, long, scaling, table, everything)
    for run in module.CONFIGS
}


def named(name: str) -> Config:
    """Raises ValueError, with all names, where there is no such configuration."""
    if name not in CONFIGS:
        raise ValueError(
            f"there is no configuration {name!r}: give the path of a file, "
            f"or one of {', '.join(CONFIGS)}"
        )
    return CONFIGS[name]
