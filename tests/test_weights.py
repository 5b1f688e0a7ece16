"""Weight files in every format: they are read as they were written, and anything wrong about them is an error."""

import contextlib
import dataclasses
import json
import os
import random
import signal
import struct
import subprocess
import sys
import zlib

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import tiny_models as tiny
from flax import serialization

from titok_jax import inference
from titok_jax.models import GeneratorConfig, MaskgitVQGANConfig, TiTokConfig
from titok_jax.models.generator import SAMPLING_KEYS
from titok_jax.weights import config_files, convert, flax_file, known_models, pretrained, safetensors_file, tensor_files

VQGAN = MaskgitVQGANConfig(hidden_channels=32, channel_mult=(1, 2), num_res_blocks=1, z_channels=8, codebook_size=16)


def assert_equal(a, b):
    a, b = convert.flatten(a), convert.flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == np.float32, path
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def published(config):
    return convert.to_published(convert.table_for(config), tiny.params(config))


def load_numpy(source, kind):
    return pretrained.load(source, kind, place=lambda path, array: array)


# ---------------------------------------------------------------------------------------------------------------------
# The formats


def test_safetensors_are_written_as_by_their_own_library(tmp_path):
    rng = np.random.default_rng(0)
    dtypes = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.int8, np.uint8, np.bool_)
    shapes = ((), (0,), (3,), (2, 3), (1, 2, 3, 1), (5,), (4,), (7,), (1,))
    tensors = {
        f"ü{i}": np.asarray(10 * rng.standard_normal(shape)).astype(dtype)
        for i, (dtype, shape) in enumerate(zip(dtypes, shapes, strict=True))
    }
    safetensors_file.write_safetensors(tmp_path / "ours", tensors)
    safetensors.numpy.save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    for name in ("ours", "theirs"):
        with tensor_files.open_weights(tmp_path / name) as (form, read):
            assert form == "safetensors"
            assert read.keys() == tensors.keys()
            for key, tensor in read.items():
                array = np.asarray(tensor)
                assert (tensor.shape, tensor.dtype) == (array.shape, array.dtype) == (tensors[key].shape, tensors[key].dtype)
                np.testing.assert_array_equal(array, tensors[key])
    same_dtype = {name: rng.standard_normal((2, 3)).astype(np.float32) for name in "cab"}
    safetensors_file.write_safetensors(tmp_path / "ours", same_dtype)
    safetensors.numpy.save_file(same_dtype, tmp_path / "theirs", {"format": "pt"})
    header, data = split(tmp_path / "ours")
    checksums = header["__metadata__"].pop("crc32").split()
    assert (header, data) == split(tmp_path / "theirs")
    assert checksums == [f"{zlib.crc32(f'{n} F32 [2, 3]'.encode() + same_dtype[n].tobytes()):08x}" for n in "abc"]


def split(path):
    """Header and tensors of a safetensors file."""
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    assert end % 8 == 0
    return json.loads(data[8:end]), data[end:]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read_into_float32(dtype, tmp_path):
    folder = tiny.save(tmp_path / "model", tiny.TOKENIZER)
    half = {name: array.astype(dtype) for name, array in published(tiny.TOKENIZER).items()}
    safetensors_file.write_safetensors(folder / "model.safetensors", half)
    expected = convert.from_published(
        convert.table_for(tiny.TOKENIZER),
        tiny.params(tiny.TOKENIZER),
        {name: array.astype(np.float32) for name, array in half.items()},
        source="",
    )
    assert_equal(load_numpy(folder, TiTokConfig)[1], expected)


def test_a_file_finds_its_configuration(tmp_path):
    folder = tiny.save(tmp_path / "model", tiny.TOKENIZER)
    # The folder's own file; a file with another name and its configuration beside it; a path as a string.
    assert_equal(load_numpy(folder / "model.safetensors", TiTokConfig)[1], tiny.params(tiny.TOKENIZER))
    (tmp_path / "mine.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(
        ValueError,
        match=r"(?s)mine\.safetensors holds the weights of a tokenizer, .* no configuration beside it.*\n  tokenizer titok_",
    ):
        inference.load_tokenizer(tmp_path / "mine.safetensors")
    (tmp_path / "mine.json").write_bytes((folder / "config.json").read_bytes())
    tokenizer = inference.load_tokenizer(str(tmp_path / "mine.safetensors"))
    assert_equal(tokenizer.params, tiny.params(tiny.TOKENIZER))
    with pytest.raises(ValueError, match=r"revision 'main' given, but .* is not on the hub"):
        inference.load_tokenizer(folder, revision="main")


def test_a_published_file_needs_no_configuration(tmp_path):
    """Uses the smallest published model, as zeros that take no space on the disk."""
    name = tmp_path / "maskgit-vqgan-imagenet-f16-256.safetensors"
    shapes = known_models.published_shapes(MaskgitVQGANConfig())
    sparse_zeros(name, shapes)
    config, params = load_numpy(name, MaskgitVQGANConfig)
    assert config == MaskgitVQGANConfig()
    assert sum(array.size for array in convert.flatten(params).values()) == 54_515_587
    with pytest.raises(ValueError, match=r"safetensors holds the weights of a MaskGIT-VQGAN; a tokenizer belongs here"):
        pretrained.load_config(name, TiTokConfig)


def sparse_zeros(path, shapes):
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position)
    return path


MEMORY = """
import sys
import numpy as np
from titok_jax import models
from titok_jax.weights import config_files
from titok_jax.weights import known_models, model_files, pretrained

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

source, kind = sys.argv[1], getattr(models, sys.argv[2])
files = model_files.locate(source, kind)
known_models.published_shapes(pretrained.load_config(source, kind))
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
_, params = pretrained.load(source, kind)
print((status("VmHWM") - before) / files.weights.stat().st_size)
"""
measures_memory = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is measured through Linux's /proc"
)


def peak_memory(path, kind):
    """Peak memory of a process that loads a file, beyond its memory before, in units of the file's size."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    arguments = [sys.executable, "-c", MEMORY, str(path), kind.__name__]
    result = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return float(result.stdout)


@measures_memory
def test_peak_memory_of_loading(tmp_path):
    """Loads TiTok-S-128, 335 MB, and the MaskGIT-VQGAN as Flax writes it, 218 MB."""
    config = dict(known_models.known_configs(TiTokConfig))["tokenizer", "titok_s128"]
    sparse_zeros(tmp_path / "tokenizer_titok_s128.safetensors", known_models.published_shapes(config))
    assert 0.9 < peak_memory(tmp_path / "tokenizer_titok_s128.safetensors", TiTokConfig) < 1.3
    zeros = {n: np.zeros(shape, np.float32) for n, shape in known_models.published_shapes(MaskgitVQGANConfig()).items()}
    flax_file.write_flax(tmp_path / "tokenizer_imagenet256_checkpoint", convert.published_to_jax_vqgan(zeros))
    assert 0.9 < peak_memory(tmp_path / "tokenizer_imagenet256_checkpoint", MaskgitVQGANConfig) < 1.3


def test_the_jax_checkpoint_of_the_vqgan(tmp_path):
    """The checkpoint as Flax writes it. Another test checks the mapping of names with the original tree."""
    folder = pretrained.save(tmp_path / "vqgan", VQGAN, tiny.params(VQGAN))
    assert pretrained.load_config(folder, MaskgitVQGANConfig) == VQGAN
    assert_equal(load_numpy(folder, MaskgitVQGANConfig)[1], tiny.params(VQGAN))
    tree = convert.published_to_jax_vqgan(published(VQGAN), config=VQGAN)
    checkpoint = tmp_path / "tokenizer_imagenet256_checkpoint"
    checkpoint.write_bytes(serialization.to_bytes(tree))
    (tmp_path / "tokenizer_imagenet256_checkpoint.json").write_bytes((folder / "config.json").read_bytes())
    config, params = load_numpy(checkpoint, MaskgitVQGANConfig)
    assert config == VQGAN
    assert_equal(params, tiny.params(VQGAN))
    (tmp_path / "tokenizer_imagenet256_checkpoint.json").unlink()
    with pytest.raises(ValueError, match="is a Flax checkpoint of a MaskGIT-VQGAN; a tokenizer belongs here"):
        pretrained.load(checkpoint, TiTokConfig)
    config_files.write_config(tmp_path / "tokenizer_imagenet256_checkpoint.json", VQGAN)
    del tree["params"]["encoder"]["Conv_0"]
    checkpoint.write_bytes(serialization.to_bytes(tree))
    with pytest.raises(
        convert.WeightsError, match=r"1 arrays are not a JAX MaskGIT-VQGAN's:\n  missing: encoder/Conv_0/kernel"
    ):
        pretrained.load(checkpoint, MaskgitVQGANConfig)


def test_position_ids_are_dropped(tmp_path):
    folder = tiny.save(tmp_path / "model", tokenizer=None)
    name = "model.embeddings.position_ids"
    tensors = {**published(tiny.GENERATOR), name: np.arange(tiny.GENERATOR.num_tokens + 1)[None]}
    safetensors_file.write_safetensors(folder / "model.safetensors", tensors)
    assert_equal(load_numpy(folder, GeneratorConfig)[1], tiny.params(tiny.GENERATOR))
    safetensors_file.write_safetensors(folder / "model.safetensors", {**tensors, name: tensors[name] + 1})
    with pytest.raises(convert.WeightsError, match=f"{name} is not the constant"):
        load_numpy(folder, GeneratorConfig)
    uvit = dataclasses.replace(tiny.GENERATOR, model_type="UViT", num_layers=4)
    folder = tiny.save(tmp_path / "uvit", uvit, tokenizer=None)
    safetensors_file.write_safetensors(folder / "model.safetensors", {**published(uvit), name: tensors[name]})
    with pytest.raises(convert.WeightsError, match=f"surplus: {name}"):
        load_numpy(folder, GeneratorConfig)


def test_saving_checks_that_all_is_there(tmp_path):
    params = dict(tiny.params(tiny.TOKENIZER))
    del params["latent_tokens"]
    with pytest.raises(
        convert.WeightsError, match=r"to be saved: 1 tensors do not fit the model:\n  missing: latent_tokens"
    ):
        pretrained.save(tmp_path / "model", tiny.TOKENIZER, params)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong


def test_other_files(tmp_path):
    path = tmp_path / "weights"
    for content, message in (
        (b"", "it is empty"),
        (b"hello " * 9, "it starts with b'hello"),
    ):
        path.write_bytes(content)
        with pytest.raises(convert.WeightsError, match=f"weights is no file of weights: expected safetensors.*{message}"):
            pretrained.load(path, TiTokConfig)
    for content, message in (
        (b"GIF89a" * 9, r"an image \(GIF\)"),
        (b"\x89PNG\r\n\x1a\n" * 9, r"an image \(PNG\)"),
        (b"\xff\xd8\xff\xe0" * 9, r"an image \(JPEG\)"),
        (b"<html>" * 9, "a page of the web"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a", r"\(git lfs pull\)"),
    ):
        path.write_bytes(content)
        with pytest.raises(convert.WeightsError, match=f"weights holds no weights: it is .*{message}"):
            pretrained.load(path, TiTokConfig)
    with pytest.raises(FileNotFoundError, match="nothing is not a folder or file"):
        pretrained.load(tmp_path / "nothing", TiTokConfig)


def test_a_checkpoint_of_the_published_trainer(tmp_path, caplog):
    """Beside the state of its trainer, it holds the model twice. The averaged one is taken, and said to be."""
    for name, seed in (("unwrapped_model", 1), ("ema_model", 2)):
        pretrained.save(tmp_path / "checkpoint-5" / name, tiny.TOKENIZER, tiny.params(tiny.TOKENIZER, seed))
    (tmp_path / "checkpoint-5" / "model.safetensors").write_bytes(b"the trainer's own")
    config, params = load_numpy(tmp_path / "checkpoint-5", TiTokConfig)
    assert config == tiny.TOKENIZER
    assert_equal(params, tiny.params(tiny.TOKENIZER, 2))
    assert "taking ema_model; for the weights without averaging name" in caplog.text
    assert_equal(load_numpy(tmp_path / "checkpoint-5" / "unwrapped_model", TiTokConfig)[1], tiny.params(tiny.TOKENIZER, 1))


@pytest.mark.skipif(
    "torch" in sys.modules or bool(__import__("importlib.util").util.find_spec("torch")), reason="torch is here"
)
def test_a_pytorch_file_without_pytorch(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"PK\x03\x04" + b"\0" * 20)
    with pytest.raises(convert.WeightsError) as error:
        pretrained.load(tmp_path / "a.bin", TiTokConfig)
    assert "a.bin is a PyTorch file and PyTorch is not installed" in str(error.value)
    assert ": pip install torch --index-url https://download.pytorch.org/whl/cpu, or convert it" in str(error.value)


def test_headers_that_lie(tmp_path):
    """Each would make a trusting reader use unlimited memory or time, or read beyond the data."""
    path = tmp_path / "a.safetensors"

    def write(header, data=b""):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)

    def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
        return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}

    path.write_bytes(struct.pack("<Q", 2**62) + b"{" + b" " * 100)
    headers = [
        None,
        ({"a": entry((2**40, 2**40))}, b"\0" * 8),
        ({"a": entry((2**62, 2**62, 0), (0, 0))}, b"\0" * 8),
        ({"a": entry((-2, -1))}, b"\0" * 8),
        ({"a": entry((True, 2))}, b"\0" * 8),
        ({"a": entry(offsets=(-8, 0))}, b"\0" * 8),
        ({"a": entry(), "b": entry()}, b"\0" * 8),
        ({"a": entry(), "b": entry(offsets=(12, 20))}, b"\0" * 20),
        ({"a": entry()}, b"\0" * 12),
        ({"a": entry()}, b"\0" * 4),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": 1}', b"\0" * 8),
        (b'{"a": ' + b"9" * 10_000 + b"}", b""),
        (b'{"a": ' + b"[" * 100_000 + b"}", b""),
        ({"a": entry(dtype="F4")}, b"\0" * 8),
        ({"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}, b"\0" * 8),
        (b"{}" + b"\xff" * 9, b""),
    ]
    for header in headers:
        if header is not None:
            write(*header)
        with pytest.raises(convert.WeightsError, match=r"a\.safetensors"):
            pretrained.load(path, TiTokConfig)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "Mamba"}, "model_type is 'Mamba', expected 'ViT' or 'UViT'"),
        ({"num_hidden_layers": 10**9}, "model.generator.num_hidden_layers is 1000000000, expected"),
        ({"hidden_size": 0}, "model.generator.hidden_size is 0, expected a whole number from 1"),
        ({"hidden_size": "32"}, "model.generator.hidden_size is '32', expected"),
        ({"num_steps": "8"}, "model.generator.num_steps is '8', expected a whole number from 1 to 10000"),
        ({"dropout": 1.5}, "model.generator.dropout is 1.5, expected a number from 0 to 1"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_heads 5"),
        ({"image_seq_len": "${experiment.tokens}"}, r"cannot resolve '\$\{experiment.tokens\}'; expected"),
        ({"image_seq_len": "${model}"}, r"cannot resolve '\$\{model\}'; expected .* single value"),
        ({"randomize_temperature": float("nan")}, "model.generator.randomize_temperature is nan, expected a number"),
    ],
)
def test_configurations_that_cannot_be(change, message, tmp_path):
    folder = tiny.save(tmp_path / "model", tokenizer=None)
    config = json.loads((folder / "config.json").read_text())
    config["model"]["generator"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(convert.WeightsError, match=rf"config\.json: {message}"):
        pretrained.load(folder, GeneratorConfig)


# Mutations. A second reader, the format's own library, tells whether a mutated file still holds the same tensors. Only then
# may it load, with the same values.


class Hang(BaseException):
    """Not an Exception, so that no handler takes it for a damaged file."""


@pytest.fixture
def in_time():
    """A context that raises Hang after a minute. A read takes a hundredth of a second."""

    def stop(*_):
        raise Hang

    @contextlib.contextmanager
    def limit():
        signal.alarm(60)
        try:
            yield
        finally:
            signal.alarm(0)

    before = signal.signal(signal.SIGALRM, stop)
    yield limit
    signal.signal(signal.SIGALRM, before)


def mutate_bytes(data: bytes, rng: random.Random, structure: list[int]) -> bytes:
    """One to three changes at the positions `structure`, or to the length."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        place = min(rng.choice(structure), len(data) - 1) if data else 0
        kind = rng.randrange(9)
        if kind == 0 and data:
            del data[rng.randrange(len(data)) :]
        elif kind == 1:
            data += rng.randbytes(rng.randint(1, 50))
        elif kind == 2:
            data[place:place] = rng.randbytes(rng.randint(1, 9))
        elif kind == 3:
            del data[place : place + rng.randint(1, 9)]
        elif kind == 4 and data:
            data[:8] = struct.pack("<Q", rng.choice((0, 1, len(data), 2**31, 2**63, rng.getrandbits(64))))
        elif kind == 5:
            other = rng.choice(structure)
            data[place : place + 8] = data[other : other + 8]
        elif kind == 6 and data:
            data[place] = rng.choice(b'0123456789"{}[]:,-.eE\\u')
        elif data:
            data[place] ^= 1 << rng.randrange(8)
    return bytes(data)


def same_tensors(read, data, expected) -> bool:
    try:
        found = read(data)
    except Exception:
        return False
    return found.keys() == expected.keys() and all(
        found[name].dtype == expected[name].dtype
        and found[name].shape == expected[name].shape
        and found[name].tobytes() == expected[name].tobytes()
        for name in expected
    )


def load_unless_refused(in_time, source, config, path):
    """(configuration, parameters) of a model like `config`; None if it is refused with a message that names `path`."""
    try:
        with in_time():
            return load_numpy(source, type(config))
    except convert.WeightsError as error:
        if str(path) not in str(error):
            raise
        return None


def check_mutations(path, folder_or_file, config, read, in_time, *, seed, count, tensors_too):
    """Half of the mutations are outside the tensors; with `tensors_too` the others are anywhere."""
    original, expected_params = path.read_bytes(), tiny.params(config)
    expected = read(original)
    inside = np.zeros(len(original), bool)
    for array in expected.values():
        start = original.find(array.tobytes())
        inside[start : start + array.nbytes] = True
    structure = np.flatnonzero(~inside).tolist()
    everywhere = list(range(len(original))) if tensors_too else structure
    rng = random.Random(seed)
    refused = 0
    for number in range(count):
        data = mutate_bytes(original, rng, everywhere if number % 2 else structure)
        path.write_bytes(data)
        found = load_unless_refused(in_time, folder_or_file, config, path)
        if found is None:
            refused += 1
            continue
        assert data == original or same_tensors(read, data, expected), number
        assert found[0] == config
        assert_equal(found[1], expected_params)
    path.write_bytes(original)
    assert_equal(load_numpy(folder_or_file, type(config))[1], expected_params)
    assert refused > 0.9 * count


def test_mutated_safetensors(in_time, tmp_path):
    folder = tiny.save(tmp_path / "model", tiny.TOKENIZER)
    path, read = folder / "model.safetensors", safetensors.numpy.load
    check_mutations(path, folder, tiny.TOKENIZER, read, in_time, seed=0, count=1000, tensors_too=True)


def test_mutated_flax_checkpoints(in_time, tmp_path):
    """This format has no checksums, so a changed number cannot be detected."""
    path = tmp_path / "checkpoint.msgpack"
    path.write_bytes(serialization.to_bytes(convert.published_to_jax_vqgan(published(VQGAN), config=VQGAN)))
    config_files.write_config(tmp_path / "checkpoint.json", VQGAN)

    def read(data):
        return {k: np.asarray(v) for k, v in convert.flatten(serialization.msgpack_restore(data)).items()}

    check_mutations(path, path, VQGAN, read, in_time, seed=1, count=400, tensors_too=False)


def test_each_byte_of_a_tensor_counts(tmp_path):
    """A flipped bit in a tensor, or two swapped tensors, give an error that names the tensor."""
    folder = tiny.save(tmp_path / "model", tiny.TOKENIZER)
    path = folder / "model.safetensors"
    original = path.read_bytes()
    header, _ = split(path)
    start = len(original) - max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    for name in ("latent_tokens", "encoder.conv_out.weight", "decoder.transformer.1.mlp.c_proj.bias"):
        data = bytearray(original)
        data[start + header[name]["data_offsets"][0]] ^= 1  # the lowest bit of the mantissa
        path.write_bytes(data)
        with pytest.raises(convert.WeightsError, match=rf"model\.safetensors: tensor {name} is not what was written"):
            load_numpy(folder, TiTokConfig)
    one, two = b'"encoder.ln_pre.weight"', b'"encoder.ln_pre.biasXX"'
    swapped = original.replace(b'"encoder.ln_pre.bias"', two).replace(one, b'"encoder.ln_pre.bias"').replace(two, one)
    assert len(swapped) == len(original)
    path.write_bytes(swapped)
    with pytest.raises(convert.WeightsError, match=r"tensor encoder\.ln_pre\.(weight|bias) is not what was written"):
        load_numpy(folder, TiTokConfig)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_numbers_that_are_none(value, tmp_path):
    folder = tiny.save(tmp_path / "model", tiny.TOKENIZER)
    tensors = published(tiny.TOKENIZER)
    tensors["decoder.transformer.1.ln_2.bias"] = np.full(32, value, np.float64 if value == 1e300 else np.float32)
    safetensors_file.write_safetensors(folder / "model.safetensors", tensors)
    with pytest.raises(
        convert.WeightsError, match=r"model\.safetensors: tensor decoder\.transformer\.1\.ln_2\.bias holds a NaN, an inf"
    ):
        load_numpy(folder, TiTokConfig)


STRANGE = (
    None, True, -1, 0, 1, 2, 3, 7, 64, 2**31, 2**70, 1e308, float("nan"), float("inf"), -0.5, "", "x", "vq", "8", "ViT",
    "${a}", "${model.vq_model.codebook_size}", [], [1], {}, {"a": 1}, [[]] * 3,
)  # fmt: skip


def mutate_config(text: str, rng: random.Random) -> bytes:
    if rng.random() < 0.4:
        data = text.encode()
        return mutate_bytes(data, rng, list(range(len(data))))
    config = json.loads(text)
    for _ in range(rng.choice((1, 1, 2))):
        node = config
        while True:
            if not isinstance(node, dict) or not node:
                break
            key = rng.choice(sorted(node))
            if isinstance(node[key], dict) and node[key] and rng.random() < 0.9:
                node = node[key]
                continue
            action = rng.randrange(4)
            if action == 0:
                del node[key]
            elif action == 1:
                node[key + rng.choice(("", "_", "x"))] = rng.choice(STRANGE)
            else:
                node[key] = rng.choice(STRANGE)
            break
    return json.dumps(config).encode()


@pytest.mark.parametrize(
    ("config", "count"),
    [(tiny.TOKENIZER, 250), (tiny.GENERATOR, 250), (VQGAN, 100)],
    ids=["tokenizer", "generator", "vqgan"],
)
def test_mutated_configurations(config, count, in_time, tmp_path):
    """A configuration that differs from the saved one is never accepted, though no tensor's shape reveals most changes."""
    folder = pretrained.save(tmp_path / "model", config, tiny.params(config))
    path = folder / "config.json"
    text = path.read_text()
    rng = random.Random(2)
    refused = 0
    for number in range(count):
        path.write_bytes(mutate_config(text, rng))
        found = load_unless_refused(in_time, folder, config, path)
        if found is None:
            refused += 1
            continue
        assert network_of(json.loads(path.read_bytes())) == network_of(json.loads(text)), number
        if found[0] != config:
            assert differing(found[0], config) == {"sampling"}, number
        assert_equal(found[1], tiny.params(config))
    assert refused > 0.8 * count


def network_of(config):
    """A configuration without the default sampling settings, which may be edited."""
    generator = config["model"].get("generator", {})
    return config | {
        "model": config["model"] | {"generator": {k: v for k, v in generator.items() if k not in SAMPLING_KEYS}}
    }


# No tensor determines these fields. Without a checksum, a changed value gives a valid configuration.
FREE = {
    "use_l2_norm", "commitment_cost", "finetune_decoder", "dropout", "attn_dropout", "class_label_dropout", "sampling",
    "num_heads", "pixel_decoder",
}  # fmt: skip


def differing(a, b) -> set[str]:
    names = set()
    for field in dataclasses.fields(a):
        one, two = getattr(a, field.name), getattr(b, field.name)
        if one == two:
            continue
        nested = dataclasses.is_dataclass(one) and field.name not in FREE
        names |= differing(one, two) if nested else {field.name}
    return names


@pytest.mark.parametrize("config", [tiny.TOKENIZER, tiny.GENERATOR, VQGAN], ids=["tokenizer", "generator", "vqgan"])
def test_mutated_configurations_without_a_checksum(config, in_time, tmp_path):
    """Weights as other programs write them. The tensors are checked against the configuration, and so are the type and range
    of every value."""
    folder = pretrained.save(tmp_path / "model", config, tiny.params(config))
    safetensors.numpy.save_file(published(config), folder / "model.safetensors")
    path, original = folder / "config.json", (folder / "config.json").read_text()
    rng = random.Random(4)
    for number in range(40):
        path.write_bytes(mutate_config(original, rng))
        found = load_unless_refused(in_time, folder, config, folder)
        if found is not None:
            assert differing(found[0], config) <= FREE | {"resolution"}, number
            assert_equal(found[1], tiny.params(config))


def test_every_value_of_a_wrong_type_is_named(tmp_path):
    """Replaces each value of a configuration in turn by one of a wrong type. The message names file, key and value."""
    configs = (tiny.TOKENIZER, tiny.VAE, tiny.GENERATOR, VQGAN, dataclasses.replace(tiny.STAGE_1, pixel_decoder=VQGAN))
    values = 0
    for number, config in enumerate(configs):
        path = tmp_path / f"{number}.json"
        published_form = json.loads(json.dumps(config.to_published()))
        for section, key in leaves(published_form):
            if isinstance(config, GeneratorConfig) and key == "num_latent_tokens":
                continue  # not read: image_seq_len gives it
            before, wrong = section[key], [None, [], {}, float("nan"), -1, 10**30, [[8]]]
            wrong += ["8"] if isinstance(before, bool) else ["8", True]
            for value in wrong:
                section[key] = value
                path.write_text(json.dumps(published_form))
                with pytest.raises(convert.WeightsError) as error:
                    config_files.read_config_as(path, type(config))
                assert str(error.value).startswith(f"{path}: "), error.value
                assert key in str(error.value), (key, value, error.value)
                values += 1
            section[key] = before
    assert values > 400


def leaves(tree):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value)
        else:
            yield tree, key


def test_a_configuration_of_another_model_is_refused(tmp_path):
    """The shapes are the same, the number of heads is not. Weights that are saved here know their configuration."""
    folder = tiny.save(tmp_path / "model", tokenizer=None)
    config_files.write_config(folder / "config.json", dataclasses.replace(tiny.GENERATOR, num_heads=4))
    with pytest.raises(
        convert.WeightsError, match=r"config\.json is not the configuration that model\.safetensors was saved"
    ):
        load_numpy(folder, GeneratorConfig)
    config = json.loads(json.dumps(tiny.GENERATOR.to_published()))
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=1))  # same content, other layout
    assert_equal(load_numpy(folder, GeneratorConfig)[1], tiny.params(tiny.GENERATOR))


def test_a_published_architecture_with_another_configuration(tmp_path):
    """Without its configuration the file would be taken for the published model, which has the same tensors."""
    config, other = MaskgitVQGANConfig(), MaskgitVQGANConfig(resolution=128)
    tensors = {n: np.broadcast_to(np.float16(0), shape) for n, shape in known_models.published_shapes(config).items()}
    pretrained.write_weights(tmp_path / "a.safetensors", tensors, other)
    with pytest.raises(convert.WeightsError, match=r"a\.safetensors was saved with a configuration that is not beside it"):
        pretrained.load_config(tmp_path / "a.safetensors", MaskgitVQGANConfig)
    config_files.write_config(tmp_path / "a.json", other)
    assert pretrained.load_config(tmp_path / "a.safetensors", MaskgitVQGANConfig) == other


def test_models_and_what_they_cannot_take():
    vae = inference.Tokenizer(tiny.VAE, tiny.params(tiny.VAE))
    with pytest.raises(ValueError, match=r"latents are int32 \[1, 8\].*this tokenizer is a VAE, which has no token ids"):
        vae.decode(np.zeros((1, 8), np.int32))
    with pytest.raises(ValueError, match=r"images have shape \[1, 64, 64, 3\], expected \[batch, 32, 32, 3\].*resize"):
        vae.encode(np.zeros((1, 64, 64, 3), np.float32))
