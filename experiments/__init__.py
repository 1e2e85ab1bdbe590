"""The commands. What `python -m experiments.NAME` starts says so here, before its own imports."""

import sys

from experiments import screen

if sys.argv[0] == "-m":  # as long as Python looks for the module
    _module = sys.orig_argv[sys.orig_argv.index("-m") + 1] if "-m" in sys.orig_argv else ""
    if _module.startswith("experiments."):
        screen.begin(_module.removeprefix("experiments."))
