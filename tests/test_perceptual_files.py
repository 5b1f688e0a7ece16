"""The published files of the perceptual networks: PyTorch pickles with torchvision's names, and converted safetensors."""

import importlib.util
import pathlib

import golden_data as gd
import numpy as np
import pytest
import safetensors.numpy

from titok_jax import models
from titok_jax.models.perceptual import VGG_LEVELS, PerceptualConfig
from titok_jax.weights import convert
from titok_jax.weights.convert import WeightsError
from titok_jax.weights.perceptual_files import load_perceptual

TOOL = pathlib.Path(__file__).parents[1] / "tools" / "convert_weights.py"
NAME = "lpips-convnext_s-1.0-0.1"
HAS_TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="PyTorch is not installed: pip install torch")


@pytest.fixture(scope="module")
def seeded():
    """{published name of the loss: array}."""
    return gd.seeded_weights(shapes())


def shapes():
    config = PerceptualConfig(NAME)
    return convert.published_shapes(convert.table_for(config), models.abstract(config)[1])


@pytest.fixture(scope="module")
def files(seeded):
    """{file: {name in it: array}} as torchvision and LPIPS publish them, with torchvision's recorded names."""
    info = gd.load_json("training/convnext_s.json")
    convnext = {name: seeded["convnext." + name].reshape(shape) for name, shape in info["convnext_parameters"].items()}
    levels = {n: i + 1 for i, level in enumerate(VGG_LEVELS) for n in level}
    vgg = {f"features.{n}.{k}": seeded[f"lpips.net.slice{i}.{n}.{k}"] for n, i in levels.items() for k in ("weight", "bias")}
    vgg |= {"classifier.6.weight": np.zeros((3, 4), np.float32), "classifier.6.bias": np.zeros(3, np.float32)}
    heads = {name.removeprefix("lpips."): w for name, w in seeded.items() if name.startswith("lpips.lin")}
    return {"convnext_small-0c510722": convnext, "vgg16-397923af": vgg, "lpips_vgg": heads}


def check(folder, seeded):
    loaded = convert.to_published(convert.table_for(PerceptualConfig(NAME)), load_perceptual(NAME, folder).params)
    assert loaded.keys() == seeded.keys()
    for name in seeded:
        np.testing.assert_array_equal(loaded[name], seeded[name], err_msg=name)


def save(files, folder, ending):
    for stem, tensors in files.items():
        if ending == ".safetensors":
            safetensors.numpy.save_file(tensors, folder / (stem + ending))
        else:
            import torch

            # ConvNeXt's file has the newer PyTorch format; the other two have the older one.
            torch.save(
                {name: torch.from_numpy(w) for name, w in tensors.items()},
                folder / (stem + ending),
                _use_new_zipfile_serialization="convnext" in stem,
            )


@needs_torch
def test_pickles_are_read_and_converted_to_what_reads_the_same(tool, files, seeded, tmp_path, capsys):
    save(files, tmp_path, ".pth")
    check(tmp_path, seeded)
    (tmp_path / "converted").mkdir()
    for stem in files:
        assert tool.main([str(tmp_path / f"{stem}.pth"), str(tmp_path / "converted" / f"{stem}.safetensors")]) == 0
    assert capsys.readouterr().out.count("read again and equal") == 3
    assert "classifier" not in safetensors.numpy.load_file(tmp_path / "converted/vgg16-397923af.safetensors")
    check(tmp_path / "converted", seeded)
    assert tool.main([str(tmp_path / "lpips_vgg.pth"), str(tmp_path / "folder/")]) != 0
    assert "LPIPS) is written as safetensors or torch, not as folder" in capsys.readouterr().err


def test_safetensors_are_read_and_what_is_absent_or_another_is_named(files, seeded, tmp_path):
    for stem, url in (("convnext_small-0c510722", "download.pytorch.org"), ("vgg16-397923af", "download.pytorch.org"),
                      ("lpips_vgg", "richzhang/PerceptualSimilarity")):  # fmt: skip
        with pytest.raises(FileNotFoundError, match=rf"needs {stem}.pth.*{url}.*--config.perceptual_weights"):
            load_perceptual(NAME, tmp_path)
        save({stem: files[stem]}, tmp_path, ".safetensors")
    check(tmp_path, seeded)
    wrong = {**files["lpips_vgg"], "lin5.model.1.weight": np.zeros((1, 512, 1, 1), np.float32)}
    del wrong["lin0.model.1.weight"]
    save({"lpips_vgg": wrong}, tmp_path, ".safetensors")
    with pytest.raises(WeightsError, match=r"(?s)lin0.model.1.weight.*lin5.model.1.weight"):
        load_perceptual(NAME, tmp_path)
