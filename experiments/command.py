"""What every command line shares: clear errors instead of tracebacks, and exit codes that scripts can rely on. With several processes an error of one
ends them all."""

import logging
import sys
import traceback
from collections.abc import Callable

import jax
from absl import app, flags
from rich.console import Console

from ultra_hstu.parallel import processes
from ultra_hstu.train import Interrupted

LOST_WORDS = (
    "Gloo",
    "NCCL",
    "coordination service",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
)  # in errors of JAX where another process is missing
LOST = (
    "another process was lost in the middle of the run ({error}). Start the same command again in all processes, or in fewer or more of them with "
    "another mesh: it goes on from the last checkpoint."
)


def run(main: Callable[[list[str]], None]) -> None:
    """Runs `main` as the program. Exit codes: 0 done, or stopped by a signal with its state saved; 1 bad input or disk; 3 a loss that is not finite; 4 another
    process of the run failed or was lost."""

    def wrapped(argv: list[str]) -> None:
        errors = Console(stderr=True)
        if argv[1:]:
            errors.print(
                f"error: what is {' '.join(argv[1:])!r}? Options begin with --, and values with blanks need quotes.",
                markup=False,
            )
            sys.exit(1)

        def fail(error: Exception, code: int) -> None:
            errors.print(f"error: {error}", markup=False, soft_wrap=True)
            processes.fail(str(error), code)

        logging.getLogger().setLevel(logging.WARNING)
        logging.getLogger("absl").setLevel(
            logging.CRITICAL
        )  # Orbax reports every file that it touches; its errors reach us as exceptions
        try:
            main(argv)
            processes.end()
        except Interrupted as stop:
            if processes.is_first():
                errors.print(str(stop), markup=False)
            processes.end()
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

    app.run(wrapped, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    """The flags, with a misspelt or misfitting --config.FIELD named like any other bad input."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        Console(stderr=True).print(
            f"error: {error}\n(--help lists the options)", markup=False, soft_wrap=True
        )
        sys.exit(1)
