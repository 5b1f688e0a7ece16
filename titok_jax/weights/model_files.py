"""Finds the files of a model: by name, in a folder, in a bucket, on the Hugging Face hub."""

import logging
import os
from pathlib import Path
from typing import NamedTuple

from etils import epath

from titok_jax import models
from titok_jax.models import GeneratorConfig, TiTokConfig
from titok_jax.runtime.outputs import moved_aside
from titok_jax.runtime.paths import HUB_PREFIX, as_path, is_remote, local_copy
from titok_jax.weights import published_models
from titok_jax.weights.config_files import CONFIG_FILE, TOKENIZER_FOLDER, TRAINER_FILE, WEIGHTS_FILE, model_section
from titok_jax.weights.hub import DownloadError, Repository, check_download

TRAINER_MODELS = ("ema_model", "unwrapped_model")  # in a checkpoint folder of the published trainer, the best first


class Source(NamedTuple):
    """The files of a model.

    Attributes:
      weights: a file in a format that `titok_jax.weights` reads; None if only the configuration was requested.
      config: a configuration file in the format of `config.json`; None if there is none, so that the model must be a known
        one and is recognised by its tensors.
    """

    weights: Path | None
    config: Path | None


def locate(
    source: str | os.PathLike,
    kind: type | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    config_only: bool = False,
) -> Source:
    """Finds a model's files. Downloads them if they are on the hub and not in its cache.

    All files from the hub are of one commit.

    Args:
      source: a name in `titok_jax.zoo`, "hf://owner/name", "hf://owner/name@revision", "hf://owner/name/FILE", a model
        folder, a checkpoint folder of the published trainer (its averaged weights), or a weights file. Files in a bucket are
        copied once per process. A `Path` is always a path.
      kind: configuration class of the wanted model. With TiTokConfig, a generator's folder or repository gives the tokenizer
        inside it.
      revision: branch, tag or commit of a model on the hub.
      token: access token for the hub (default: the one set by `hf auth login` or HF_TOKEN).
      config_only: download no weights.

    Raises:
      ValueError: an unknown name, a revision for a model that is not on the hub, two different revisions, or a text that
        cannot be a revision.
      FileNotFoundError: a folder that holds no model, or a generator's repository that holds no tokenizer.
      DownloadError: the hub does not provide the files, and they are not in its cache.
      WeightsError: the configuration in the cache is damaged.
    """
    if is_remote(source):
        source = _local_model(as_path(source))
    found = published_models.find(source, _kind_name(kind)) if isinstance(source, str) else Path(source)
    if _on_hub(found):
        return _locate_on_hub(found, kind, str(source), revision, token, config_only)[0]
    if revision is not None:
        raise ValueError(f"revision {revision!r} given, but {source} is not on the hub")
    path = found.folder if isinstance(found, published_models.Model) else found
    if path.is_file():
        beside = path.with_name(CONFIG_FILE) if path.name in (WEIGHTS_FILE, TRAINER_FILE) else path.with_suffix(".json")
        return Source(path, beside if beside.is_file() else None)
    if not path.is_dir():
        kept = moved_aside(path.absolute()) if path.name else None
        hint = f"; a save was killed; what was there before is {kept}" if kept else ""
        raise FileNotFoundError(f"{path} is not a folder or file{hint}")
    if kind is TiTokConfig and (path / TOKENIZER_FOLDER).is_dir():
        path = path / TOKENIZER_FOLDER
    path = _in_checkpoint(path)
    config = path / CONFIG_FILE
    files = [path / name for name in (WEIGHTS_FILE, TRAINER_FILE) if (path / name).is_file()]
    if not files and not config.is_file():
        raise FileNotFoundError(f"{path} is not a model folder: it holds no {CONFIG_FILE} or {TRAINER_FILE}")
    if not files and not config_only:
        raise FileNotFoundError(f"{path} holds no {WEIGHTS_FILE} or {TRAINER_FILE}")
    return Source(files[0] if files else None, config if config.is_file() else None)


def _in_checkpoint(path: Path) -> Path:
    """The model in a checkpoint folder of the published trainer, the averaged one if it is there; the folder itself if it is
    not one. Says what it takes, since the folder holds other weights too."""
    names = [name for name in TRAINER_MODELS if any((path / name / f).is_file() for f in (WEIGHTS_FILE, TRAINER_FILE))]
    if not names:
        return path
    others = f"; for the weights without averaging name {path / names[1]}" if len(names) > 1 else ""
    logging.getLogger(__name__).warning("%s is a checkpoint of the published trainer: taking %s%s", path, names[0], others)
    return path / names[0]


def _kind_name(kind: type | None) -> str | None:
    """The kind under which a class of configurations has names; None for others, whose models have no names."""
    name = None if kind is None else models.family_for(kind).name
    return name if name in published_models.KINDS else None


def _on_hub(found: published_models.Model | os.PathLike | str) -> bool:
    """Whether what `published_models.find` returned is on the hub."""
    return found.folder is None if isinstance(found, published_models.Model) else isinstance(found, str)


def _locate_on_hub(
    found: published_models.Model | str,
    kind: type | None,
    source: str,
    revision: str | None,
    token: str | None,
    config_only: bool,
) -> tuple[Source, str | None]:
    """The part of `locate` that reads from the hub: the files, all of one commit, and that commit.

    The configuration comes first. It says whether the repository holds a generator, with its tokenizer in a sub-folder.
    """
    known = isinstance(found, published_models.Model)
    name, _, named = (found.repository if known else found).partition("@")
    owner, name, *file = name.split("/", 2)
    name, file = f"{owner}/{name}", "".join(file)
    if revision is not None:
        published_models.check_revision(revision)
        if named and revision != named:
            raise ValueError(f"revision {revision!r} given, but {source} names another")
    repository = Repository(name, named or revision, token)
    file = found.file if known else file
    if file not in ("", WEIGHTS_FILE):
        return Source(repository.download(file), None), repository.revision
    folder, config = "", repository.download(CONFIG_FILE)
    check_download(config)
    if kind is TiTokConfig and not known and "generator" in model_section(config):
        folder = f"{TOKENIZER_FOLDER}/"
        try:
            config = repository.download(folder + CONFIG_FILE)
        except DownloadError as error:
            if not error.not_held:
                raise
            raise FileNotFoundError(
                f"{source} holds no sub-folder {TOKENIZER_FOLDER}: name the tokenizer of this generator"
            ) from None
        check_download(config)
    weights = None if config_only else repository.download(folder + WEIGHTS_FILE)
    return Source(weights, config), repository.revision


def pin(
    source: str | os.PathLike, kind: type, *, revision: str | None = None, token: str | None = None
) -> tuple[str | os.PathLike, str | None]:
    """Fixes the commit of a model on the hub, so that several calls read the files of one commit.

    Args:
      As in `locate`. Downloads the configuration.

    Returns:
      (source, revision) with the commit in place of a branch, of a tag or of no revision. The arguments if the model is not
      on the hub. Errors as in `locate`.
    """
    if (
        is_remote(source)
        or not isinstance(source, str)
        or not _on_hub(found := published_models.find(source, _kind_name(kind)))
    ):
        return source, revision
    _, commit = _locate_on_hub(found, kind, str(source), revision, token, config_only=True)
    if isinstance(found, published_models.Model):
        return source, commit
    return HUB_PREFIX + found.partition("@")[0] + (f"@{commit}" if commit else ""), None


def pin_pair(
    source: str | os.PathLike,
    tokenizer: str | os.PathLike | None = None,
    *,
    revision: str | None = None,
    tokenizer_revision: str | None = None,
    token: str | None = None,
) -> tuple[tuple[str | os.PathLike, str | os.PathLike | None], dict[str, str | None]]:
    """`pin` for a generator and its tokenizer.

    Returns:
      (source, tokenizer) and the two revisions by name. If a generator's repository brings the tokenizer, that is named too.

    Raises:
      ValueError: as `locate`, and for another revision of a tokenizer that is in its generator's repository.
      DownloadError, WeightsError: as `locate`.
    """
    named = tokenizer_revision in (None, revision)
    source, revision = pin(source, GeneratorConfig, revision=revision, token=token)
    if tokenizer is None and isinstance(source, str) and source.startswith(HUB_PREFIX):
        if not named:
            raise ValueError(
                f"tokenizer revision {tokenizer_revision!r} given, but the tokenizer is in the repository of its generator"
            )
        tokenizer, tokenizer_revision = source, None
    elif tokenizer is not None:
        tokenizer, tokenizer_revision = pin(tokenizer, TiTokConfig, revision=tokenizer_revision, token=token)
    elif source in published_models.names("tokenizer"):
        _, tokenizer_revision = pin(source, TiTokConfig, revision=tokenizer_revision, token=token)
    return (source, tokenizer), {"revision": revision, "tokenizer_revision": tokenizer_revision}


def _local_model(source: epath.Path) -> Path:
    """Copies the files that `locate` may read from a model folder or weights file in a bucket. Returns the local path."""
    if source.is_file():
        beside = {source.with_name(CONFIG_FILE), source.with_suffix(".json")}
        for path in beside:
            if path.is_file():
                local_copy(path)
        return local_copy(source)
    if not (source / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{source} is no model folder: it has no {CONFIG_FILE}")
    for path in (source / TOKENIZER_FOLDER / WEIGHTS_FILE, source / TOKENIZER_FOLDER / CONFIG_FILE, source / WEIGHTS_FILE):
        if path.is_file():
            local_copy(path)
    return local_copy(source / CONFIG_FILE).parent
