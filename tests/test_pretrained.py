"""Weights on disk: loading inverts saving exactly, errors are strict, and a model is complete or absent."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy
import tiny_models as tiny

from titok_jax import inference
from titok_jax.models import GeneratorConfig, MaskgitVQGANConfig, TiTokConfig
from titok_jax.runtime import outputs
from titok_jax.weights import convert, pretrained

STAGE_2 = dataclasses.replace(
    tiny.STAGE_1,
    finetune_decoder=True,
    pixel_decoder=MaskgitVQGANConfig(channel_mult=(1, 1, 1, 1), hidden_channels=32, num_res_blocks=1, z_channels=16),
)
UVIT = dataclasses.replace(tiny.GENERATOR, model_type="UViT", num_layers=4)
CONFIGS = {
    "vq": tiny.TOKENIZER,
    "vae": tiny.VAE,
    "stage_1": tiny.STAGE_1,
    "stage_2": STAGE_2,
    "vit": tiny.GENERATOR,
    "uvit": UVIT,
}


def assert_equal(a, b):
    a, b = convert.flatten(a), convert.flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype == np.float32, path
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def weights_of(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


@pytest.fixture
def saved(tmp_path):
    return tiny.save(tmp_path / "model", tiny.TOKENIZER)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_loading_is_the_inverse_of_saving(config, tmp_path):
    folder = tiny.save(tmp_path / "model", config, tokenizer=None)
    read_config, params = pretrained.load(folder, type(config))
    assert read_config == config
    assert_equal(params, tiny.params(config))
    # Saving what was loaded writes the same file, bit for bit.
    again = pretrained.save(tmp_path / "again", read_config, params)
    for name in ("config.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (again / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "model"]


def test_every_weight_counts(saved):
    """Each tensor of the file reaches the parameters once: there are as many numbers, and all are different."""
    weights = weights_of(saved)
    params = convert.flatten(pretrained.load(saved, TiTokConfig)[1])
    assert sum(w.size for w in weights.values()) == sum(p.size for p in params.values())
    numbered, start = {}, 0
    for name, weight in weights.items():
        numbered[name] = np.arange(start, start + weight.size, dtype=np.float32).reshape(weight.shape)
        start += weight.size
    safetensors.numpy.save_file(numbered, saved / "model.safetensors")
    params = convert.flatten(pretrained.load(saved, TiTokConfig)[1])
    values = np.concatenate([np.asarray(p).reshape(-1) for p in params.values()])
    np.testing.assert_array_equal(np.sort(values), np.arange(start))


def test_a_generator_brings_its_tokenizer(tmp_path):
    folder = tiny.save(tmp_path / "model")
    tokenizer, generator = inference.load_pair(folder)
    assert_equal(tokenizer.params, tiny.params(tiny.TOKENIZER, 1))
    assert_equal(generator.params, tiny.params(tiny.GENERATOR))
    assert inference.load_tokenizer(folder).config == tiny.TOKENIZER


def test_pairs_that_do_not_fit(tmp_path):
    alone = tiny.save(tmp_path / "alone", tokenizer=None)
    with pytest.raises(FileNotFoundError, match="holds no sub-folder tokenizer"):
        inference.load_pair(alone)
    other = dataclasses.replace(tiny.TOKENIZER, codebook_size=32)
    tiny.save(tmp_path / "other", other)
    tiny.save(tmp_path / "vae", tiny.VAE)
    with pytest.raises(ValueError, match="codebook size 32 against 64"):
        inference.load_pair(alone, tmp_path / "other")
    with pytest.raises(ValueError, match="is a VAE"):
        inference.load_pair(alone, tmp_path / "vae")


def test_all_differences_are_listed_at_once(saved):
    weights = weights_of(saved)
    del weights["encoder.ln_pre.weight"], weights["decoder.transformer.1.attn.in_proj_bias"]
    weights["decoder.extra"] = np.zeros((2, 3), np.float32)
    weights["latent_tokens"] = weights["latent_tokens"][:-1].copy()
    safetensors.numpy.save_file(weights, saved / "model.safetensors")
    with pytest.raises(convert.WeightsError) as error:
        pretrained.load(saved, TiTokConfig)
    message = str(error.value)
    assert message.startswith(f"{saved}/model.safetensors: 4 tensors do not fit the model:")
    for line in (
        "missing: encoder.ln_pre.weight [32]",
        "missing: decoder.transformer.1.attn.in_proj_bias [96]",
        "surplus: decoder.extra [2, 3]",
        "shape of latent_tokens: [7, 32], expected [8, 32]",
    ):
        assert line in message


def test_integers_are_no_weights(saved):
    weights = weights_of(saved)
    weights["latent_tokens"] = weights["latent_tokens"].astype(np.int32)
    safetensors.numpy.save_file(weights, saved / "model.safetensors")
    with pytest.raises(convert.WeightsError, match="latent_tokens has dtype int32, expected a floating-point type"):
        pretrained.load(saved, TiTokConfig)


@pytest.mark.parametrize("length", [0, 4, 100, -1, "garbage"])
def test_a_damaged_weights_file(saved, length):
    path = saved / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(b"\xff" * 1000 if length == "garbage" else data[:length])
    with pytest.raises(convert.WeightsError, match=r"model\.safetensors is not a whole safetensors file"):
        pretrained.load(saved, TiTokConfig)


def test_missing_files(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing is not a folder"):
        pretrained.load(tmp_path / "nothing", TiTokConfig)
    (saved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        pretrained.load(saved, TiTokConfig)
    (saved / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"is not a model folder: it holds no config\.json"):
        pretrained.load(saved, TiTokConfig)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model": ', "is not valid JSON"),
        ("\udcff", "is not valid JSON"),
        ("[1, 2]", "expected a JSON object, found list"),
        ("{}", "not a tokenizer configuration"),
        ('{"model": {"vq_model": {}}, "dataset": {"preprocessing": {"crop_size": 32}}}', "lacks .*num_latent_tokens"),
    ],
)
def test_a_damaged_config(saved, text, message):
    (saved / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(convert.WeightsError, match=f"config.json.*{message}"):
        pretrained.load(saved, TiTokConfig)


def test_unknown_and_bad_values_in_a_config(saved):
    config = json.loads((saved / "config.json").read_text())
    for key, value in (("new_option", 1), ("quantize_mode", "fsq"), ("vit_enc_model_size", "huge"), ("token_size", 5)):
        changed = {**config, "model": {"vq_model": {**config["model"]["vq_model"], key: value}}}
        (saved / "config.json").write_text(json.dumps(changed))
        with pytest.raises(convert.WeightsError, match=r"new_option|fsq|huge|is not the configuration"):
            pretrained.load(saved, TiTokConfig)


def test_one_kind_of_model_is_not_read_as_another(saved):
    with pytest.raises(convert.WeightsError, match=r"config\.json is the configuration of a tokenizer; a gen"):
        pretrained.load(saved, GeneratorConfig)


def test_references_in_a_config_are_resolved(tmp_path):
    folder = tiny.save(tmp_path / "model", tokenizer=None)
    config = json.loads((folder / "config.json").read_text())
    config["model"]["generator"]["image_seq_len"] = "${model.vq_model.num_latent_tokens}"
    (folder / "config.json").write_text(json.dumps(config))
    assert pretrained.load_config(folder, GeneratorConfig) == tiny.GENERATOR
    config["model"]["vq_model"]["num_latent_tokens"] = "${model.generator.image_seq_len}"  # now a circular reference
    for reference in (config["model"]["generator"]["image_seq_len"], "${model.nothing}", "${oc.env:HOME}", "${a"):
        config["model"]["generator"]["image_seq_len"] = reference
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(convert.WeightsError, match=r"config\.json: cannot resolve '\$\{"):
            pretrained.load_config(folder, GeneratorConfig)


def test_an_existing_folder_is_kept(tmp_path):
    folder = tiny.save(tmp_path / "model")
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    with pytest.raises(FileExistsError, match="exists"):
        pretrained.save(folder, tiny.TOKENIZER, tiny.params(tiny.TOKENIZER))
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before


def test_overwriting_replaces_all(tmp_path):
    folder = tiny.save(tmp_path / "model")
    pretrained.save(folder, tiny.TOKENIZER, tiny.params(tiny.TOKENIZER), overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert pretrained.load(folder, TiTokConfig)[0] == tiny.TOKENIZER
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_save_leaves_nothing_and_harms_nothing(tmp_path):
    bad = {**tiny.params(tiny.TOKENIZER), "unknown": np.zeros(3, np.float32)}
    with pytest.raises(convert.WeightsError, match="'unknown'"):
        pretrained.save(tmp_path / "model", tiny.TOKENIZER, bad)
    assert not list(tmp_path.iterdir())
    folder = tiny.save(tmp_path / "model", tiny.TOKENIZER)
    with pytest.raises(convert.WeightsError, match="'unknown'"):
        pretrained.save(folder, tiny.TOKENIZER, bad, overwrite=True)
    assert_equal(pretrained.load(folder, TiTokConfig)[1], tiny.params(tiny.TOKENIZER))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# Saves models one after the other, without end, and reports when the first is complete.
SAVER = """
import dataclasses, sys
import jax, numpy as np
from titok_jax import models
from titok_jax.weights import pretrained
import tiny_models as tiny

config = dataclasses.replace(tiny.TOKENIZER, codebook_size=200_000)  # a few MB, so that most of the time is in writing
shapes = models.abstract(config)[1]
params = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), shapes)
number = 0
while True:
    pretrained.save(f"{sys.argv[1]}/model_{number % 5}", config, params, overwrite=number >= 5)
    number += 1
    if number == 1:
        print("ready", flush=True)
"""


@pytest.mark.parametrize("delay", [0.013, 0.07])
def test_a_save_killed_at_any_time_leaves_no_half_folder(delay, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    try:
        assert process.stdout.readline() == b"ready\n"
        time.sleep(delay)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    for folder in tmp_path.glob("model_*"):
        config, _ = pretrained.load(folder, TiTokConfig, place=lambda path, array: array)
        assert config.codebook_size == 200_000
    assert list(tmp_path.glob("model_*"))


# For every n, a forked process kills itself in the n-th step of a save.
STEPWISE = """
import os, shutil, signal, sys
import tiny_models as tiny
from titok_jax.runtime import outputs

steps = 0

def killing(function, last):
    def step(*args, **kwargs):
        global steps
        steps += 1
        if steps == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return step

tiny.save(f"{sys.argv[1]}/original")
tiny.params(tiny.VAE)  # not in each fork anew
exchange, remove = outputs._renameat2, outputs._remove
for kind in ("new", "over", "no-exchange"):
    for last in range(1, 100):
        folder = f"{sys.argv[1]}/{kind}_{last}"
        if kind != "new":
            shutil.copytree(f"{sys.argv[1]}/original", folder)
        child = os.fork()
        if child == 0:
            os.fsync, os.rename = killing(os.fsync, last), killing(os.rename, last)
            outputs._remove = killing(remove, last)
            outputs._renameat2 = killing(exchange, last) if kind == "over" else lambda one, two, flag: False
            tiny.pretrained.save(folder, tiny.VAE, tiny.params(tiny.VAE), overwrite=kind != "new")
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            break
    print(kind, last - 1)
"""


def test_a_save_killed_in_each_of_its_steps_leaves_no_half_folder(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    arguments = [sys.executable, "-W", "ignore", "-c", STEPWISE, str(tmp_path)]
    result = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    # The steps: two files, one or two renames or an exchange, and the removal of what was replaced.
    assert result.stdout == "new 3\nover 4\nno-exchange 5\n", result.stderr
    for step in (1, 2, 3):
        assert not (tmp_path / f"new_{step}").exists()
    for name in ("new_4", "over_4", "over_5", "no-exchange_5", "no-exchange_6"):
        assert pretrained.load(tmp_path / name, TiTokConfig)[0] == tiny.VAE
    for name in ("over_1", "over_2", "over_3", "no-exchange_1", "no-exchange_2", "no-exchange_3"):
        assert inference.load_pair(tmp_path / name)[1].config == tiny.GENERATOR
    # Without an exchange, a kill between the two renames leaves the old folder beside the place.
    assert not (tmp_path / "no-exchange_4").exists()
    with pytest.raises(FileNotFoundError, match=r"a save was killed; what was there before is \S*/\.no-exchange_4\.old-"):
        pretrained.load(tmp_path / "no-exchange_4", TiTokConfig)

    # The next save removes leftovers of the killed one. An old folder comes back and is not overwritten without being asked.
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    with pytest.raises(FileExistsError, match="no-exchange_4 is back, which a killed process had moved aside"):
        pretrained.save(tmp_path / "no-exchange_4", tiny.VAE, tiny.params(tiny.VAE))
    assert inference.load_pair(tmp_path / "no-exchange_4")[1].config == tiny.GENERATOR
    for kind, last in (("new", 4), ("over", 5), ("no-exchange", 6)):
        for step in range(1, last + 1):
            pretrained.save(tmp_path / f"{kind}_{step}", tiny.VAE, tiny.params(tiny.VAE), overwrite=True)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_writer_at_work_is_not_disturbed(tmp_path):
    options = {"files": "a", "replace": True}
    with outputs.new_folder(tmp_path / "model", **options) as first:
        (first / "a").write_text("first")
        with outputs.new_folder(tmp_path / "model", **options) as second:
            (second / "a").write_text("second")
        assert (first / "a").read_text() == "first"
    assert (tmp_path / "model" / "a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_with_other_files_is_not_replaced(tmp_path):
    folder = tiny.save(tmp_path / "model", tiny.TOKENIZER)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        pretrained.save(folder, tiny.TOKENIZER, tiny.params(tiny.TOKENIZER), overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()
    pretrained.save(folder, tiny.TOKENIZER, tiny.params(tiny.TOKENIZER), overwrite=True)
