"""Times of events: seconds since 1970, and the finer units that files hold them in."""

import logging
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from jaxtyping import Int64

_log = logging.getLogger(__name__)
Unit = Literal["s", "ms", "us", "ns"]
UNITS: tuple[Unit, ...] = get_args(Unit)
WORDS = dict(zip(UNITS, ("seconds", "milliseconds", "microseconds", "nanoseconds"), strict=True))
TICKS = {unit: 1000**power for power, unit in enumerate(UNITS)}  # of a unit in a second
# Legal seconds: 1901 to 2106.
FIRST_SECOND, LAST_SECOND = -(2**31), 2**32 - 1
# Finer times within so many seconds of 1970 (1966 to 1973) are taken for those of a coarser unit.
EARLY = 10**8

Times = Int64[np.ndarray, " n"]  # since 1970
Place = str | Callable[[int], str]  # what holds the times, or the i-th of them, for messages


def check_times(values: Times, unit: Unit, place: Place) -> None:
    """Finds times that are not in their unit, by their range.

    Times of 1901 to 2106 are legal, those before 1970 too. A column of a finer unit than seconds
    whose values all lie within 10^8 seconds of 1970 (milliseconds below 10^11) holds a coarser
    unit; if only some do, a warning counts them.

    Args:
        values: any number of them.
        place: the name of the field, or a function that gives file, line and name of the i-th.

    Raises:
        ValueError: names the place, the value and the unit that it seems to be in.
    """
    ticks = TICKS[unit]
    low, high = FIRST_SECOND * ticks, (LAST_SECOND + 1) * ticks - 1
    outside = np.flatnonzero((values < low) | (values > high))
    if len(outside):
        raise _refusal(values, int(outside[0]), unit, place)
    early = np.flatnonzero(np.abs(values) < EARLY * ticks)
    if unit == "s" or not len(early):
        return
    if len(early) == len(values):
        raise _refusal(values, 0, unit, place)
    _log.warning(
        "%s: %d of %d times lie between 1966 and 1973: are they in %s like the others?",
        _words(place, int(early[0])),
        len(early),
        len(values),
        WORDS[unit],
    )


def seconds_of(values: Times, unit: Unit, place: Place) -> Times:
    """Whole seconds since 1970, rounded down. Raises ValueError as `check_times`."""
    check_times(values, unit, place)
    return values // TICKS[unit]


def unit_of(value: int) -> Unit | None:
    """The unit in which a time lies between 1973 and 2106; None: in no unit."""
    fits = (unit for unit in UNITS if EARLY <= value / TICKS[unit] <= LAST_SECOND)
    return next(fits, None)


def _words(place: Place, i: int) -> str:
    return place if isinstance(place, str) else place(i)


def _refusal(values: Times, i: int, unit: Unit, place: Place) -> ValueError:
    value = int(values[i])
    seems = unit_of(value)
    guess = "" if seems in (None, unit) else f", and seems to be in {WORDS[seems]}"
    legal = FIRST_SECOND * TICKS[unit] <= value < (LAST_SECOND + 1) * TICKS[unit]
    when = "between 1966 and 1973, as all here do" if legal else "outside 1901 to 2106"
    return ValueError(
        f"{_words(place, i)} must be {WORDS[unit]} since 1970: {value} would lie {when}{guess}. "
        f"Give {WORDS[unit]}"
    )
