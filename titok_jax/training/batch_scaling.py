"""What else changes with the batch size: `config.scale_with_batch`. Imports no JAX.

With `k` times the recipe's batch, a run sees the same number of examples and keeps its averages over the same number:

- Numbers of steps are divided by `k`: the length of the run, warm-up, the start of the discriminator.
- Learning rates are multiplied by the square root of `k`, the rule for Adam: Malladi et al. 2022, "On the SDEs and Scaling
  Rules for Adaptive Gradient Algorithms", arXiv 2205.10287. (`k` itself is the rule for SGD.) That rule also moves the betas
  and epsilon of Adam. They stay as they are here: from `k` = 10 on, there would be no beta1 for the recipes' 0.9.
- A decay `d` per step becomes `d ** k`: Busbridge et al. 2023, "How to Scale Your EMA", arXiv 2307.13813.

Weight decay stays too. So do the intervals of logs, checkpoints, evaluations and previews, which are about time.
"""

import math
from collections.abc import Callable, Collection
from typing import Any


def _steps(value: int, k: float) -> int:
    return max(1, round(value / k)) if value else 0


def _digits(value: float) -> float:
    """Nine digits, so that the value is the same on every machine, and a resumed run finds it unchanged."""
    return float(f"{value:.9g}")


def _rate(value: float, k: float) -> float:
    return _digits(value * math.sqrt(k))


def _decay(value: float, k: float) -> float:
    return _digits(value**k)


_RULES: dict[str, Callable] = {
    "num_steps": _steps,
    **dict.fromkeys(("optimizer.learning_rate", "optimizer.end_learning_rate"), _rate),
    "optimizer.warmup_steps": _steps,
    **dict.fromkeys(("discriminator_optimizer.learning_rate", "discriminator_optimizer.end_learning_rate"), _rate),
    "discriminator_optimizer.warmup_steps": _steps,
    "loss.discriminator_start": _steps,
    "ema_decay": _decay,
    "loss.lecam_decay": _decay,
}


def scale_with_batch(config: Any, given: Collection[str] = ()) -> None:
    """Changes the values of a recipe, a ConfigDict, to those for its batch size, if `config.scale_with_batch` is set.

    The batch size that the recipe's values are for is `config.recipe.data.batch_size`. It becomes the new one, and the other
    values in `config.recipe` are scaled too. So nothing is scaled twice, and values that fit each other give no warning.
    `config.recipe.scaled` then says what was done, as lines to print.

    Args:
      given: dotted names of fields that were set on the command line. They stay.

    Raises:
      ValueError: the recipe does not say which batch size its values are for.
    """
    if not config.get("scale_with_batch"):
        return
    try:
        former = config.recipe.data.batch_size
    except AttributeError:
        raise ValueError(
            "config.scale_with_batch is set, but the recipe does not say which batch size its values are for: it has no "
            "recipe.data.batch_size"
        ) from None
    batch = config.data.batch_size
    if batch == former or batch < 1:  # the latter is an error of the settings
        return
    lines = [f"Scaled from a batch of {former} to {batch} (config.scale_with_batch):"]
    with config.unlocked():
        config.recipe.data.batch_size = batch
        for name, rule in _RULES.items():
            value = _get(config, name)
            if value is None:
                continue
            if (published := _get(config.recipe, name)) is not None:
                _set(config.recipe, name, rule(published, batch / former))
            if name in given:
                lines.append(f"  {name} {value} stays, as given")
            elif (scaled := rule(value, batch / former)) != value:
                _set(config, name, scaled)
                lines.append(f"  {name} {value} -> {scaled}")
        config.recipe.scaled = tuple(lines)


def _get(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = config.get(part) if hasattr(config, "get") else None
    return config


def _set(config: Any, name: str, value: float) -> None:
    *sections, last = name.split(".")
    for part in sections:
        config = config[part]
    config[last] = value
