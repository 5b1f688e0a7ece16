"""Finds the files of a model: by name, in a folder, in a bucket, on the Hugging Face hub."""

import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from etils import epath

from titok_jax import models
from titok_jax.models import GeneratorConfig, TiTokConfig
from titok_jax.runtime.messages import first_lines, near_path, say_once, shown
from titok_jax.runtime.outputs import moved_aside
from titok_jax.runtime.paths import HUB_PREFIX, as_path, is_remote, local_copy
from titok_jax.weights import kinds, published_models, tensor_files
from titok_jax.weights.config_files import (
    CONFIG_FILE,
    INDEX,
    TOKENIZER_FOLDER,
    TRAINER_FILE,
    WEIGHTS_FILE,
    WEIGHTS_FILES,
    YAML,
    model_section,
    read_config,
)
from titok_jax.weights.convert import WeightsError
from titok_jax.weights.hub import DownloadError, Repository, check_download

TRAINER_MODELS = ("ema_model", "unwrapped_model")  # in a checkpoint folder of the published trainer, the best first
EXPORT_FOLDER = "pretrained"  # in the workdir of a training
_TRAINER_STATES = ("optimizer.bin", "scheduler.bin", "random_states_0.pkl")  # there too


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
        _say_average(path)
        return _named_file(path)
    if not path.is_dir():
        kept = moved_aside(path.absolute()) if path.name else None
        hint = f"; a save was killed; what was there before is {kept}" if kept else near_path(path)
        raise FileNotFoundError(f"{path} is not a folder or file{hint}")
    if kind is TiTokConfig and (path / TOKENIZER_FOLDER).is_dir():
        path = path / TOKENIZER_FOLDER
    path = _in_checkpoint(path)
    _say_average(path)
    config = path / CONFIG_FILE
    files = _weights_in(path)
    if not files and not config.is_file():
        what = _describe_folder(path)
        raise FileNotFoundError(f"{path} is not a model folder: it holds no {CONFIG_FILE} and no {WEIGHTS_FILE}{what}")
    if not files and not config_only:
        raise FileNotFoundError(f"{path} holds no {WEIGHTS_FILE} or {TRAINER_FILE}")
    return Source(files[0] if files else None, config if config.is_file() else None)


def _named_file(path: Path) -> Source:
    """A file of weights with its configuration, if that is beside it."""
    if path.suffix in (".json", *YAML) and not tensor_files.is_index(path):
        raise WeightsError(f"{path} is a configuration; name its folder, or the file of weights")
    part = re.fullmatch(r"(.+)-\d{5}-of-\d{5}(\.\w+)", path.name)
    index = path.with_name("".join(part.groups()) + INDEX) if part else None
    if index is not None and index.is_file():
        raise WeightsError(f"{path} is one of several files of a model; name {index}, or the folder")
    if path.name in WEIGHTS_FILES:
        beside = path.with_name(CONFIG_FILE)
    else:
        beside = path.with_name(path.name.removesuffix(INDEX)).with_suffix(".json")
    return Source(path, beside if beside.is_file() else None)


def _weights_in(folder: Path | epath.Path) -> list[Path | epath.Path]:
    """The files of weights that a folder holds, the one to take first."""
    return [folder / name for name in WEIGHTS_FILES if (folder / name).is_file()]


def _in_checkpoint(path: Path) -> Path:
    """The model in a checkpoint folder of the published trainer, the averaged one if it is there; the folder itself if it is
    not one. Says what it takes, since the folder holds other weights too."""
    names = [name for name in TRAINER_MODELS if _weights_in(path / name)]
    if not names:
        return path
    others = f"; for the weights without averaging name {path / names[1]}" if len(names) > 1 else ""
    say_once(f"{path} is a checkpoint of the published trainer: taking {names[0]}{others}")
    return path / names[0]


def _say_average(path: Path) -> None:
    """Says where the averaged weights are, for a folder or file in a checkpoint of the published trainer with other ones."""
    for place in (path.parent, path.parent.parent):
        average = place / TRAINER_MODELS[0]
        if _weights_in(average) and average not in (path, path.parent):
            say_once(f"{path}: weights without averaging; the averaged ones of this checkpoint are in {average}")


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
    if file not in ("", WEIGHTS_FILE, WEIGHTS_FILE + INDEX):
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
    if config_only:
        return Source(None, config), repository.revision
    if kind is not None:
        kinds.check_config(read_config(config), kind, source)  # before the download
    return Source(_download_weights(repository, folder), config), repository.revision


def _download_weights(repository: Repository, folder: str) -> Path:
    """Downloads the weights of a repository, in one file or in several with their index."""
    try:
        return repository.download(folder + WEIGHTS_FILE)
    except DownloadError as error:
        if not error.not_held:
            raise
        try:
            index = repository.download(folder + WEIGHTS_FILE + INDEX)
        except DownloadError:
            raise error from None
    check_download(index)
    for name in tensor_files.part_names(index):
        repository.download(folder + name)
    return index


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
        return _copy_weights(source)
    copied = []
    for name in ("", TOKENIZER_FOLDER, *TRAINER_MODELS):
        folder = source / name if name else source
        files = [_copy_weights(path) for path in _weights_in(folder)[:1]]
        files += [local_copy(path) for path in (folder / CONFIG_FILE,) if path.is_file()]
        copied += [path.parent.parent if name else path.parent for path in files]
    if not copied:
        raise FileNotFoundError(f"{source} is no model folder: it has no {CONFIG_FILE} and no {WEIGHTS_FILE}")
    return copied[0]


def _copy_weights(path: epath.Path) -> Path:
    """Copies a file of weights, or an index and the files that it names. Returns the local path."""
    local = local_copy(path)
    for part in tensor_files.parts(local)[1:]:
        if path.with_name(part.name).is_file():
            local_copy(path.with_name(part.name))
    return local


def _describe_folder(folder: Path) -> str:
    """What a folder that is no model folder is, and where there are models in it, as the end of a sentence."""
    names = set(os.listdir(folder))
    below = first_lines([shown(path.relative_to(folder)) for path in _models_below(folder)])
    if "_CHECKPOINT_METADATA" in names:
        model = folder.absolute().parent.parent / EXPORT_FOLDER
        return f"; it is a checkpoint of a training, which writes its model to {model} at its end"
    if "checkpoints" in names and "metrics.jsonl" in names:
        there = EXPORT_FOLDER in below
        where = f"name {folder / EXPORT_FOLDER}" if there else f"its model will be in {EXPORT_FOLDER}/ at its end"
        return f"; it is the workdir of a training: {where}"
    if below:
        return f"; there are models in {', '.join(below)}"
    weights = [name for name in sorted(names) if name.endswith((".safetensors", ".bin", ".pth", ".pt", ".msgpack"))]
    weights = first_lines([shown(name) for name in weights if name not in _TRAINER_STATES])
    if weights:
        return f"; it holds {', '.join(weights)}: name one file"
    if names & set(_TRAINER_STATES):
        return "; it holds the states of a published trainer's optimizer, without the model"
    return "; it is empty" if not names else ""


def _models_below(folder: Path) -> Iterator[Path]:
    """The model folders among the sub-folders of a folder, and those that trainings write into these."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in itertools.islice(entries, 1000) if entry.is_dir())
    for name in names:
        for path in (folder / name, *(folder / name / inner for inner in (EXPORT_FOLDER, *TRAINER_MODELS))):
            if (path / CONFIG_FILE).is_file() or _weights_in(path):
                yield path
                break
