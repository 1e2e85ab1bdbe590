"""What every command line shares: clear errors instead of tracebacks, and exit codes that scripts can rely on."""

import logging
import sys
from collections.abc import Callable

from absl import app, flags
from rich.console import Console

from ultra_hstu.train import Interrupted


def run(main: Callable[[list[str]], None]) -> None:
    """Runs `main` as the program. Exit codes: 0 done, or stopped by a signal with its state saved; 1 bad input or disk; 3 a loss that is not finite."""

    def wrapped(argv: list[str]) -> None:
        errors = Console(stderr=True)
        if argv[1:]:
            errors.print(f"error: what is {' '.join(argv[1:])!r}? Options begin with --, and values with blanks need quotes.", markup=False)
            sys.exit(1)
        logging.getLogger().setLevel(logging.WARNING)
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax reports every file that it touches; its errors reach us as exceptions
        try:
            main(argv)
        except Interrupted as stop:
            errors.print(str(stop), markup=False)
        except FloatingPointError as error:
            errors.print(f"error: {error}", markup=False, soft_wrap=True)
            sys.exit(3)
        except (ValueError, NotImplementedError, OSError) as error:
            errors.print(f"error: {error}", markup=False, soft_wrap=True)
            sys.exit(1)

    app.run(wrapped, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    """The flags, with a misspelt or misfitting --config.FIELD named like any other bad input."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        Console(stderr=True).print(f"error: {error}\n(--help lists the options)", markup=False, soft_wrap=True)
        sys.exit(1)
