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
from ultra_hstu import (
    compilation_cache,
    effects,
    fields,
    paths,
    progress,
    quantization,
    report,
    signals,
)
from ultra_hstu.config import Config, EvalConfig, from_config_dict, to_config_dict
from ultra_hstu.parallel import processes
from ultra_hstu.pieces import pieces
from ultra_hstu.run import Interrupted
from ultra_hstu.step import require_jit

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
        for field in given_fields(self.name):
            if field.startswith(_TASKS):
                with config.unlocked():
                    config.data.table.tasks[field.removeprefix(_TASKS)] = ""
            elif field not in known:
                raise flags.Error(fields.unknown(field, known))
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


def given_fields(name: str) -> list[str]:
    """The fields that the command line sets by --NAME.FIELD."""
    found = (re.match(rf"--?(?:no)?{name}\.([\w.]+)(?:=|$)", word) for word in sys.argv[1:])
    return [field[1] for field in found if field]


def resolved(values: ml_collections.ConfigDict, name: str = "config") -> Config:
    """The configuration that --NAME and its overrides make, whose paths are absolute from now on.

    Raises:
      ValueError: values that cannot work, and overrides that have no effect.
    """
    config = from_config_dict(values)
    for field in given_fields(name):
        effects.require_effect(config, field)
    data, table = config.data, config.data.table
    return fields.changed(
        config,
        train={"init_from": _absolute(config.train.init_from)},
        data={
            "raw_dir": _absolute(data.raw_dir),
            "data_dir": _absolute(data.data_dir),
            "table": {
                "items_file": _absolute(table.items_file),
                "users_file": _absolute(table.users_file),
            },
        },
    )


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(paths.local(path).absolute())


def configuration_lines(config: Config) -> list[str]:
    """Every field with its value; `*` and the default where it is another one.

    What has no effect says so. The last line has the pieces of the papers that are on.
    """
    default, found = (fields.flat(dataclasses.asdict(one)) for one in (Config(), config))
    width = max(map(len, found))
    idle = effects.without_effect(config)
    lines = [f"{config.name}: every field; * marks values that are not the defaults"]
    for field, value in found.items():
        known = default.get(field, value)
        changed = field not in default or value != known
        note = f"   (default {known!r})" if changed and field in default else ""
        if any(field == name or field.startswith(f"{name}.") for name in idle):
            note += "   (no effect)"
        lines.append(f"{'*' if changed else ' '} {field:<{width}}  {value!r}{note}")
    return [*lines, f"pieces: {', '.join(pieces(config)) or 'none'}"]


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
    put_first(name, default)
    if required:
        flags.mark_flag_as_required(name)
    return holder


def put_first(name: str, default: str | None = None) -> None:
    """Puts --NAME in front on the command line, where its overrides need it; if absent, a default.

    Users may write flags in any order.
    """
    places = [i for i, word in enumerate(sys.argv[1:], 1) if re.match(rf"--?{name}(=|$)", word)]
    if places:
        end = places[0] + (1 if "=" in sys.argv[places[0]] else 2)
        given = sys.argv[places[0] : end]
        del sys.argv[places[0] : end]
        sys.argv[1:1] = given
    elif default is not None:
        sys.argv.insert(1, f"--{name}={default}")


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


def define_tables() -> tuple[flags.FlagHolder[str], flags.FlagHolder[str | None]]:
    """--tables, of retrieval, and --host_table, of ranking: how items are kept for answers."""
    host = "keeps the item table of a ranking run in host memory, from where each request takes its"
    return (
        flags.DEFINE_enum(
            "tables", "float32", quantization.KINDS, "what the item table is served from"
        ),
        flags.DEFINE_enum("host_table", None, quantization.HOST_KINDS, f"{host} rows"),
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


def run(main: Callable[[list[str]], None], *, arguments: bool = False) -> None:
    """Runs `main` as the program. With several processes an error of one ends them all.

    `arguments`: whether the command takes any beside its flags.

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
        if argv[1:] and not arguments:
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
            f"error: {_in_words(error)}\n(--help lists the options)", markup=False, soft_wrap=True
        )
        sys.exit(1)


def _in_words(error: Exception) -> str:
    """The error; of a value that is not of a field's type, the field and its type."""
    found = re.match(r"flag --\w+\.([\w.]+)=(.*?): ", str(error), re.DOTALL)
    if found is None:
        return str(error)
    try:
        allowed = fields.words(fields.hint_of(Config, found[1]))
    except KeyError:
        return str(error)
    return f"{found[1]}={found[2]} is not allowed: use {allowed}"
