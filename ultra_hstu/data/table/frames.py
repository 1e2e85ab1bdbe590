"""Own events that are a frame in memory."""

import logging

import pyarrow as pa
import pyarrow.interchange

from ultra_hstu.data.grouping import Titles
from ultra_hstu.data.interactions import Interactions
from ultra_hstu.data.table import columns as meaning
from ultra_hstu.data.table.reader import from_sources
from ultra_hstu.data.table.source import Frame
from ultra_hstu.table_config import TableConfig

_log = logging.getLogger(__name__)


def from_frame(frame: object, config: TableConfig, titles: Titles | None) -> Interactions:
    """Events of a frame in memory; see `Interactions.from_table`."""
    table = _arrow(frame)
    names = [name for name in table.column_names if table.column_names.count(name) == 1]
    columns = meaning.choose(names, config, "the frame")
    interactions, reading = from_sources([Frame(table)], columns, config, titles)
    for line in reading.lines():
        _log.info(line)
    return interactions


def _arrow(frame: object) -> pa.Table:
    if isinstance(frame, pa.Table):
        return frame
    if hasattr(frame, "__arrow_c_stream__"):
        return pa.table(frame)
    if hasattr(frame, "__dataframe__"):
        return pa.interchange.from_dataframe(frame)
    raise ValueError(
        f"{type(frame).__name__} is no frame that can be read: give one of pandas, polars or "
        "pyarrow, or use Interactions.from_arrays"
    )
