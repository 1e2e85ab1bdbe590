"""The configuration of tests.small_run as a file: `--config=tests/small_config.py:DATA_DIR`."""

from tests.small_run import small_config
from ultra_hstu.config import to_config_dict


def get_config(data_dir):
    return to_config_dict(small_config(data_dir))
