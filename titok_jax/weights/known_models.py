"""The known models. A weights file without a configuration is recognised by comparison with them."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from titok_jax import models
from titok_jax.models import DiscriminatorConfig, InceptionConfig, TiTokConfig
from titok_jax.runtime.messages import shown
from titok_jax.weights import convert, kinds, published_models
from titok_jax.weights.config_files import CONFIG_FILE, TRAINER_FILE, WEIGHTS_FILE
from titok_jax.weights.convert import WeightsError


@functools.lru_cache(maxsize=64)
def published_shapes(config: models.Config) -> dict[str, tuple[int, ...]]:
    """Returns {published name: shape} for a model's parameters."""
    return convert.published_shapes(convert.table_for(config), models.abstract(config)[1])


def known_configs(kind: type | None = None) -> dict[tuple[str, str], models.Config]:
    """The configurations of the published models, including stage-1 tokenizers, as {(kind, name): configuration}."""
    configs: dict[tuple[str, str], models.Config] = {}
    for model in published_models.MODELS:
        if model.architecture is None:
            continue
        config = models.family_named(model.kind).config.from_published(model.published_config)
        configs[model.kind, model.name] = config
        if isinstance(config, TiTokConfig) and config.is_legacy:
            configs[model.kind, f"{model.name}, stage 1"] = dataclasses.replace(config, finetune_decoder=False)
    configs["discriminator", "discriminator"] = DiscriminatorConfig()
    configs["inception", "inception-2015-12-05"] = InceptionConfig()
    return {key: config for key, config in configs.items() if kind is None or isinstance(config, kind)}


def match(tensors: Mapping[str, Any], kind: type | None, *, source: str) -> models.Config:
    """Finds the known model whose tensors have exactly these names and shapes.

    Raises:
      WeightsError: the tensors are of another kind of model or of none that is known, which the message says. Or no known
        model of this kind matches, and the message says how many tensors of the closest ones differ.
    """
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    family = kinds.family_of_tensors(found)
    if family is None:
        names = ", ".join(map(shown, list(found)[:3]))
        raise WeightsError(
            f"{source}: its {len(found)} tensors ({names}, ...) are of no kind of model that is known here; "
            f"{kinds.belongs(kind)}. A family of your own needs its {CONFIG_FILE} beside it"
        )
    if kind is not None:
        kinds.check_tensors(found, kind, source)
    known, differences = known_configs(family.config), {}
    if not known:
        raise WeightsError(
            f"{source} holds the weights of {family.title}, of another size than is read; {kinds.belongs(kind)}"
        )
    for (kind_name, name), config in known.items():
        expected, optional = published_shapes(config), models.family_of(config).buffers(config)
        given = {n: shape for n, shape in found.items() if n not in optional}
        if given == expected:
            return config
        differing = [n for n in given.keys() | expected.keys() if given.get(n) != expected.get(n)]
        differences[f"{kind_name} {name}"] = len(differing), min(differing)
    closest = sorted(differences.items(), key=lambda item: item[1])[:5]
    raise WeightsError(
        f"{source} holds the weights of {family.title}, but of no known size, and there is no configuration beside it. "
        f"Put one beside it: named {CONFIG_FILE} for a {WEIGHTS_FILE} or {TRAINER_FILE}, else like the file with the ending "
        ".json. The closest known models are:"
        + "".join(f"\n  {name}: {count} tensors differ, the first is {shown(first)}" for name, (count, first) in closest)
    )
