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
    check = TimeCheck(unit, place)
    check.add(values)
    check.finish()


class TimeCheck:
    """`check_times` for times that come part by part."""

    def __init__(self, unit: Unit, place: Place):
        self._unit, self._place = unit, place
        self._count = self._early = 0
        self._first = 0  # time of all
        self._first_early = 0  # place of it

    def add(self, values: Times) -> None:
        """Raises ValueError for a time outside 1901 to 2106."""
        ticks = TICKS[self._unit]
        low, high = FIRST_SECOND * ticks, (LAST_SECOND + 1) * ticks - 1
        if len(outside := np.flatnonzero((values < low) | (values > high))):
            raise self._refusal(int(values[outside[0]]), self._count + int(outside[0]))
        early = np.flatnonzero(np.abs(values) < EARLY * ticks)
        if not self._count and len(values):
            self._first = int(values[0])
        if not self._early and len(early):
            self._first_early = self._count + int(early[0])
        self._count += len(values)
        self._early += len(early)

    def finish(self) -> None:
        """Raises ValueError where all times seem to be in a coarser unit; warns if only some do."""
        if self._unit == "s" or not self._early:
            return
        if self._early == self._count:
            raise self._refusal(self._first, 0)
        _log.warning(
            "%s: %d of %d times lie between 1966 and 1973: are they in %s like the others?",
            _words(self._place, self._first_early),
            self._early,
            self._count,
            WORDS[self._unit],
        )

    def _refusal(self, value: int, i: int) -> ValueError:
        unit, seems = self._unit, unit_of(value)
        guess = "" if seems in (None, unit) else f", and seems to be in {WORDS[seems]}"
        legal = FIRST_SECOND * TICKS[unit] <= value < (LAST_SECOND + 1) * TICKS[unit]
        when = "between 1966 and 1973, as all here do" if legal else "outside 1901 to 2106"
        return ValueError(
            f"{_words(self._place, i)} must be {WORDS[unit]} since 1970: {value} would lie "
            f"{when}{guess}. Give {WORDS[unit]}"
        )


def unit_of(value: int) -> Unit | None:
    """The unit in which a time lies between 1973 and 2106; None: in no unit."""
    fits = (unit for unit in UNITS if EARLY <= value / TICKS[unit] <= LAST_SECOND)
    return next(fits, None)


def _words(place: Place, i: int) -> str:
    return place if isinstance(place, str) else place(i)
