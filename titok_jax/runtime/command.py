"""Error handling that all commands share: an error is printed as one line. Imports no JAX."""

import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence

from titok_jax.runtime.messages import printable

# The names to import of the packages of the extra "train" in pyproject.toml.
TRAIN_EXTRA = (
    *("absl", "array_record", "clu", "grain", "matplotlib", "ml_collections", "optax", "orbax", "scipy"),
    *("pyarrow", "tensorboardX", "tensorflow_datasets"),
)


def require(*names: str) -> None:
    """Raises ModuleNotFoundError if one of these packages is not installed, so that it is known before any work is done."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def command(main: Callable[[Sequence[str] | None], int | None]) -> Callable[[Sequence[str] | None], int]:
    """Decorator that turns `main(argv)` into a command.

    An impossible request (ValueError, OSError) or a diverged training (FloatingPointError) prints `error: ...` on stderr and
    gives status 2, as argparse's own errors do. So does a missing package of the extra "train", if `main` imports it and not
    the module. So does a lack of memory. Every other exception is a bug and keeps its traceback.

    Returns:
      main(argv=None) -> exit status, for `sys.exit(main())`: the value that `main` returns, or 0 if it returns None.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv) or 0
        except (ValueError, OSError, FloatingPointError) as error:
            print(f"error: {printable(str(error))}", file=sys.stderr)
            return 2
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):  # as JAX says it
                raise
            reason = next(iter(str(error).splitlines()), "")
            print(f"error: not enough memory, a smaller batch or model needs less: {reason}", file=sys.stderr)
            return 2
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in TRAIN_EXTRA:
                raise
            print(f'error: this needs {package}; pip install "titok_jax[train]"', file=sys.stderr)
            return 2

    return run
