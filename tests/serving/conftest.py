"""Fixtures of the tests of serving."""

import fcntl

import pytest


@pytest.fixture
def one_deployment(tmp_path_factory):
    """Holds back other deployments, of test processes beside this one: two cores start one well."""
    with open(tmp_path_factory.getbasetemp().parent / "deployment.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
