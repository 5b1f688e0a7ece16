"""Weights in several files with an index, as the libraries of the hub write large models."""

import importlib.util
import json

import numpy as np
import pytest
import safetensors.numpy
import tiny_models as tiny
from fake_hub import COMMIT, serve, use

from titok_jax import inference, sample
from titok_jax.models import TiTokConfig
from titok_jax.runtime import outputs
from titok_jax.weights import convert, model_files, pretrained, safetensors_file, tensor_files
from titok_jax.weights.hub import DownloadError

PARTS = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]


def split_weights(folder, write=safetensors_file.write_safetensors, names=PARTS):
    """Puts three files and an index in place of a folder's weights. Returns the index."""
    tensors = convert.to_published(convert.table_for(tiny.TOKENIZER), tiny.params(tiny.TOKENIZER))
    (folder / "model.safetensors").unlink()
    places = {name: names[number % 3] for number, name in enumerate(tensors)}
    for part in names:
        write(folder / part, {name: tensors[name] for name in tensors if places[name] == part})
    index = folder / (names[0].replace("-00001-of-00003", "") + ".index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


def same(params) -> bool:
    found, wanted = convert.flatten(params), convert.flatten(tiny.params(tiny.TOKENIZER))
    return found.keys() == wanted.keys() and all(np.array_equal(found[name], wanted[name]) for name in wanted)


@pytest.fixture
def folder(tmp_path):
    return tiny.save(tmp_path / "model", tiny.TOKENIZER)


def change(index, **places):
    content = json.loads(index.read_text())
    content["weight_map"] |= places
    index.write_text(json.dumps(content))


def test_an_index_is_read_as_one_file(folder, tmp_path):
    index = split_weights(folder)
    for source in (folder, index, str(folder)):
        config, params = pretrained.load(source, TiTokConfig)
        assert config == tiny.TOKENIZER == pretrained.load_config(source, TiTokConfig)
        assert same(params)
    digest = pretrained.weights_sha256(None, str(folder))["tokenizer"]
    assert digest == pretrained.weights_sha256(None, str(index))["tokenizer"] != outputs.sha256(index)
    pretrained.save(tmp_path / "again", config, params)  # in one file
    with pytest.raises(convert.WeightsError, match=rf"{PARTS[1]} is one of several files of a model; name {index}, or the"):
        pretrained.load(folder / PARTS[1], TiTokConfig)
    # Under a name of one's own, with its configuration.
    index.rename(folder / "mine.safetensors.index.json")
    (folder / "config.json").rename(folder / "mine.json")
    assert same(pretrained.load(folder / "mine.safetensors.index.json", TiTokConfig)[1])
    (folder / PARTS[0]).write_bytes((folder / PARTS[0]).read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(convert.WeightsError, match=rf"{PARTS[0]}: tensor \S+ is not what was written"):
        pretrained.load(folder / "mine.safetensors.index.json", TiTokConfig)


def test_files_missing_and_files_of_another_model(folder):
    index = split_weights(folder)
    data = (folder / PARTS[1]).read_bytes()
    (folder / PARTS[1]).unlink()
    (folder / PARTS[2]).rename(folder / "c")
    with pytest.raises(FileNotFoundError, match=f"{index}: of its 3 files there are missing: {PARTS[1]}, {PARTS[2]}$"):
        pretrained.load(folder, TiTokConfig)
    (folder / "c").rename(folder / PARTS[2])
    (folder / PARTS[1]).write_bytes((folder / PARTS[0]).read_bytes())
    with pytest.raises(
        convert.WeightsError, match=rf"{PARTS[1]} does not fit {index.name}: tensor \S+ is (not )?there, and"
    ):
        pretrained.load(folder, TiTokConfig)
    (folder / PARTS[1]).write_bytes(data)
    assert same(pretrained.load(folder, TiTokConfig)[1])


@pytest.mark.parametrize("part", ["../secret", "/etc/passwd", "", ".", "..", "a/b", "a\\b", "a\0b", "sub/../a"])
def test_an_index_names_files_of_its_own_folder(part, folder):
    index = split_weights(folder)
    (folder.parent / "secret").write_bytes(b"no weights")
    change(index, latent_tokens=part)
    with pytest.raises(convert.WeightsError, match=r"index.json names the file '.*', expected files in its own folder"):
        pretrained.load(folder, TiTokConfig)
    assert model_files.locate(folder, TiTokConfig).weights == index


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": {"a": 1}}', b"[" * 100_000, b"\xff"]
)
def test_an_index_that_is_none(content, folder):
    split_weights(folder).write_bytes(content)
    with pytest.raises(convert.WeightsError, match=r"model.safetensors.index.json is no index of weights: "):
        pretrained.load(folder, TiTokConfig)


def test_an_index_of_many_files(folder):
    index = split_weights(folder)
    index.write_text(json.dumps({"weight_map": {str(number): f"{number}.bin" for number in range(1001)}}))
    with pytest.raises(convert.WeightsError, match="names 1001 files, expected at most 1000"):
        tensor_files.part_names(index)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed: pip install torch")
def test_pytorch_files_with_an_index(folder):
    import torch

    def write(path, tensors):
        torch.save({name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}, path)

    index = split_weights(folder, write, [f"pytorch_model-{number:05d}-of-00003.bin" for number in (1, 2, 3)])
    assert index.name == "pytorch_model.bin.index.json"
    assert same(pretrained.load(folder, TiTokConfig)[1])


@pytest.fixture
def hub():
    with serve({}) as hub:
        yield hub


def test_an_index_on_the_hub(hub, folder, tmp_path, monkeypatch):
    cache = use(hub, tmp_path, monkeypatch)
    index = split_weights(folder, lambda path, tensors: safetensors.numpy.save_file(tensors, path))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.repositories["someone/parts"] = {"main": (COMMIT, files)}
    source = "hf://someone/parts"
    assert same(pretrained.load(source, TiTokConfig)[1])
    assert pretrained.weights_sha256(None, source) == pretrained.weights_sha256(None, str(index))
    # Its files are checked as one file is.
    (path,) = cache.glob(f"*/snapshots/*/{PARTS[2]}")
    data = path.read_bytes()
    path.resolve().write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(convert.WeightsError, match=f"{PARTS[2]} is damaged: it is not what the hub sent; remove "):
        pretrained.load(source, TiTokConfig)
    # What it does not hold, and what an index names elsewhere.
    hub.repositories["someone/parts"] = {"main": ("c" * 40, {name: files[name] for name in files if name != PARTS[1]})}
    with pytest.raises(DownloadError, match=f"cannot download {source}/{PARTS[1]}: the repository does not hold this file"):
        pretrained.load(source, TiTokConfig)
    change(index, latent_tokens="../../secret")
    hub.repositories["someone/parts"] = {"main": ("d" * 40, files | {index.name: index.read_bytes()})}
    before = set(tmp_path.rglob("secret"))
    with pytest.raises(convert.WeightsError, match=r"names the file '../../secret', expected files in its own folder"):
        pretrained.load(source, TiTokConfig)
    assert set(tmp_path.rglob("secret")) == before


def test_a_model_of_another_kind_on_the_hub_is_not_downloaded(hub, folder, tmp_path, monkeypatch):
    use(hub, tmp_path, monkeypatch)
    hub.repositories["someone/tokenizer"] = {"main": (COMMIT, {path.name: path.read_bytes() for path in folder.iterdir()})}
    source = "hf://someone/tokenizer"
    for call in (inference.load_generator, inference.load_pair, inference.load_vqgan):
        with pytest.raises(convert.WeightsError, match=r"is the configuration of a tokenizer; a .* belongs here"):
            call(source)
    with pytest.raises(convert.WeightsError, match="is the configuration of a tokenizer; a generator belongs here"):
        sample.main.__wrapped__(["--model", source])
    assert not [path for _, path, _ in hub.requests if "/large/" in path or "safetensors" in path]
