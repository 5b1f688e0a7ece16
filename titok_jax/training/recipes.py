"""Reads recipes and applies changes from the command line. Imports no JAX.

A recipe is a configuration file `FILE.py:VARIANT`, or the name of one that comes with the package.
"""

import contextlib
import importlib.util
import os
import re
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path

from titok_jax.runtime.messages import near, near_path, printable
from titok_jax.training.batch_scaling import scale_with_batch


def recipe_folder() -> Path:
    """The folder of the package's recipes: beside the package in a clone, inside it in an installation."""
    package = Path(__file__).parents[1]
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def recipe_names() -> list[str]:
    """The names of the package's recipes, for `--config NAME:VARIANT`."""
    return sorted(path.stem for path in recipe_folder().glob("*.py") if path.stem not in ("__init__", "common"))


def _find(file: str) -> tuple[Path, list[str]]:
    """Splits the value of `--config` into (file, [variant], empty if none is given).

    Raises:
      ValueError: if there is no such file or recipe.
    """
    path, *variant = file.split(":", 1)
    if os.path.isfile(path) and path.endswith(".py"):
        return Path(path), variant
    if path in recipe_names():
        return recipe_folder() / f"{path}.py", variant
    found = "is not Python" if os.path.isfile(path) else "is a folder" if os.path.isdir(path) else "does not exist"
    raise ValueError(
        f"--config {file}: {path} {found}; expected FILE.py:VARIANT, or one that comes with the package: "
        + ", ".join(f"{name}:VARIANT" for name in recipe_names())
        + (near(path, recipe_names()) or near_path(path) if found == "does not exist" else "")
    )


@contextlib.contextmanager
def _shared_recipes(folder: Path) -> Iterator[None]:
    """Makes `from configs import common` import `common.py` from `folder`, or the package's own if `folder` has none. Other
    modules named configs do not interfere."""
    mine = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "configs"}
    package = types.ModuleType("configs")
    package.__path__ = [str(folder if (folder / "common.py").is_file() else recipe_folder())]
    sys.modules["configs"] = package
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
            del sys.modules[name]
        sys.modules.update(mine)


def _meant(field: str, config) -> str:
    """The end of the message for a field that a recipe lacks: the fields of that name in its sections, else the nearest."""

    def fields(section, prefix: str = "") -> Iterator[str]:
        for name, value in section.items():
            yield prefix + name
            if hasattr(value, "items"):
                yield from fields(value, f"{prefix}{name}.")

    known = [name for name in fields(config) if not name.startswith("recipe")]  # which is what the others are compared with
    last = field.rpartition(".")[2]
    same = [f"--config.{name}" for name in known if name.rpartition(".")[2] == last]
    if same:
        return f"; did you mean {' or '.join(same[:3])}?"
    return near(field, known, before="--config.")


def read_config(file: str, changes: Sequence[str]):
    """Reads a recipe and changes it; with `scale_with_batch`, also what depends on the batch size.

    Args:
      file: `FILE.py:VARIANT`, or `NAME:VARIANT` for a recipe of the package, e.g. "stage1:l32".
      changes: arguments `--config.FIELD=VALUE`.

    Returns:
      The recipe as a locked ConfigDict.

    Raises:
      ValueError: for an unknown file, variant, field or argument, or a value of the wrong type.
    """
    from absl import flags  # these two imports are slow, and only two commands need them
    from ml_collections.config_flags import config_flags, config_path

    path, variant = _find(file)
    spec = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    with _shared_recipes(path.resolve().parent):
        spec.loader.exec_module(module)
        try:
            config = module.get_config(*variant)
        except ValueError as error:
            raise ValueError(f"--config {file}: {error}") from error
    given = set()
    for change in changes:
        field = re.match(r"--?(?:no)?config\.([^=]*)", change)
        try:
            field and config_path.get_value(field[1], config)
        except (AttributeError, KeyError, IndexError, TypeError):
            raise ValueError(f"{change}: {file} has no field {field[1]}{_meant(field[1], config)}") from None
        given |= {field[1]} if field else set()
        other = re.match(r"--([a-z][^=]*)", change)
        if other and not field:
            name = other[1].removeprefix("config.")
            raise ValueError(f"unknown argument {change}: expected --config.FIELD=VALUE{_meant(name, config)}")
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, lock_config=True, sys_argv=list(changes))
        _, *others = values(["", *changes])
    except flags.Error as error:
        raise ValueError(printable(str(error).removeprefix("flag "))) from error
    if others:
        raise ValueError(f"unknown argument {others[0]}")
    scale_with_batch(config, given)
    return config
