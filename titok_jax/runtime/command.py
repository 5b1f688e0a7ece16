"""What every command shares: errors as one line. Imports no JAX."""

import functools
import sys
from collections.abc import Callable, Sequence


def command(main: Callable[[Sequence[str] | None], int | None]) -> Callable[[Sequence[str] | None], int]:
    """Makes a command of `main(argv)`: what was asked for and cannot be (ValueError, OSError) and a training that diverged
    (FloatingPointError) end as the line `error: ...` on stderr and status 2, as argparse's own errors do; every other
    exception is a bug and keeps its traceback.

    Returns:
      main(argv=None) -> exit status, for `sys.exit(main())`: what `main` returns, 0 if nothing.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv) or 0
        except (ValueError, OSError, FloatingPointError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return run
