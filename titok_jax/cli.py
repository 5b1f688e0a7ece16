"""What the commands share: errors as one line, outputs that are refused early and written whole. Imports no JAX."""

import contextlib
import ctypes
import fcntl
import functools
import glob
import importlib.util
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from etils import epath

from titok_jax.storage import as_path, files_below, is_remote


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


def read_config(file: str, changes: Sequence[str]):
    """The ConfigDict, locked, of `--config FILE.py:VARIANT` with what the arguments `--config.FIELD=VALUE` change in it.

    Raises:
      ValueError: there is no such file or variant, or no such field; the value is of another type; another argument.
    """
    from absl import flags  # these two are slow to import, and only two commands need them
    from ml_collections.config_flags import config_flags, config_path

    path, *variant = file.split(":", 1)
    spec = importlib.util.spec_from_file_location("config", path) if os.path.isfile(path) else None
    if spec is None:
        found = "is not Python" if os.path.isfile(path) else "is a folder" if os.path.isdir(path) else "does not exist"
        raise ValueError(f"--config {file}: {path} {found}; expected FILE.py:VARIANT, such as configs/stage1.py:l32")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        config = module.get_config(*variant)
    except ValueError as error:
        raise ValueError(f"--config {file}: {error}") from error
    for change in changes:
        field = re.match(r"--?(?:no)?config\.([^=]*)", change)
        try:
            field and config_path.get_value(field[1], config)
        except (AttributeError, KeyError, IndexError, TypeError) as error:
            hint = re.search(r' Did you mean ".*?"', str(error.args[0]).replace("\n", " "))
            raise ValueError(f"{change}: {file} has no field {field[1]}.{hint[0] + '?' if hint else ''}") from None
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, lock_config=True, sys_argv=list(changes))
        _, *others = values(["", *changes])
    except flags.Error as error:
        raise ValueError(str(error).removeprefix("flag ")) from error
    if others:
        raise ValueError(f"unknown argument {others[0]}")
    return config


def check_output(path: str | os.PathLike, overwrite: bool, *, folder_of: str | None = None) -> Path | epath.Path:
    """Refuses an output that cannot or must not be written, before any work is done for it.

    Args:
      path: the file or folder to write, also in a bucket.
      overwrite: allow that it exists. A folder is replaced as a whole, so it must then hold nothing else.
      folder_of: the output is a folder of files whose names match this regular expression.

    Returns:
      The path.

    Raises:
      FileExistsError: it exists and `overwrite` is not set, or it is a folder with other files in it.
      FileNotFoundError: the folder to write it in does not exist.
      PermissionError: that folder, or the bucket, is not writable.
      ValueError: a folder where a file is wanted, or the other way round; what cannot be replaced, such as a device, a mount
        point or the current folder; a name too long.
    """
    path = as_path(path)
    if is_remote(path):
        _try_bucket(path)
    else:
        _check_place(path)
    if not path.exists():
        return path
    if not is_remote(path) and folder_of is not None and path.is_dir() and Path.cwd().is_relative_to(path.resolve()):
        raise ValueError(f"cannot write {path}: it is the current folder or holds it; name a folder in it")
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


def _check_place(path: Path) -> None:
    """The checks of `check_output` that are those of a file system."""
    real = Path(os.path.realpath(path))  # what is written: a link stays a link
    parent = real.parent
    if not parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: {parent} is not an existing folder; create it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write {path}: no permission to write in {parent}")
    longest = os.pathconf(parent, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    if len(os.fsencode(real.name)) > longest:
        raise ValueError(f"cannot write {path}: its name has {len(os.fsencode(real.name))} bytes, at most {longest} can be")
    if path.exists() and (os.path.ismount(real) or not (real.is_dir() or real.is_file())):
        raise ValueError(f"cannot write {path}: it is a device or a mount point, which cannot be replaced; choose another")


def _try_bucket(path: epath.Path) -> None:
    """Writes an object beside `path` and removes it: there is no other way to know that it can be done."""
    trial = _partial(path)
    try:
        trial.write_bytes(b"")
        trial.unlink()
    except Exception as error:  # each storage has its own
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise PermissionError(
            f"cannot write {path}: {lines[0]}; does the bucket exist, with permission to write in it?"
        ) from error


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place when the block ends well and is removed otherwise. Of a link, it
    is the file that the link leads to. For a bucket it is a file of this machine, copied to its place at the end."""
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="titok_jax-") as folder:
            local = Path(folder) / os.path.basename(path)
            yield local
            _upload(local, as_path(path))
        return
    path = Path(os.path.realpath(path))
    partial = _partial(path)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _partial(path: Path | epath.Path) -> Path | epath.Path:
    # The suffix is kept: Pillow takes the format from it.
    return path.with_name(f".{_short(path.stem)}.partial-{os.getpid()}{path.suffix}")


def _upload(local: Path, path: epath.Path) -> None:
    """Copies a file to a bucket. By way of another name: an interrupted writer closes what it has written so far, at which
    that appears."""
    partial = _partial(path)
    try:
        epath.Path(local).copy(partial, overwrite=True)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(Exception):
            partial.unlink()
        raise


@contextlib.contextmanager
def new_folder(path: str | os.PathLike, *, last: str | None = None) -> Iterator[Path]:
    """A new empty folder beside `path` that takes its place, and that of what it held, when the block ends well. Of a link,
    it is the folder that the link leads to.

    For a bucket, where a folder cannot be replaced at one stroke, it is a folder of this machine whose files are copied at
    the end: `last`, by default the last by name, is removed before the others change and written after them, so that a
    folder which holds it is whole.

    Killed at any time, it leaves the old folder or the new one under this name. (Where the file system cannot exchange two
    names, the old one may be found beside it as `.NAME.old-...`.) What else it leaves, the next one for this path removes.

    Raises:
      FileExistsError: there was nothing under this name because a writer was killed; the old folder has been put back.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="titok_jax-") as folder:
            yield Path(folder)
            _upload_folder(Path(folder), as_path(path), last)
        return
    path = Path(os.path.realpath(path))
    name = f".{_short(path.name)}"
    with contextlib.ExitStack() as stack:
        with file_lock(path.parent) as locked:
            existed = path.exists()
            if locked:
                _clean(path, name)
            if path.exists() and not existed:
                raise FileExistsError(f"{path} is back, which a killed process had moved aside; try again to replace it")
            partial = Path(tempfile.mkdtemp(prefix=f"{name}.partial-", dir=path.parent))
            stack.callback(shutil.rmtree, partial, ignore_errors=True)  # if it holds the old one too
            stack.enter_context(file_lock(partial))  # says that it is in use
        yield partial
        partial.chmod(0o755)
        if not path.exists():
            os.replace(partial, path)
        elif not _exchange(partial, path):
            with file_lock(path.parent):
                old = Path(tempfile.mkdtemp(prefix=f"{name}.old-", dir=path.parent))
                os.replace(path, old)
                os.replace(partial, path)
            shutil.rmtree(old)


def _upload_folder(local: Path, folder: epath.Path, last: str | None) -> None:
    new = {"/".join(names) for names in files_below(local)}
    old = {"/".join(names) for names in files_below(folder)} if folder.exists() else set()
    last = last or max(new)
    if last in old:
        (folder / last).unlink()
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda name: epath.Path(local / name).copy(folder / name, overwrite=True), new - {last}))
        list(threads.map(lambda name: (folder / name).unlink(), old - new - {last}))
    _upload(local / last, folder / last)


def _short(name: str) -> str:
    """A name, or one made of it that leaves room for additions in the 255 bytes that a name can have."""
    data = os.fsencode(name)
    return name if len(data) <= 100 else f"{data[:80].decode(errors='ignore')}-{zlib.crc32(data):08x}"


def _clean(path: Path, name: str) -> None:
    """Removes what killed writers of `path` left; what was there before comes back if nothing has taken its place."""
    for old in path.parent.glob(f"{glob.escape(name)}.old-*"):
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif any(old.iterdir()):
            os.replace(old, path)
    for partial in path.parent.glob(f"{glob.escape(name)}.partial-*"):
        if partial.is_dir():
            with file_lock(partial, wait=False) as unused:
                if unused:
                    shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def file_lock(path: str | os.PathLike, *, wait: bool = True, go_on: bool = False) -> Iterator[bool]:
    """Holds a lock on a folder, or on a file that is made for it, which ends with the process at the latest.

    Gives whether it does. Without `wait` another process may have it. Where a file system has no locks, as that of some
    clusters, it does not, or with `go_on` it says so and goes on as if it did.
    """
    folder = os.path.isdir(path)
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except BlockingIOError:
            held = False
        except OSError as error:
            held = go_on
            if go_on:
                place = path if folder else os.path.dirname(path)
                print(f"warning: {place} cannot be locked ({error}): nothing stops a second run there", flush=True)
        yield held
    finally:
        os.close(descriptor)


def _exchange(one: Path, two: Path) -> bool:
    """Exchanges the names of two folders at one stroke; False if the system or the file system cannot (not Linux, NFS)."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if renameat2 is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE: in no module of Python's
    return renameat2(here, os.fsencode(one), here, os.fsencode(two), exchange) == 0
