"""Where a measured number comes from: device, versions, commit, command, date."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
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
    """The checked-out commit of this code, "+" behind it where files differ.

    ULTRA_HSTU_COMMIT stands in where this file is in no git repository, or an installed copy that
    another project's repository happens to surround.
    """
    if given := os.environ.get("ULTRA_HSTU_COMMIT"):
        return given
    tracked = _git("ls-files", "--error-unmatch", Path(__file__).name)
    described = _git("describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+")
    return described if tracked and described else "unknown"


def _git(*arguments: str) -> str:
    """What git says of the folder of this file; nothing where it fails."""
    # Hooks have these set, for another repository.
    others = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_PREFIX")
    environment = {name: value for name, value in os.environ.items() if name not in others}
    try:
        return subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
