"""Tests that need a GPU, run by `make test-gpu`: never in CI, where every one of them would be skipped. `--record=PATH` writes what came out."""

import collections
import json
import os
import pathlib

# Compiling takes most of the time: what is not under test needs neither the fastest algorithm nor the best code. And several processes share the GPU.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402

from ultra_hstu.provenance import provenance  # noqa: E402

jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_addoption(parser):
    parser.addoption("--record", type=pathlib.Path, help="JSON file for counts and durations")


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    if config.option.record is None or hasattr(
        config, "workerinput"
    ):  # an interrupted worker of xdist comes here, too
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
    config.option.record.write_text(json.dumps(record, indent=1) + "\n")
