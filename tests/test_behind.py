"""Work behind the caller: in order, superseded where it waits, errors raised once."""

import threading
import time

import pytest

from ultra_hstu.behind import Behind


def test_of_what_waits_the_newest_is_done_and_the_newest_that_lasts():
    behind, free, done = Behind(2), threading.Event(), []
    begun = threading.Event()

    def first():
        begun.set()
        free.wait()
        done.append(0)

    behind.put(first, lasting=False)
    begun.wait()
    for number, lasting in enumerate([False, True, False, True, False, False], start=1):
        behind.put(lambda number=number: done.append(number), lasting=lasting)
    free.set()
    behind.join()
    assert done == [0, 4, 6]
    behind.put(lambda: done.append(7), lasting=False)
    behind.join()
    assert done[-1] == 7


def test_an_error_is_raised_once_and_work_goes_on():
    behind, done = Behind(3), []

    def fails():
        raise OSError("disk full")

    behind.put(fails, lasting=False)
    with pytest.raises(OSError, match="disk full"):
        behind.join()
    behind.put(fails, lasting=True)
    while behind._working:
        pass
    with pytest.raises(OSError, match="disk full"):
        behind.put(lambda: done.append(1), lasting=False)
    behind.join()
    assert done == [1]


def test_the_thread_rests_until_somebody_waits_for_it():
    behind, done = Behind(2), []
    behind.put(lambda: time.sleep(0.05), lasting=False)
    behind.put(lambda: done.append(1), lasting=False)
    time.sleep(0.2)
    assert done == []  # it rests for 0.45 seconds
    behind.join()
    assert done == [1]
