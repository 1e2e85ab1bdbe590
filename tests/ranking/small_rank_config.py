"""The configuration of tests.ranking.small_rank as a config file.

--config=tests/ranking/small_rank_config.py:FOLDER
"""

from pathlib import Path

from tests.ranking.small_rank import rank_config
from ultra_hstu.config import to_config_dict


def get_config(folder):
    return to_config_dict(rank_config(Path(folder)))
