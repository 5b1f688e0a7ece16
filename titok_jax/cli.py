"""What the commands share: errors as one line, outputs that are refused early and written whole. Imports no JAX."""

import contextlib
import functools
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path


def command(main: Callable[[Sequence[str] | None], int | None]) -> Callable[[Sequence[str] | None], int]:
    """Makes a command of `main(argv)`: what was asked for and cannot be (ValueError, OSError) ends as the line
    `error: ...` on stderr and status 2, as argparse's own errors do; every other exception is a bug and keeps its traceback.

    Returns:
      main(argv=None) -> exit status, for `sys.exit(main())`: what `main` returns, 0 if nothing.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv) or 0
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return run


def check_output(path: str | os.PathLike, overwrite: bool, *, folder_of: str | None = None) -> Path:
    """Refuses an output that cannot or must not be written, before any work is done for it.

    Args:
      path: the file or folder to write.
      overwrite: allow that it exists. A folder is replaced as a whole, so it must then hold nothing else.
      folder_of: the output is a folder of files whose names match this regular expression.

    Returns:
      The path.

    Raises:
      FileExistsError: it exists and `overwrite` is not set, or it is a folder with other files in it.
      FileNotFoundError: the folder to write it in does not exist.
      PermissionError: that folder is not writable.
      ValueError: a folder where a file is wanted, or the other way round.
    """
    path = Path(path)
    parent = path.absolute().parent
    if not parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: {parent} is not an existing folder; create it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write {path}: no permission to write in {parent}")
    if not path.exists():
        return path
    if path.is_dir() != (folder_of is not None):
        raise ValueError(
            f"cannot write {path}: it is a {'folder, expected a file' if path.is_dir() else 'file, not a folder'}"
        )
    names = sorted(child.name for child in path.iterdir()) if folder_of is not None else [path.name]
    if names and not overwrite:
        raise FileExistsError(f"{path} exists and nothing was overwritten; choose another output or add --overwrite")
    foreign = [name for name in names if folder_of is not None and not re.fullmatch(folder_of, name)]
    if foreign:
        raise FileExistsError(
            f"{path} holds files of other origin ({foreign[0]}), so it is not replaced; choose another output"
        )
    return path


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place when the block ends well and is removed otherwise."""
    path = Path(path).absolute()
    # The suffix is kept: Pillow takes the format from it.
    partial = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A new empty folder beside `path` that takes its place, and that of what it held, when the block ends well."""
    path = Path(path).absolute()
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    try:
        yield partial
        partial.chmod(0o755)
        if path.exists():
            # Two renames: between them the old folder is whole under another name beside it.
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
            os.replace(path, old)
            os.replace(partial, path)
            shutil.rmtree(old)
        else:
            os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
