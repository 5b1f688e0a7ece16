"""What a file or folder is: told in one sentence, before anything large is read, when it is given in place of another."""

import json
import re
import struct
import time

import numpy as np
import pytest
import tiny_models as tiny
from flax import serialization
from PIL import Image
from test_weights import sparse_zeros

from titok_jax import evaluate, inference, models, parity, pretokenize, reconstruct, sample
from titok_jax.data import records
from titok_jax.evaluation import features
from titok_jax.models import GeneratorConfig, MaskgitVQGANConfig, TiTokConfig
from titok_jax.training.build import build_task
from titok_jax.training.recipes import read_config
from titok_jax.training.settings import parse_settings
from titok_jax.weights import (
    convert,
    kinds,
    known_models,
    model_files,
    pretrained,
    safetensors_file,
    tensor_files,
)

VQGAN = MaskgitVQGANConfig(hidden_channels=32, channel_mult=(1, 2), num_res_blocks=1, z_channels=8, codebook_size=16)


def published(config):
    return convert.to_published(convert.table_for(config), tiny.params(config))


def refused(call, *arguments, **options) -> str:
    """The message of the refusal, which took less than a second of this process and is one line."""
    start = time.process_time()
    with pytest.raises((ValueError, OSError)) as error:
        call(*arguments, **options)
    assert time.process_time() - start < 1
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("models")
    saved = {
        "tokenizer": tiny.save(tmp / "tokenizer", tiny.TOKENIZER),
        "generator": tiny.save(tmp / "generator", tokenizer=None),
        "vqgan": tiny.save(tmp / "vqgan", VQGAN),
    }
    # Weights alone, of published sizes that this machine need not have: zeros that take no space.
    for name, kind in (("generator", GeneratorConfig), ("tokenizer", TiTokConfig)):
        config = known_models.known_configs(kind)[name, "titok_l32"]
        saved[f"{name}_file"] = sparse_zeros(tmp / f"{name}.safetensors", known_models.published_shapes(config))
    return saved


@pytest.mark.parametrize("file", ["", "_file"])
def test_a_model_in_the_place_of_another(file, folders):
    """In every command; nothing is read but a configuration or a header."""
    weights = "holds the weights of" if file else "is the configuration of"
    tokenizer, generator = f"{weights} a tokenizer; ", f"{weights} a generator; "
    places = {name: str(folders[name + file]) for name in ("tokenizer", "generator")}
    digits = ["digits:train", "--out", "nowhere"]
    for command, arguments, message in (
        (sample, ["--model", places["tokenizer"]], f"{tokenizer}a generator belongs here"),
        (sample, ["--tokenizer", places["generator"]], f"{generator}a tokenizer belongs here"),
        (evaluate, ["--model", places["tokenizer"]], f"{tokenizer}a generator belongs here"),
        (evaluate, ["--model", places["generator"], "--reconstruct", "digits:test"], f"{generator}a tokenizer belongs here"),
        (pretokenize, [*digits, "--model", places["generator"]], f"{generator}a tokenizer belongs here"),
    ):
        assert message in refused(command.main.__wrapped__, arguments)
    for load, kind, message in (
        (inference.load_generator, "tokenizer", f"{tokenizer}a generator belongs here"),
        (inference.load_tokenizer, "generator", f"{generator}a tokenizer belongs here"),
        (inference.load_vqgan, "generator", f"{generator}a MaskGIT-VQGAN belongs here"),
        (inference.load_image_config, "generator", f"{generator}a tokenizer belongs here"),
        (inference.load_pair, "tokenizer", f"{tokenizer}a generator belongs here"),
    ):
        assert message in refused(load, places[kind])
    assert "a MaskGIT-VQGAN; a tokenizer belongs here" in refused(inference.load_tokenizer, folders["vqgan"])


def test_pictures_for_a_model_that_is_none(folders, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    for command in (reconstruct, parity):
        arguments = ["--model", str(folders["generator"]), str(tmp_path / "a.png")]
        arguments += ["--out", str(tmp_path / "out")] if command is reconstruct else []
        message = refused(command.main.__wrapped__, arguments)
        assert message.endswith(
            "config.json is the configuration of a generator; a tokenizer belongs here: name the one of this generator"
        )


def test_a_published_configuration_that_describes_both(folders, tmp_path):
    """The names of the tensors tell. Without them the whole generator would be read, and 500 tensors listed."""
    config = tiny.TOKENIZER.to_published()
    config["model"] |= {"generator": tiny.GENERATOR.to_published()["model"]["generator"]}
    for name, other in (("tokenizer", "generator"), ("generator", "tokenizer")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        shapes = published(tiny.TOKENIZER if name == "tokenizer" else tiny.GENERATOR)
        safetensors_file.write_safetensors(folder / "model.safetensors", shapes)
        classes = {"tokenizer": TiTokConfig, "generator": GeneratorConfig}
        pretrained.load(folder, classes[name])
        for call in (pretrained.load, pretrained.load_config):
            message = refused(call, folder, classes[other])
            assert f"model.safetensors holds the weights of a {name}; a {other} belongs here" in message


def test_networks_are_told_by_their_names():
    """The published models with all their sizes are told in test_zoo.py."""
    for config in (tiny.TOKENIZER, tiny.VAE, tiny.STAGE_1, tiny.GENERATOR, VQGAN, models.DiscriminatorConfig()):
        assert kinds.family_of_tensors(known_models.published_shapes(config)) is models.family_of(config)
    with tensor_files.open_weights(features.DIGITS_WEIGHTS) as (_, found):
        assert kinds.family_of_tensors(found).title == "the network of digits-FID"
    for names, title in (
        ({"Conv2d_1a_3x3.conv.weight"}, "InceptionV3"),
        ({"features.0.0.weight", "classifier.2.weight"}, "perceptual"),
        ({"lin0.model.1.weight"}, "perceptual"),
    ):
        assert title in kinds.family_of_tensors(names).title
    assert kinds.family_of_tensors({"encoder.weight"}) is None


def test_other_networks_in_the_place_of_a_model(folders, tmp_path):
    found = tensor_files.tensor_names(features.DIGITS_WEIGHTS)
    path = tmp_path / "a.safetensors"
    discriminator = models.DiscriminatorConfig()
    sparse_zeros(path, known_models.published_shapes(discriminator))
    assert "a.safetensors holds the weights of a discriminator; a generator belongs here" in refused(
        inference.load_generator, path
    )
    sparse_zeros(path, {"net.0.weight": (3,), "net.0.bias": (3,)})
    assert refused(inference.load_generator, path) == (
        f"{path}: its 2 tensors (net.0.weight, net.0.bias, ...) are of no kind of model that is known here; a generator "
        "belongs here. A family of your own needs its config.json beside it"
    )
    for kind, belongs in ((None, "a tokenizer, a generator or a MaskGIT-VQGAN"), (TiTokConfig, "a tokenizer")):
        with pytest.raises(
            convert.WeightsError, match=f"the network of digits-FID(, of another size .*)?; {belongs} belongs"
        ):
            known_models.match(dict.fromkeys(found, np.zeros(1)), kind, source="a")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Llama\x1b[2J"]}))
    path.rename(tmp_path / "model.safetensors")
    assert refused(inference.load_generator, tmp_path) == (
        f"{tmp_path}/config.json is the configuration of a Llama\\x1b[2J; a generator belongs here"
    )


def test_other_files_in_the_place_of_weights(tmp_path):
    path = tmp_path / "weights"
    with records.token_writer(tmp_path / "tokens.array_record") as write:
        write(np.arange(8), 3)
    np.savez(tmp_path / "a.npz", arr_0=np.zeros(3))
    for content, what in (
        ((tmp_path / "tokens.array_record").read_bytes(), "records of tokens or images (ArrayRecord)"),
        ((tmp_path / "a.npz").read_bytes(), "a zip archive, such as arrays (.npz)"),
        (b'{"class_id": 3, "tokens": [1, 2]}\n', "JSON, such as a configuration or lines of tokens"),
        (b"PAR1" * 9, "a table (Parquet)"),
        (b"\x89HDF\r\n\x1a\n" * 9, "an HDF5 file"),
        (b"\x93NUMPY" * 9, "an array (.npy)"),
    ):
        path.write_bytes(content)
        message = refused(inference.load_tokenizer, path)
        assert message == f"{path} holds no weights: it is {what}; expected {tensor_files.EXPECTED}"
    path.write_bytes(serialization.to_bytes({"params": {"a": np.zeros(3, np.float32)}}))
    assert "is a Flax checkpoint of which only the MaskGIT-VQGAN's is read; a tok" in refused(inference.load_tokenizer, path)
    # The length of a header may begin like another file: 60 is "<".
    entry = '{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}'
    path.write_bytes(struct.pack("<Q", 60) + entry.encode() + b"\0")
    assert len(entry) == 60
    with tensor_files.open_weights(path) as (_, tensors):
        assert list(tensors) == ["a"]


def test_folders_that_hold_no_model(folders, tmp_path):
    def message(folder):
        text = refused(pretrained.load, folder, TiTokConfig)
        beginning = f"{folder} is not a model folder: it holds no config.json and no model.safetensors"
        assert text.startswith(beginning)
        return text.removeprefix(beginning)

    run = tmp_path / "run"
    (run / "checkpoints" / "3" / "state").mkdir(parents=True)
    (run / "checkpoints" / "3" / "_CHECKPOINT_METADATA").touch()
    (run / "metrics.jsonl").touch()
    assert message(run) == "; it is the workdir of a training: its model will be in pretrained/ at its end"
    assert message(run / "checkpoints" / "3") == (
        f"; it is a checkpoint of a training, which writes its model to {run}/pretrained at its end"
    )
    tiny.save(run / "pretrained", tiny.TOKENIZER)
    assert message(run) == f"; it is the workdir of a training: name {run}/pretrained"
    assert message(tmp_path) == "; there are models in run/pretrained"

    trainer = tmp_path / "output"
    for number in range(7):
        tiny.save(trainer / f"checkpoint-{number}" / "ema_model", tiny.TOKENIZER)
    assert message(trainer) == "; there are models in " + ", ".join(
        [*(f"checkpoint-{number}/ema_model" for number in range(5)), "... and 2 more"]
    )
    states = tmp_path / "states"
    states.mkdir()
    assert message(states) == "; it is empty"
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        (states / name).touch()
    assert message(states) == "; it holds the states of a published trainer's optimizer, without the model"
    (states / "tokenizer_titok_l32.bin").touch()
    assert message(states) == "; it holds tokenizer_titok_l32.bin: name one file"
    assert "nothing is not a folder or file" in refused(pretrained.load, tmp_path / "nothing", TiTokConfig)
    meant = refused(pretrained.load, tmp_path / "output" / "checkpoint_3", TiTokConfig)
    assert meant == f"{tmp_path}/output/checkpoint_3 is not a folder or file; did you mean {tmp_path}/output/checkpoint-3?"


def test_a_configuration_in_the_place_of_weights(folders):
    path = folders["tokenizer"] / "config.json"
    assert refused(pretrained.load, path, TiTokConfig) == (
        f"{path} is a configuration; name its folder, or the file of weights"
    )


def test_the_weights_beside_averaged_ones(tmp_path, caplog):
    """A checkpoint folder of the published trainer gives ema_model/. Who names other weights of it is told of that."""
    checkpoint = tmp_path / "checkpoint-5"
    for name in ("unwrapped_model", "ema_model"):
        tiny.save(checkpoint / name, tiny.TOKENIZER)
    (checkpoint / "model.safetensors").write_bytes((checkpoint / "ema_model" / "model.safetensors").read_bytes())
    (checkpoint / "config.json").write_bytes((checkpoint / "ema_model" / "config.json").read_bytes())
    for source in (checkpoint / "ema_model", checkpoint / "ema_model" / "model.safetensors"):
        model_files.locate(source, TiTokConfig)
    assert not caplog.records
    for _ in range(3):  # said once
        assert model_files.locate(checkpoint, TiTokConfig).weights == checkpoint / "ema_model" / "model.safetensors"
    for source in ("unwrapped_model", "unwrapped_model/model.safetensors", "model.safetensors"):
        for _ in range(2):
            model_files.locate(checkpoint / source, TiTokConfig)
    average = checkpoint / "ema_model"
    assert [record.message for record in caplog.records] == [
        f"{checkpoint} is a checkpoint of the published trainer: taking ema_model; for the weights without averaging name "
        f"{checkpoint}/unwrapped_model",
        *(
            f"{checkpoint}/{source}: weights without averaging; the averaged ones of this checkpoint are in {average}"
            for source in ("unwrapped_model", "unwrapped_model/model.safetensors", "model.safetensors")
        ),
    ]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_removed_and_said(prefix, tmp_path, caplog):
    folder = tiny.save(tmp_path / "model", tiny.TOKENIZER)
    path = folder / "model.safetensors"
    weights = published(tiny.TOKENIZER)
    safetensors_file.write_safetensors(path, {prefix + name: array for name, array in weights.items()})
    for _ in range(2):
        params = convert.flatten(pretrained.load(folder, TiTokConfig)[1])
    wanted = convert.flatten(tiny.params(tiny.TOKENIZER))
    assert all(np.array_equal(params[name], wanted[name]) for name in wanted)
    assert [record.message for record in caplog.records] == [
        f"{path}: removing the prefix {prefix} from the names of its {len(weights)} tensors"
    ]
    # Only a prefix of all names is one.
    safetensors_file.write_safetensors(path, {prefix + name: a for name, a in weights.items()} | {"x": np.zeros(1)})
    with pytest.raises(convert.WeightsError, match=f"surplus: {prefix}"):
        pretrained.load(folder, TiTokConfig)


def test_a_recipe_names_a_model_of_another_kind(folders, tmp_path):
    """The error names the field, and is raised before any weights are read."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "metrics.jsonl").touch()
    for recipe, field, source, message in (
        (
            "digits:generator",
            "tokenizer",
            folders["generator"],
            "is the configuration of a generator; a tokenizer belongs here",
        ),
        (
            "digits:generator",
            "tokenizer",
            folders["generator_file"],
            "holds the weights of a generator; a tokenizer belongs",
        ),
        (
            "generator:smoke",
            "init_from",
            folders["tokenizer"],
            "is the configuration of a tokenizer; a generator belongs here",
        ),
        (
            "single_stage:smoke",
            "init_from",
            folders["vqgan"],
            "is the configuration of a MaskGIT-VQGAN; a tokenizer belongs",
        ),
        (
            "single_stage:smoke",
            "init_from",
            run,
            "it is the workdir of a training: its model will be in pretrained/ at its end",
        ),
        ("stage1:smoke", "vqgan", folders["tokenizer"], "is the configuration of a tokenizer; a MaskGIT-VQGAN belongs here"),
        ("stage2:smoke", "init_from", folders["generator"], "is the configuration of a generator; a tokenizer belongs here"),
        ("digits:generator", "tokenizer", "digit", "unknown model 'digit': .*; did you mean digits?"),
    ):
        config = read_config(recipe, [f"--config.{field}={source}"])
        text = refused(lambda config: build_task(parse_settings(config)), config)
        assert text.startswith(f"config.{field}: ")
        assert re.search(message.replace("?", r"\?"), text), text
