"""tools/convert_weights.py: every format into every other and back, and the published code takes what is written."""

import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys

import golden_data
import numpy as np
import pytest
import safetensors.numpy
import tiny_models as tiny
from flax import serialization
from test_weights import measures_memory, peak_memory

from titok_jax import models
from titok_jax.weights import config_files, convert, flax_file, known_models, pretrained, safetensors_file, tensor_files

TOOL = pathlib.Path(__file__).parents[1] / "tools" / "convert_weights.py"
VQGAN = models.MaskgitVQGANConfig(hidden_channels=32, channel_mult=(1, 2), num_res_blocks=1, z_channels=8, codebook_size=16)
HAS_TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="PyTorch is not installed: pip install torch")


def published(config):
    return convert.to_published(convert.table_for(config), tiny.params(config))


def read(path):
    with tensor_files.open_weights(path) as (_, tensors):
        return {name: np.asarray(tensor) for name, tensor in tensors.items()}


def same(a, b):
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and a[n].tobytes() == b[n].tobytes() for n in a)


@pytest.mark.parametrize("config", [tiny.TOKENIZER, tiny.VAE, tiny.STAGE_1, tiny.GENERATOR, VQGAN])
def test_round_trip_of_folder_and_file(config, tool, tmp_path, capsys):
    folder = pretrained.save(tmp_path / "folder", config, tiny.params(config))
    file = tmp_path / "file.safetensors"
    assert tool.main([str(folder), str(file)]) == 0
    assert capsys.readouterr().out.endswith("read again and equal\n")
    assert file.read_bytes() == (folder / "model.safetensors").read_bytes()
    assert tool.main([str(file), str(tmp_path / "again/")]) == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "file.json", "file.safetensors", "folder"]


def test_round_trip_of_the_jax_checkpoint(tool, tmp_path):
    folder = pretrained.save(tmp_path / "folder", VQGAN, tiny.params(VQGAN))
    assert tool.main([str(folder), str(tmp_path / "flax.msgpack")]) == 0
    tree = serialization.msgpack_restore((tmp_path / "flax.msgpack").read_bytes())
    assert same(convert.jax_vqgan_to_published(tree, source="", config=VQGAN), published(VQGAN))
    assert tool.main([str(tmp_path / "flax.msgpack"), str(tmp_path / "back.safetensors")]) == 0
    assert same(read(tmp_path / "back.safetensors"), published(VQGAN))


def test_the_original_tree_gets_the_published_names(tool, tmp_path):
    """The full-size JAX VQGAN, as zeros, gets the PyTorch model's names and shapes without any configuration."""
    flat = golden_data.load_json("jax_vqgan.json")["tree"]
    tree = {"params": convert.unflatten({name: np.zeros(shape, np.float32) for name, shape in flat.items()})}
    flax_file.write_flax(tmp_path / "tokenizer_imagenet256_checkpoint", tree)
    output = tmp_path / "maskgit-vqgan.safetensors"
    assert tool.main([str(tmp_path / "tokenizer_imagenet256_checkpoint"), str(output), "--dtype", "bfloat16"]) == 0
    found = {name: array.shape for name, array in read(output).items()}
    assert found == golden_data.published_shapes("shapes/maskgit_vqgan.json")
    assert not output.with_suffix(".json").exists()


def test_dtype(tool, tmp_path, capsys):
    folder = tiny.save(tmp_path / "folder", tiny.TOKENIZER)
    for dtype in ("float16", "bfloat16"):
        assert tool.main([str(folder), str(tmp_path / dtype) + "/", "--dtype", dtype]) == 0
        half = read(tmp_path / dtype / "model.safetensors")
        assert same(half, {name: array.astype(half[name].dtype) for name, array in published(tiny.TOKENIZER).items()})
        assert {array.dtype.name for array in half.values()} == {dtype}
    assert tool.main([str(tmp_path / "float16"), str(tmp_path / "back/"), "--dtype", "float32"]) == 0
    back = read(tmp_path / "back" / "model.safetensors")
    halved = {n: array.astype(np.float16).astype(np.float32) for n, array in published(tiny.TOKENIZER).items()}
    assert same(back, halved)


def test_dry_run_prints_the_table_and_writes_nothing(tool, tmp_path, capsys):
    folder = tiny.save(tmp_path / "folder", tiny.TOKENIZER)
    assert tool.main([str(folder), str(tmp_path / "new.safetensors"), "--dry-run", "--dtype", "float16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(published(tiny.TOKENIZER))
    (line,) = [line for line in lines if line.startswith("encoder.patch_embed.weight ")]
    assert line.split(maxsplit=1)[1].split("]")[0] == "[32, 3, 8, 8"
    assert line.endswith("float32 -> float16")
    assert lines[-1].endswith("dry run, nothing written")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}", "{file}"], "file.safetensors exists and nothing was overwritten"),
        (["{folder}", "{folder}"], "folder exists and nothing was overwritten"),
        (["{folder}", "{tmp}/no/a.safetensors"], "no is not an existing folder; create it first"),
        (["{folder}", "{tmp}/a.npz"], "unknown ending .npz; expected one of .safetensors, .bin"),
        (["{folder}", "{tmp}/a.msgpack"], "a tokenizer is written as folder or safetensors or torch, not as flax"),
        (["{folder}", "{tmp}/a/", "--kind", "vqgan"], "is the configuration of a tokenizer; a MaskGIT-VQGAN belongs here"),
        (["{tmp}/nothing", "{tmp}/a/"], "nothing: no such file or folder"),
        (["titok_l32", "{tmp}/a/"], "titok_l32 is a tokenizer and a generator; add --kind"),
        (["{short}", "{tmp}/a/"], "short.safetensors is not a whole safetensors file"),
        (["{large}", "{tmp}/a/", "--dtype", "float16"], "latent_tokens is not finite in float16"),
        (["{nan}", "{tmp}/a/"], "latent_tokens is not finite in the input"),
    ],
)
def test_refuses(arguments, message, tool, tmp_path, capsys):
    folder = tiny.save(tmp_path / "folder", tiny.TOKENIZER)
    places = {"tmp": tmp_path, "folder": folder, "file": tmp_path / "file.safetensors"}
    places["file"].write_bytes(b"mine")
    (tmp_path / "short.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    for name, value in (("large", 1e5), ("nan", np.nan)):
        tensors = published(tiny.TOKENIZER)
        tensors["latent_tokens"] = np.full_like(tensors["latent_tokens"], value)
        safetensors_file.write_safetensors(tmp_path / f"{name}.safetensors", tensors)
    for name in ("short", "large", "nan"):
        config_files.write_config(tmp_path / f"{name}.json", tiny.TOKENIZER)
        places[name] = tmp_path / f"{name}.safetensors"
    before = sorted(tmp_path.rglob("*"))
    assert tool.main([argument.format(**places) for argument in arguments]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    assert places["file"].read_bytes() == b"mine"


@pytest.mark.skipif(HAS_TORCH, reason="torch is here")
def test_a_pytorch_file_is_not_written_without_pytorch(tool, tmp_path, capsys):
    folder = tiny.save(tmp_path / "folder", tiny.TOKENIZER)
    assert tool.main([str(folder), f"{tmp_path}/a.bin"]) == 2
    assert capsys.readouterr().err.startswith(
        f"error: {tmp_path}/a.bin is a PyTorch file and PyTorch is not installed, which is needed to write it"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert tool.main([str(folder), f"{tmp_path}/a.bin", "--dry-run"]) == 0


def test_a_write_that_fails_leaves_nothing(tool, tmp_path, capsys, monkeypatch):
    """A disk that returns other bytes than were written is detected."""
    folder = tiny.save(tmp_path / "folder", tiny.TOKENIZER)
    write = safetensors_file.write_safetensors

    def bad(path, *rest):
        write(path, *rest)
        with open(path, "r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x55")

    monkeypatch.setattr(safetensors_file, "write_safetensors", bad)
    for output in ("a.safetensors", "a/"):
        assert tool.main([str(folder), f"{tmp_path}/{output}"]) == 2
        assert "is not what was written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_published_yaml_file_is_a_configuration(tool, tmp_path, capsys):
    """A size that is in no table, as the published trainer leaves it: a file of weights and a YAML file."""
    config = dataclasses.replace(tiny.TOKENIZER, num_latent_tokens=9)
    safetensors.numpy.save_file(
        convert.to_published(convert.table_for(config), tiny.params(config)), tmp_path / "a.safetensors"
    )
    text = json.dumps(config.to_published() | {"optimizer": {"learning_rate": 1e-4}})
    (tmp_path / "a.yaml").write_text(
        "# a comment\n" + text.replace('"num_latent_tokens": 9', '"num_latent_tokens": "${tokens}"')[:-1] + ', "tokens": 9}'
    )
    arguments = [str(tmp_path / "a.safetensors"), str(tmp_path / "out"), "--published-config"]
    assert tool.main([*arguments, str(tmp_path / "a.yaml")]) == 0
    assert pretrained.load(tmp_path / "out", models.TiTokConfig)[0] == config
    (tmp_path / "bad.yaml").write_text("a: [1, 2")
    assert tool.main([*arguments[:1], str(tmp_path / "other"), "--published-config", str(tmp_path / "bad.yaml")]) == 2
    assert "bad.yaml is not valid YAML" in capsys.readouterr().err
    assert tool.main([*arguments, str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: no such file" in capsys.readouterr().err


def test_a_discriminator_keeps_its_constants(tool, tmp_path):
    """The published training code saves the constants too, as they are in the state dict."""
    shapes = golden_data.published_shapes("shapes/discriminator.json")
    constants = models.family_of(models.DiscriminatorConfig()).buffers(models.DiscriminatorConfig())
    tensors = {name: constants.get(name, np.ones(shape, np.float32)) for name, shape in shapes.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "discriminator.safetensors")
    assert tool.main([str(tmp_path / "discriminator.safetensors"), str(tmp_path / "new.safetensors")]) == 0
    assert same(read(tmp_path / "new.safetensors"), tensors)


def test_as_a_process(tmp_path):
    result = subprocess.run([sys.executable, TOOL, "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stdout.count("python tools/convert_weights.py") >= 4


# ---------------------------------------------------------------------------------------------------------------------
# With PyTorch


def module_tree(torch, shapes):
    """A module whose state dict has these names, shapes and order."""
    root = torch.nn.Module()
    for name, shape in shapes.items():
        *parents, leaf = name.split(".")
        node = root
        for parent in parents:
            if not hasattr(node, parent):
                node.add_module(parent, torch.nn.Module())
            node = getattr(node, parent)
        node.register_parameter(leaf, torch.nn.Parameter(torch.empty(shape)))
    return root


@needs_torch
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tiny_vq_stage1", models.TiTokConfig),
        ("tiny_vq_stage2", models.TiTokConfig),
        ("tiny_vq8k", models.TiTokConfig),
        ("tiny_vae", models.TiTokConfig),
        ("tiny_vit_generator", models.GeneratorConfig),
        ("tiny_uvit_generator", models.GeneratorConfig),
        ("tiny_maskgit_vqgan", models.MaskgitVQGANConfig),
    ],
)
def test_pytorch_files_of_the_published_shapes(name, kind, tool, tmp_path):
    """Published names and shapes -> state dict file -> here -> back: strict=True accepts it, and every value is the same."""
    import torch

    shapes = golden_data.published_shapes(f"tiny/{name}.shapes.json")
    state = {n: torch.from_numpy(golden_data.seeded_array(n, shape)) for n, shape in shapes.items()}
    torch.save(state, tmp_path / "published.bin")
    torch.save(state, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    config = config_of_tiny(name, kind)
    for file in ("published", "old"):
        config_files.write_config(tmp_path / f"{file}.json", config)
        folder = tmp_path / f"folder_{file}"
        assert tool.main([str(tmp_path / f"{file}.bin"), f"{folder}/"]) == 0
        assert tool.main([str(folder), str(tmp_path / f"{file}_back.bin")]) == 0
        back = torch.load(tmp_path / f"{file}_back.bin", weights_only=True)
        module = module_tree(torch, shapes)
        module.load_state_dict(back, strict=True)
        for n, tensor in module.state_dict().items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, state[n]), n
    _, params = pretrained.load(tmp_path / "published.bin", kind)
    expected = {n: tensor.numpy() for n, tensor in state.items()}
    assert same(convert.to_published(convert.table_for(config), params), expected)


def config_of_tiny(name, kind):
    """The tiny golden models have their own sizes, which published configurations cannot express."""
    import test_titok

    if kind is models.TiTokConfig:
        return test_titok.tiny_config(name)
    if kind is models.MaskgitVQGANConfig:
        return models.MaskgitVQGANConfig(hidden_channels=32, resolution=64)
    return kind.from_published(golden_data.load_json(f"tiny/{name}.config.json"))


@needs_torch
def test_the_published_trainers_folder_and_half_precision(tool, tmp_path):
    import torch

    folder = tmp_path / "unwrapped_model"
    folder.mkdir()
    state = {name: torch.from_numpy(array).bfloat16() for name, array in published(tiny.TOKENIZER).items()}
    torch.save(state, folder / "pytorch_model.bin")
    config_files.write_config(folder / "config.json", tiny.TOKENIZER)
    params = convert.flatten(pretrained.load(folder, models.TiTokConfig)[1])
    wanted = convert.flatten(tiny.params(tiny.TOKENIZER))
    for path, array in params.items():
        np.testing.assert_allclose(array, wanted[path], rtol=2**-8)
    assert tool.main([str(folder), str(tmp_path / "a.bin")]) == 0
    back = torch.load(tmp_path / "a.bin", weights_only=True)
    assert all(back[name].dtype == torch.bfloat16 and torch.equal(back[name], state[name]) for name in state)


class Malicious:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("it_ran"),)


@needs_torch
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    for old in (False, True):
        torch.save({"a": Malicious()}, "a.bin", _use_new_zipfile_serialization=not old)
        with pytest.raises(convert.WeightsError, match=r"a\.bin is damaged, or holds more than tensors, such as code"):
            pretrained.load("a.bin", models.TiTokConfig)
    assert not pathlib.Path("it_ran").exists()
    for content, message in (
        ([torch.zeros(2)], "expected a state dict .*, found list"),
        ({"state_dict": {"a": torch.zeros(2), "step": 3}}, "found dict under 'state_dict'"),
        ({"a": torch.zeros(2), "step": 3}, "found int under 'step'"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "of no kind of model that is known"),
        ({"a": torch.zeros(2).to_sparse()}, "tensor a is .*sparse"),
    ):
        torch.save(content, "a.bin")
        with pytest.raises(convert.WeightsError, match=message):
            pretrained.load("a.bin", models.TiTokConfig)


@needs_torch
def test_mutated_pytorch_files(tmp_path):
    import random

    import torch
    from test_weights import mutate_bytes

    path = tmp_path / "model" / "pytorch_model.bin"
    path.parent.mkdir()
    torch.save({name: torch.from_numpy(array) for name, array in published(tiny.TOKENIZER).items()}, path)
    config_files.write_config(path.with_name("config.json"), tiny.TOKENIZER)
    original = path.read_bytes()
    wanted = convert.flatten(tiny.params(tiny.TOKENIZER))
    rng = random.Random(3)
    everywhere = list(range(len(original)))
    pickle_and_directory = [*range(8000), *range(len(original) - 3000, len(original))]
    for number in range(300):
        path.write_bytes(mutate_bytes(original, rng, rng.choice((everywhere, pickle_and_directory))))
        error = None
        try:
            _, params = pretrained.load(path.parent, models.TiTokConfig, place=lambda path, array: array)
        except convert.WeightsError as raised:
            error = str(raised)
        if error is None:  # some bytes of a zip file do not count
            assert same(convert.flatten(params), wanted), number
        else:
            assert str(path) in error, (number, error)


@needs_torch
@measures_memory
def test_peak_memory_of_loading_a_pytorch_file(tmp_path):
    """Peak memory of loading TiTok-S-128. The file is mapped into memory, and its pages count too."""
    import torch

    path = tmp_path / "tokenizer_titok_s128.bin"
    config = dict(known_models.known_configs(models.TiTokConfig))["tokenizer", "titok_s128"]
    torch.save({name: torch.ones(shape) for name, shape in known_models.published_shapes(config).items()}, path)
    assert 0.9 < peak_memory(path, models.TiTokConfig) < 1.3


def test_json_beside_is_the_configuration(tool, tmp_path):
    folder = tiny.save(tmp_path / "folder", tiny.TOKENIZER)
    assert tool.main([str(folder), str(tmp_path / "a.safetensors")]) == 0
    assert json.loads((tmp_path / "a.json").read_text()) == tiny.TOKENIZER.to_published()
