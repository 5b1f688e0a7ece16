"""Recipes: configuration files, `FILE.py:VARIANT`, and what the command line changes in them. Imports no JAX."""

import importlib.util
import os
import re
from collections.abc import Sequence


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
