"""Times of a request: checked, and counted from its first event, so that what is encoded does not depend on when the world began."""

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike

from ultra_hstu.sequences import SECONDS_RANGE


def since_first(
    count: int, times: ArrayLike | None, now: int | None, *, first: int = 0
) -> Int[np.ndarray, " n"]:
    """Seconds of the events from `first` on and of the request behind them, int32, from the first of these.

    Args:
      count: how many events there are.
      times: seconds, one an event, oldest first; None: all events are simultaneous.
      now: time of the request; None: that of the last event.

    Raises:
      ValueError: another number of times, times that go back or span more than 2^31 - 1 seconds.
    """
    time_E = np.zeros(count, np.int64) if times is None else np.asarray(times, np.int64)
    if len(time_E) != count:
        raise ValueError(f"{count} items but {len(time_E)} times: give one time an item")
    if now is not None or not count:
        time_E = np.append(time_E, np.int64(0 if now is None else now))
    else:
        time_E = np.append(time_E, time_E[-1])
    if len(back := np.flatnonzero(time_E[1:] < time_E[:-1])):
        earlier, later = int(time_E[back[0]]), int(time_E[back[0] + 1])
        raise ValueError(
            f"times go back from {earlier} to {later}: give the history oldest first, and now not before its last event"
        )
    time_E = time_E[first:]
    if int(time_E[-1]) - int(time_E[0]) > SECONDS_RANGE:
        raise ValueError(
            f"times run from {time_E[0]} to {time_E[-1]}: more than 2^31 - 1 seconds. Give seconds, not milliseconds."
        )
    return (time_E - time_E[0]).astype(np.int32)
