"""Error handling that all commands share: an error is printed as one line. Imports no JAX."""

import functools
import sys
from collections.abc import Callable, Sequence


def command(main: Callable[[Sequence[str] | None], int | None]) -> Callable[[Sequence[str] | None], int]:
    """Decorator that turns `main(argv)` into a command.

    An impossible request (ValueError, OSError) or a diverged training (FloatingPointError) prints `error: ...` on stderr and
    gives status 2, as argparse's own errors do. Every other exception is a bug and keeps its traceback.

    Returns:
      main(argv=None) -> exit status, for `sys.exit(main())`: the value that `main` returns, or 0 if it returns None.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv) or 0
        except (ValueError, OSError, FloatingPointError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return run
