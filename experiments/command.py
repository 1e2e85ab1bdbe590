"""What every command line shares: clear errors instead of tracebacks, and exit codes that scripts can rely on."""

import logging
import sys
from collections.abc import Callable

from rich.console import Console

from ultra_hstu.train import Interrupted


def run_command(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """Exit codes: 0 done, or stopped by a signal with its state saved; 1 bad input or disk; 3 a loss that is not finite."""

    def wrapped(argv: list[str]) -> None:
        errors = Console(stderr=True)
        logging.getLogger().setLevel(logging.WARNING)
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every file that it touches
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

    return wrapped
