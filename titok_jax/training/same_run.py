"""Whether a training continues the run of its checkpoints: with the same configuration, data and frozen networks."""

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from titok_jax.data.contents import content_changes
from titok_jax.training.checkpoint import config_changes
from titok_jax.training.settings import Settings

# These fields may change when a run is resumed: they concern the hardware, and what the run logs and keeps. They affect only
# the rounding, and gradient_accumulation also affects the dropout draws. All other fields determine the result.
FREE_FIELDS = (
    "mesh",
    "compile_effort",
    "remat",
    "scan_layers",
    "gradient_accumulation",
    "log_every",
    "log_grad_norms",
    "checkpoint_every",
    "preview_every",
    "preview_images",
    "preview_columns",
    "eval_every",
    "eval_images",
    "keep_checkpoints",
    "max_nonfinite_steps",
    "watchdog_minutes",
    "recipe",
    "scale_with_batch",  # what it gives is compared
    "data.num_workers",
    "data.num_threads",
    "data.read_ahead_mib",
    "data.eval_source",
    "data.eval_transform",
    "model.sampling",  # of previews, and the default of the exported model
)

# Fields added to the recipes later, each with the value that was in effect before, given the configuration of such a run.
# Older checkpoints can then be resumed, with a flag for each field whose value today is another.
LATER_FIELDS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "token_precision": lambda then: "default",
    "discriminator_dtype": lambda then: then.get("compute_dtype"),  # a discriminator computed in the dtype of its model
    "optimizer.mu_dtype": lambda then: "float32",
    "discriminator_optimizer.mu_dtype": lambda then: "float32",
    "data.transform.random_crop": lambda then: True,
    "data.transform.random_flip": lambda then: True,
    "data.source.image_key": lambda then: "",
    "data.source.label_key": lambda then: "",
    "data.source.skip_damaged": lambda then: False,
}

# What a checkpoint stores beside the configuration; each is compared in its own way, except the former changes and the sums
# of metrics since the last log line.
FROZEN, CLASSES, CONTENTS, CHANGES, SUMS = "frozen_weights", "class_names", "data_contents", "changes", "metric_sums"
_BESIDE = (FROZEN, CLASSES, CONTENTS, CHANGES, SUMS)


def changes(found: Mapping[str, Any], now: Mapping[str, Any], settings: Settings) -> list[str]:
    """Lists what differs between the run of a checkpoint and this one, of what decides the result.

    Args:
      found: what the checkpoint stores: the configuration, and under the names above a hash of the frozen networks, the
        classes and the contents of the data (`source_contents`). Older checkpoints lack some of these.
      now: the same of this run.
      settings: those of this run, which name the frozen networks.
    """
    then, today = ({k: v for k, v in renamed(stored).items() if k not in _BESIDE} for stored in (found, now))
    later = {name: former(found) for name, former in LATER_FIELDS.items()}
    lines = config_changes(then, today, FREE_FIELDS, later=later)
    before, after = (list(stored.get(CLASSES, now.get(CLASSES, ()))) for stored in (found, now))
    if before != after:
        lines.append(
            f"classes of config.data.source: {class_list(before) or 'none'} in the checkpoint, "
            f"{class_list(after) or 'not named'} now; labels would mean other classes"
        )
    if CONTENTS in found:
        lines += [f"config.data.source: {line}" for line in content_changes(found[CONTENTS], now[CONTENTS])]
    if found.get(FROZEN) != now[FROZEN]:
        lines.append(
            f"the frozen weights of {frozen_fields(settings)}: SHA-256 {str(found.get(FROZEN))[:12]}... in the checkpoint, "
            f"{now[FROZEN][:12]}... now"
        )
    return lines


def frozen_fields(settings: Settings) -> str:
    """The fields that name the frozen networks, with their values: "config.vqgan (FOLDER) or ..."."""
    networks = {name: getattr(settings, name) for name in ("tokenizer", "vqgan", "perceptual_weights")}
    return " or ".join(f"config.{name} ({value})" for name, value in networks.items() if value)


def check_accepted(lines: Sequence[str], step: int, workdir: Any, *, accept: bool) -> None:
    """Raises ValueError if there are changes (`changes`) that were not accepted. Prints those that were."""
    if not lines:
        return
    listed = "".join(f"\n  {line}" for line in lines)
    if not accept:
        raise ValueError(
            f"the configuration or the data do not fit the checkpoint of step {step} in {workdir}:{listed}\n"
            "Use the former ones; or another workdir for a new run, which may start from weights (--config.init_from); or "
            "go on with these by --accept-changes."
        )
    if jax.process_index() == 0:
        print(f"Going on with changes after step {step}, accepted by --accept-changes:{listed}", flush=True)


def check_same_data(contents: Mapping[str, Any]) -> None:
    """Raises ValueError on all processes if they do not see the same data, as in `source_contents`."""
    if jax.process_count() == 1:
        return
    own = np.uint32(zlib.crc32(json.dumps(contents, sort_keys=True).encode()))
    seen = multihost_utils.process_allgather(own)
    others = np.flatnonzero(seen != seen[0]).tolist()
    if others:
        raise ValueError(
            f"config.data.source: process {others[0]} sees other files than process 0 (names, sizes, numbers of examples), "
            "but every host needs the same data"
        )


def renamed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration in which the augmentation `center_crop_flip` has the name and the fields that it has today."""
    transform = config.get("data", {}).get("transform") or {}
    if transform.get("name") != "center_crop_flip":
        return config
    others = {name: value for name, value in transform.items() if name not in ("name", "size")}
    sizes = dict.fromkeys(("resize_shorter_edge", "crop_size"), transform.get("size"))
    today = {"name": "random_resize_crop_flip", **sizes, "random_crop": False, "random_flip": True, **others}
    return {**config, "data": {**config["data"], "transform": today}}


def fingerprint(params: Any) -> str:
    """SHA-256 of a tree of arrays: its paths, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def class_list(names: Sequence[str], shown: int = 12) -> str:
    """ "0 cat, 1 dog, ..., 9 fish"."""
    items = [f"{number} {name}" for number, name in enumerate(names)]
    return ", ".join(items if len(items) <= shown else [*items[: shown - 1], "...", items[-1]])
