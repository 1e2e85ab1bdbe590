"""Where a measured number comes from: device, versions, commit, command, date."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def provenance() -> dict[str, Any]:
    """What every file under `experiments/results/` says about its making."""
    return {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "platform": jax.default_backend(),
        "host_cores": len(os.sched_getaffinity(0)),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "xla_flags": os.environ.get("XLA_FLAGS"),
        "commit": _commit(),
        "command": _command(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _command() -> str:
    """The command line of this process; a script, as `ultra-hstu` is, without its folder."""
    program, *arguments = ["python", *sys.orig_argv[1:]]
    if arguments and os.path.isabs(arguments[0]):
        program, *arguments = [os.path.basename(arguments[0]), *arguments[1:]]
    return " ".join([program, *arguments])


def _commit() -> str:
    """The checked-out commit, "+" behind it where files differ; ULTRA_HSTU_COMMIT stands in where
    there is no git.
    """
    if given := os.environ.get("ULTRA_HSTU_COMMIT"):
        return given
    describe = ["git", "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
