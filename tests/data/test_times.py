"""Times in the wrong unit are refused by their range; legal ones of any year are kept."""

import logging

import numpy as np
import pytest

from ultra_hstu.data.times import TICKS, UNITS, check_times, unit_of

ALL = [(unit, TICKS[unit]) for unit in UNITS]
FINER = ALL[1:]


@pytest.mark.parametrize(("unit", "ticks"), ALL)
def test_legal_times_of_any_year_are_kept(unit, ticks):
    seconds = np.array([-(2**31), -5, 0, 999_999_000, 1_112_487_027, 2**31, 2**32 - 1])
    for values in (seconds * ticks, seconds * ticks + ticks - 1, seconds[:0]):
        check_times(values, unit, "t")


@pytest.mark.parametrize(("unit", "ticks"), ALL)
@pytest.mark.parametrize(("second", "off"), [(-(2**31), -1), (2**32, 0)])
def test_times_out_of_range_are_named(unit, ticks, second, off):
    values = np.array([0, second * ticks + off, 10**8 * ticks])
    with pytest.raises(ValueError, match=f"^line 1: t must be .*: {values[1]} .*outside 1901"):
        check_times(values, unit, lambda i: f"line {i}: t")


@pytest.mark.parametrize(("finer", "ticks"), FINER)
def test_a_finer_unit_than_seconds_is_named(finer, ticks):
    with pytest.raises(ValueError, match=r"now must be seconds .*seems to be in \w+\. Give sec"):
        check_times(np.array([1_112_572_487 * ticks]), "s", "now")
    assert unit_of(1_112_572_487 * ticks) == finer


@pytest.mark.parametrize(("unit", "ticks"), FINER)
def test_a_column_of_a_coarser_unit_is_refused(unit, ticks):
    seconds = np.array([1_650_000_000, 1_650_000_001])
    with pytest.raises(ValueError, match="1650000000 would lie .*seems to be in seconds"):
        check_times(seconds, unit, "time")
    with pytest.raises(ValueError, match="as all here do"):
        check_times(np.array([10**8 * ticks - 1, 1 - 10**8 * ticks]), unit, "time")


def test_a_column_in_two_units_is_counted_aloud(caplog):
    with caplog.at_level(logging.WARNING):
        check_times(np.array([1_650_000_000_123, 1_650_000_000]), "ms", lambda i: f"line {i}")
    assert "line 1: 1 of 2 times lie between 1966 and 1973" in caplog.text
