"""The table of published models against the published code's names, shapes, counts and configurations."""

import json
from pathlib import Path

import golden_data
import numpy as np
import pytest

from titok_jax import models, zoo
from titok_jax.weights import config_files, known_models, pretrained, published_models

PUBLISHED = [model for model in published_models.MODELS if model.architecture is not None]
CLASSES = {"tokenizer": models.TiTokConfig, "generator": models.GeneratorConfig, "vqgan": models.MaskgitVQGANConfig}


def golden_name(model):
    if model.kind == "vqgan":
        return "maskgit_vqgan"
    return f"{model.kind}_{model.name}" + ("_c16" if model.name.endswith("_vae") else "")


@pytest.mark.parametrize("model", PUBLISHED, ids=golden_name)
def test_names_shapes_and_count_are_the_published_ones(model):
    published = golden_data.load_json(f"shapes/{golden_name(model)}.json")
    config = CLASSES[model.kind].from_published(model.published_config)
    expected = {name: tuple(shape) for name, shape in published["tensors"].items()}
    assert known_models.published_shapes(config) == expected
    assert model.num_params == published["num_params"] == sum(int(np.prod(shape)) for shape in expected.values())


@pytest.mark.parametrize("model", [m for m in PUBLISHED if m.kind != "vqgan"], ids=golden_name)
def test_configurations_are_the_published_ones(model):
    name = f"configs/{golden_name(model)}"
    resolved = (golden_data.GOLDEN / f"{name}.resolved.json").is_file()
    published = golden_data.load_json(f"{name}.resolved.json" if resolved else f"{name}.json")
    sections = ("vq_model", "generator") if model.kind == "generator" else ("vq_model",)
    assert model.architecture == {section: published["model"][section] for section in sections}
    assert model.published_config["dataset"] == published["dataset"]
    assert model.checkpoint == published["experiment"][f"{model.kind}_checkpoint"]
    raw = golden_data.load_json(f"{name}.json")  # as on the hub
    cls = CLASSES[model.kind]
    read = cls.from_published(config_files.resolve_interpolations(raw, source=name))
    assert read == cls.from_published(model.published_config)


@pytest.mark.parametrize("model", [model for model in published_models.MODELS if model.folder], ids=lambda m: m.kind)
def test_the_embedded_models_are_what_the_table_says(model):
    config = pretrained.load_config(model.name, CLASSES[model.kind])
    assert model.num_params == sum(int(np.prod(shape)) for shape in known_models.published_shapes(config).values())
    assert getattr(config, "image_size", model.image_size) == model.image_size
    assert model.cached()


def test_all_published_models_are_there():
    assert len(PUBLISHED) == 13
    assert len({(model.kind, model.name) for model in published_models.MODELS}) == len(published_models.MODELS)
    # Every generator has a tokenizer of the same name, and fits it.
    for model in PUBLISHED:
        if model.kind == "generator":
            tokenizer = published_models.find(model.name, "tokenizer")
            assert tokenizer.architecture["vq_model"] == model.architecture["vq_model"]


def test_a_file_without_configuration_is_told_by_its_tensors():
    """No two known models have the same tensors, and each model's tensors identify it."""
    for (kind, name), config in known_models.known_configs().items():
        shapes = {n: np.broadcast_to(np.float32(0), shape) for n, shape in known_models.published_shapes(config).items()}
        assert known_models.match(shapes, type(config), source="a") == config, (kind, name)
    shapes = {
        name: np.broadcast_to(np.float32(0), shape)
        for name, shape in known_models.published_shapes(models.DiscriminatorConfig()).items()
    }
    with pytest.raises(ValueError, match="a holds the weights of a discriminator; a tokenizer belongs here"):
        known_models.match(shapes, models.TiTokConfig, source="a")
    del shapes["block_in.0.bias"]
    with pytest.raises(
        ValueError,
        match=r"(?s)discriminator, but of no known size, .*discriminator: 1 tensors differ, the first is block_in",
    ):
        known_models.match(shapes, None, source="a")
    with pytest.raises(ValueError, match=r"a: its 1 tensors \(b, ...\) are of no kind of model that is known here; a tok"):
        known_models.match({"b": np.zeros(1)}, None, source="a")


def test_find(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert published_models.find("mine", "tokenizer") == Path("mine")
    assert published_models.find("titok_l32", "generator").kind == "generator"
    assert published_models.find("hf://owner/name") == "owner/name"
    assert published_models.find("hf://owner/name/file.bin@v1") == "owner/name/file.bin@v1"
    for name in ("yucornetto/tokenizer_titok_l32_imagenet", "fun-research/TiTok/tokenizer_titok_l32.bin"):  # as published
        assert published_models.find(name, "tokenizer") == published_models.find(f"hf://{name}", "tokenizer") == name
    for wrong, message in (
        (
            "titok_l33",
            r"unknown model 'titok_l33': it is no .*, and none of digits, titok_l32, .*; did you mean titok_l32\?$",
        ),
        ("mien", r"unknown model 'mien': .*; did you mean mine\?$"),
        ("mien/model.safetensors", r"^mien/model.safetensors: no such file or folder; did you mean mine\?$"),
        ("x.safetensors", "^x.safetensors: no such file or folder$"),
        ("owner/name", "^owner/name: no such file or folder; a repository on the hub is hf://owner/name$"),
        ("titok_bl64_vae", "'titok_bl64_vae' is a tokenizer, not a generator; of this kind there are: digits, titok_l32"),
        ("hf://name", "expected hf://owner/name"),
        ("hf://a/b/../c", "expected hf://owner/name"),
    ):
        with pytest.raises(ValueError, match=message):
            published_models.find(wrong, "generator")


def test_the_printed_table(capsys, monkeypatch, tmp_path):
    import huggingface_hub.constants

    commit = "0" * 40
    repository = tmp_path / "models--yucornetto--tokenizer_titok_b64_imagenet"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert zoo.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * (1 + len(published_models.MODELS)) + 1
    details = {tuple(line.split()[:2]): line for line in lines[2 + len(published_models.MODELS) :]}
    for model in PUBLISHED:
        assert details[model.name, model.kind].endswith(f"  {model.checkpoint}")
    for name, kind, words in (
        (
            "titok_b64",
            "tokenizer",
            "two-stage, base encoder, base decoder, patches of 16, 64 x 12 channels, 4,096 codes on the",
        ),
        (
            "titok_bl128_vae",
            "tokenizer",
            "single-stage, base encoder, large decoder, patches of 16, 128 x 16 channels  ",
        ),
        ("titok_s128", "generator", "UViT, 20 layers, width 1024, MLP 4096, 16 heads, 128 tokens"),
    ):
        assert words in details[name, kind]
    rows = {tuple(line.split()[:2]): line for line in lines[: 1 + len(published_models.MODELS)]}
    l32 = rows["titok_l32", "generator"]
    assert "177,202,432" in l32
    assert "gFID 2.77" in l32
    assert "8 steps, temperature 9.5, guidance 4.5 linear, annealed" in l32
    assert [name for name, line in rows.items() if line.endswith("yes") and name[0] != "digits"] == [
        ("titok_b64", "tokenizer")
    ]


def test_what_the_table_says_of_sampling_is_what_is_done():
    for model in PUBLISHED:
        if model.kind == "generator":
            sampling = models.GeneratorConfig.from_published(json.loads(json.dumps(model.published_config))).sampling
            assert sampling.softmax_temperature_annealing
            for value in (sampling.num_steps, sampling.temperature, sampling.guidance_scale, sampling.guidance_schedule):
                assert str(value) in model.sampling
