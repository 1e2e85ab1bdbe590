"""Settings of the tests that need a GPU, and a record of their outcome (`--record=PATH`).

`make test-gpu` runs them. They are not collected where there is no GPU, since all would be skipped.
`tests/conftest.py` is imported before this file. It imports JAX, but makes no backend: the flags
below are read when the first test uses a device.
"""

import collections
import json
import os
import pathlib

import jax

from ultra_hstu.provenance import provenance

# Compiling takes most of the time: what is not under test needs neither the fastest algorithm nor
# the best code. Several processes share the GPU.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# Every program is compiled anew on a GPU: the record's durations compare, and a kernel that no
# longer compiles cannot hide behind a stored program.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
jax.config.update("jax_enable_compilation_cache", False)


def pytest_addoption(parser):
    parser.addoption("--record", type=pathlib.Path, help="JSON file for counts and durations")


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    path = config.getoption("record", None)  # there is none where other folders are run, too
    if path is None or hasattr(config, "workerinput"):  # an interrupted worker of xdist calls this
        return
    suites = collections.defaultdict(lambda: {"passed": 0, "failed": 0, "seconds": 0.0})
    failures = []
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            suite = suites[report.nodeid.split("::")[0]]
            suite["passed" if outcome == "passed" else "failed"] += 1
            suite["seconds"] = round(suite["seconds"] + report.duration, 1)
            failures += [report.nodeid] if outcome != "passed" else []
    record = {
        **provenance(),
        "exit_status": int(exitstatus),
        "failures": sorted(failures),
        "suites": dict(sorted(suites.items())),
    }
    record |= {
        count: sum(suite[count] for suite in suites.values()) for count in ("passed", "failed")
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
