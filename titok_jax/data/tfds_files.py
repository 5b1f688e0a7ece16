"""Checks the files of a prepared TensorFlow Datasets set before TFDS reads them: it would run code that they name."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from titok_jax.runtime.messages import shown

_FILE = "features.json"
_LARGEST = 10_000_000  # bytes


def check_feature_classes(folder: str | os.PathLike) -> None:
    """Checks every `features.json` in the folder of a set, of one of its configurations or of one version.

    A features.json names the Python classes of the features. TFDS imports their modules, wherever they are.

    Raises:
      ValueError: a class that is not one of tensorflow_datasets, or a file that cannot be read.
    """
    folder = Path(folder)
    for path in (path for depth in ("", "*/", "*/*/") for path in sorted(folder.glob(depth + _FILE))):
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"{path} has {path.stat().st_size:,} bytes, expected at most {_LARGEST:,}")
        try:
            names = list(_class_names(path.read_text(encoding="utf-8")))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not valid JSON: {shown(error)}") from None
        for name in names:
            if not re.fullmatch(r"tensorflow_datasets(\.\w+)+", name):
                raise ValueError(
                    f"{path} names the feature class {shown(name)}, which is not one of tensorflow_datasets; code that "
                    "comes with a data set is not run"
                )


def _class_names(text: str) -> Iterator[str]:
    """The names of classes in the JSON of features, at any depth, in today's form and in the former one."""
    names = []

    def note(pairs: list[tuple[str, object]]) -> dict[str, object]:
        keys = dict(pairs)
        for key, value in pairs:  # all of them, also of equal keys
            if not isinstance(value, str):
                continue
            if key in ("pythonClassName", "python_class_name") or (key == "type" and "content" in keys):
                names.append(value)
            elif key in ("json", "content"):  # features as text
                try:
                    names.extend(_class_names(value))
                except ValueError:
                    continue  # TFDS cannot read it either
        return keys

    json.loads(text, object_pairs_hook=note)
    yield from names
