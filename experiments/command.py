"""What all command lines share: their common flags, and errors as one line with an exit code."""

import dataclasses
import io
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import jax
import ml_collections
from absl import app, flags
from ml_collections import config_flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser
from rich.console import Console

from experiments import configs, screen
from ultra_hstu import compilation_cache, fields, paths, progress, report, signals
from ultra_hstu.config import Config, EvalConfig, to_config_dict
from ultra_hstu.parallel import processes
from ultra_hstu.step import require_jit
from ultra_hstu.train import Interrupted

flags.disclaim_key_flags()  # flags defined here are those of the program that asks for them

# In errors of JAX where another process is missing.
LOST_WORDS = ("Gloo", "NCCL", "coordination service", "UNAVAILABLE", "DEADLINE_EXCEEDED")
LOST = (
    "another process was lost in the middle of the run ({error}). Start the same command again in "
    "all processes, or in fewer or more of them with another mesh: it goes on from the last "
    "checkpoint."
)


class OrNone(flags.ArgumentParser):
    """Parses "None", which an optional field of a configuration may be, and other values."""

    def __init__(self, values: flags.ArgumentParser):
        self.values = values

    def parse(self, argument: Any) -> Any:
        return None if argument == "None" else self.values.parse(argument)


for optional, values in (
    (int | None, flags.IntegerParser()),
    (float | None, flags.FloatParser()),
    (str | None, flags.ArgumentParser()),
):
    config_flags.register_flag_parser_for_type(optional, OrNone(values))


_TASKS = "data.table.tasks."


class ConfigParser(ConfigFileFlagParser):
    """Reads the name of a configuration, or the path of a user's own file: `own.py[:argument]`.

    `experiments/configs/NAME.py`, which records name, is the configuration NAME. The `get_config`
    of a file returns a `Config`, or some of its fields as a ConfigDict or a dict. An override of a
    field that the configuration lacks is a `flags.Error` with the near names; a task of own data,
    --config.data.table.tasks.NAME=RULE, is a field that its flag makes.
    """

    def parse(self, path: str) -> ml_collections.ConfigDict:
        name, colon, argument = path.partition(":")
        file = paths.local(name)
        if file.is_file():
            found = self._of_file(str(file), colon + argument)
        else:
            recorded = file.suffix == ".py" and file.parts[-3:-1] == ("experiments", "configs")
            found = configs.named(file.stem if recorded else path)
        config = to_config_dict(found).lock()
        known = list(fields.paths(dataclasses.asdict(found)))
        for given in sys.argv[1:]:
            field = re.match(rf"--?(?:no)?{self.name}\.([\w.]+)(?:=|$)", given)
            if field and field[1].startswith(_TASKS):
                with config.unlocked():
                    config.data.table.tasks[field[1].removeprefix(_TASKS)] = ""
            elif field and field[1] not in known:
                raise flags.Error(fields.unknown(field[1], known))
        return config

    def _of_file(self, file: str, argument: str) -> Config:
        found = super().parse(file + argument)
        if isinstance(found, ml_collections.ConfigDict):
            found = found.to_dict()
        if isinstance(found, dict):
            found = fields.build(Config, found)
        if not isinstance(found, Config):
            problem = getattr(found, "_error", f"get_config() returned {found!r:.60}")
            raise ValueError(f"{file} makes no configuration: {problem}")
        return found


class PathParser(flags.ArgumentParser):
    """Parses a local path: `~` stands for the home folder, and URLs are refused."""

    def parse(self, argument: str) -> str:
        return str(paths.local(argument))


def as_path[V](flag: flags.FlagHolder[V]) -> flags.FlagHolder[V]:
    """The flag, whose value is a local path from now on."""
    flags.FLAGS[flag.name].parser = PathParser()
    return flag


def define_config(
    name: str = "config",
    what: str = "the configuration",
    required: bool = True,
    default: str | None = None,
) -> flags.FlagHolder[ml_collections.ConfigDict]:
    """--NAME, whose fields --NAME.FIELD overrides."""
    text = f"{what}: a name of experiments/configs, or a file whose get_config() makes one"
    holder = config_flags.DEFINE_config_file(name, None, text, lock_config=True)
    flags.FLAGS[name].parser = ConfigParser(name)
    given = any(re.match(rf"--?{name}(=|$)", argument) for argument in sys.argv[1:])
    if default is not None and not given:  # as if it were: overrides need it
        sys.argv.insert(1, f"--{name}={default}")
    if required:
        flags.mark_flag_as_required(name)
    return holder


def define_eval() -> dict[str, flags.FlagHolder[str | None]]:
    """--config.eval.FIELD, by field, for a command on a run that is there: instead of the run's."""
    return {
        name: flags.DEFINE_enum(
            f"config.eval.{name}", None, get_args(hint), f"instead of the run's eval.{name}"
        )
        for name, hint in get_type_hints(EvalConfig).items()
    }


def define_run(
    what: str = "folder of a trained run",
) -> tuple[flags.FlagHolder[str], flags.FlagHolder[str | None]]:
    """--workdir and --raw_dir, for a command on a run that is there."""
    raw_dir = "where the raw data is now, if not where the run found it"
    return (
        as_path(flags.DEFINE_string("workdir", None, what, required=True)),
        as_path(flags.DEFINE_string("raw_dir", None, raw_dir)),
    )


def define_record() -> flags.FlagHolder[str | None]:
    """--record."""
    what = "also write the result with device, versions, commit, command and date to this JSON file"
    return as_path(flags.DEFINE_string("record", None, what))


def progress_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Where a command says what it does, with the line about the devices; --quiet: nowhere.

    Args:
      stderr: the command's results are for standard output.
      quiet: another process speaks for this one.
    """
    quiet = quiet or bool(flags.FLAGS.quiet)
    console = Console(stderr=True, quiet=quiet) if stderr else report.make_console(quiet=quiet)
    with progress.waiting(console, "device", "starting JAX") as came:
        devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        came(f"{devices}, JAX {jax.__version__}")
    return console


def run(main: Callable[[list[str]], None]) -> None:
    """Runs `main` as the program. With several processes an error of one ends them all.

    Exit codes: 0 done; 1 bad input or disk; 3 a loss that is not finite; 4 another process of the
    run failed or was lost; 130 stopped by SIGINT (Ctrl-C), 143 by SIGTERM, a training run with its
    state saved unless a second signal came. (A server that is asked to stop is done: 0.)
    """
    watch, spec = signals.watch(), sys.modules[main.__module__].__spec__
    if spec is not None and spec.name.startswith("experiments."):
        screen.begin(spec.name.removeprefix("experiments."))
    flags.DEFINE_bool("quiet", False, "results, warnings and errors alone, nothing of the work")
    cache = flags.DEFINE_string(
        "compilation_cache",
        None,
        "folder of compiled programs, by which a second start is faster, or off; by default in the "
        "cache of the user",
    )

    def wrapped(argv: list[str]) -> None:
        screen.loaded.set()
        errors = Console(stderr=True)
        if argv[1:]:
            errors.print(
                f"error: what is {' '.join(argv[1:])!r}? "
                "Options begin with --, and values with blanks need quotes.",
                markup=False,
            )
            sys.exit(1)

        def fail(error: Exception, code: int) -> None:
            errors.print(f"error: {error}", markup=False, soft_wrap=True)
            processes.fail(str(error), code)

        # Orbax reports every file that it touches; its errors reach us as exceptions.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        logging.getLogger().setLevel(logging.WARNING)
        compilation_cache.use(cache.value)
        _show_log(logging.WARNING if flags.FLAGS.quiet else logging.INFO)
        try:
            require_jit()
            main(argv)
            processes.end()
        except Interrupted as stop:
            if processes.is_first():
                errors.print(str(stop), markup=False)
            processes.end()
            sys.exit(128 + stop.signal)
        except KeyboardInterrupt:
            number = watch.requested or signal.SIGINT
            watch.acknowledged.wait(1)
            processes.fail(f"stopped by {signal.Signals(number).name}", 128 + number)
        except BrokenPipeError:
            with open(os.devnull, "w") as nowhere:  # where Python's last flush goes
                os.dup2(nowhere.fileno(), sys.stdout.fileno())
            fail(OSError("what read the output of this command has closed it"), 1)
        except FloatingPointError as error:
            fail(error, 3)
        except (ValueError, NotImplementedError, OSError) as error:
            fail(error, 1)
        except Exception as error:
            if not processes.several():
                raise
            if isinstance(error, jax.errors.JaxRuntimeError) and any(
                word in str(error) for word in LOST_WORDS
            ):
                fail(ConnectionError(LOST.format(error=str(error).splitlines()[0])), processes.LOST)
            traceback.print_exc()
            fail(error, 1)

    prepare_output()
    app.run(wrapped, flags_parser=parse)


def prepare_output() -> None:
    """Closed output (`>&-`) goes nowhere; what other output cannot encode is written as escapes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _ToStandardError(logging.StreamHandler):
    """Writes to what `sys.stderr` is at that time: a bar on the screen stands in for it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _show_log(level: int) -> None:
    """What loading says of the data goes to standard error, as it is."""
    handler = _ToStandardError()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("ultra_hstu", "experiments"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False


def parse(argv: list[str]) -> list[str]:
    """The flags, with a misspelt or misfitting --config.FIELD named like any other bad input."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        Console(stderr=True).print(
            f"error: {error}\n(--help lists the options)", markup=False, soft_wrap=True
        )
        sys.exit(1)
