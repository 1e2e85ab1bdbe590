"""All commands by their names: `ultra-hstu NAME ...`, or `python -m experiments NAME ...`."""

import runpy
import sys

from experiments import screen

# NAME is the module experiments.NAME, which runs as by `python -m experiments.NAME`.
COMMANDS = {
    "train": "trains a configuration, or goes on with a run",
    "evaluate": "measures a run on its test or validation part",
    "recommend": "recommends items to a user, or answers a file of requests",
    "serve": "answers requests over HTTP",
    "compare": "compares runs: metrics, and what differs in their configurations",
    "export": "writes a ranking run as one file that scores without this code",
    "inspect": "shows what own data holds, and what a run on it would cost",
    "demo": "trains two small models on synthetic data, compares and draws them",
}


def main() -> None:
    """Runs the command that the first argument names. Exit codes as of `experiments.command.run`,
    and 1 for a name that there is not."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        print("usage: ultra-hstu COMMAND [--FLAG=VALUE ...]; ultra-hstu COMMAND --help\n")
        print("\n".join(f"  {name:<11}{what}" for name, what in COMMANDS.items()))
        return
    if name not in COMMANDS:
        sys.exit(f"error: there is no command {name!r}: use one of {', '.join(COMMANDS)}")
    sys.argv[1:] = arguments
    screen.begin(name)
    try:
        runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
    except ModuleNotFoundError as error:
        if name != "serve":
            raise
        sys.exit(
            f"error: serving needs {error.name}, of the extra `serve`: "
            "pip install -e '.[serve]' -c constraints.txt"
        )


if __name__ == "__main__":
    main()
