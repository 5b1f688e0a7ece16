"""`python -m titok_jax.parity` from end to end. Tiny models replace the published ones. Small numpy code replaces the clone
of the published code; it reads the published names and layouts by itself."""

import math
import sys
from pathlib import Path

import golden_data as gd
import numpy as np
import pytest
import tiny_models as tiny
from PIL import Image

from titok_jax import inference, parity
from titok_jax.data.transforms import to_uint8_truncate
from titok_jax.evaluation import comparison
from titok_jax.models import TiTokConfig
from titok_jax.weights import config_files

STEM = "ILSVRC2012_val_00010240"

# The driver uses only this of torch: arrays with a method `numpy`.
TORCH = """
import contextlib
import numpy as np

class Tensor(np.ndarray):
    def numpy(self):
        return np.asarray(self)

def from_numpy(array):
    return array.view(Tensor)

no_grad = contextlib.nullcontext
"""
TITOK = """
import json
import math
import pathlib
from types import SimpleNamespace

import numpy as np
import safetensors.numpy
from torch import Tensor

ERROR = 0.0

def norm(x, w, name):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w[name + ".weight"] + w[name + ".bias"]

def linear(x, w, name):
    weight = w[name + ".weight"]
    return x @ weight.reshape(weight.shape[0], -1).T + w[name + ".bias"]

def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)

def transformer(x, w, tower, heads):
    x = norm(x, w, tower + ".ln_pre")
    for i in range(2):
        block = f"{tower}.transformer.{i}."
        y = norm(x, w, block + "ln_1") @ w[block + "attn.in_proj_weight"].T + w[block + "attn.in_proj_bias"]
        b, length, d = x.shape
        q, k, v = y.reshape(b, length, 3, heads, d // heads).transpose(2, 0, 3, 1, 4)
        y = softmax(q @ k.swapaxes(2, 3) / math.sqrt(d // heads)) @ v
        x = x + linear(y.swapaxes(1, 2).reshape(b, length, d), w, block + "attn.out_proj")
        y = linear(norm(x, w, block + "ln_2"), w, block + "mlp.c_fc")
        y = 0.5 * y * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
        x = x + linear(y, w, block + "mlp.c_proj")
    return norm(x, w, tower + ".ln_post")

class TiTok:
    @classmethod
    def from_pretrained(cls, folder, *, strict):
        assert strict
        model = cls()
        model.weights = safetensors.numpy.load_file(pathlib.Path(folder) / "model.safetensors")
        model.config = json.loads((pathlib.Path(folder) / "config.json").read_text())
        model.latent_tokens = model.weights["latent_tokens"]
        return model

    def eval(self):
        return self

    def encoder(self, pixel_values, latent_tokens):
        w, x = self.weights, pixel_values
        b, _, height, width = x.shape
        x = x.reshape(b, 3, height // 8, 8, width // 8, 8).transpose(0, 2, 4, 1, 3, 5).reshape(b, -1, 3 * 8 * 8)
        x = linear(x, w, "encoder.patch_embed")
        x = np.concatenate([np.repeat(w["encoder.class_embedding"][None], b, 0), x], 1) + w["encoder.positional_embedding"]
        latents = latent_tokens + w["encoder.latent_token_positional_embedding"]
        x = transformer(np.concatenate([x, np.repeat(latents[None], b, 0)], 1), w, "encoder", 2)
        x = linear(x[:, -len(latents):], w, "encoder.conv_out") + ERROR
        return x.swapaxes(1, 2)[:, :, None].astype(np.float32).view(Tensor)

    def quantize(self, z):
        if "quantize.embedding.weight" not in self.weights:
            return SimpleNamespace(mean=z[:, : z.shape[1] // 2])
        codebook = self.codebook()
        z = z[:, :, 0].swapaxes(1, 2)
        z = z / np.linalg.norm(z, axis=-1, keepdims=True)
        distances = ((z[:, :, None] - codebook) ** 2).sum(-1)
        return z, {"min_encoding_indices": distances.argmin(-1)[:, None].view(Tensor)}

    def codebook(self):
        codebook = self.weights["quantize.embedding.weight"]
        return codebook / np.linalg.norm(codebook, axis=-1, keepdims=True)

    def decode_tokens(self, tokens):
        w, tokens = self.weights, np.asarray(tokens)
        z = self.codebook()[tokens[:, 0]] if tokens.ndim == 3 else tokens[:, :, 0].swapaxes(1, 2)
        b, side = len(z), 4
        x = np.concatenate([w["decoder.class_embedding"][None], np.repeat(w["decoder.mask_token"], side * side, 1)], 1)
        x = np.repeat(x + w["decoder.positional_embedding"], b, 0)
        latents = linear(z, w, "decoder.decoder_embed") + w["decoder.latent_token_positional_embedding"]
        x = transformer(np.concatenate([x, latents], 1), w, "decoder", 2)[:, 1 : 1 + side * side]
        x = linear(x, w, "decoder.ffn.0").reshape(b, side, side, 8, 8, 3)
        x = x.transpose(0, 5, 1, 3, 2, 4).reshape(b, 3, 8 * side, 8 * side)
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        n, kernel = 8 * side, w["decoder.conv_out.weight"]
        y = sum(
            np.einsum("bchw,oc->bohw", padded[:, :, i : i + n, j : j + n], kernel[:, :, i, j])
            for i in range(3)
            for j in range(3)
        )
        return (y + w["decoder.conv_out.bias"][:, None, None]).astype(np.float32).view(Tensor)
"""


def make_clone(folder: Path, *, error: float = 0.0, titok: str = TITOK) -> str:
    (folder / "modeling").mkdir(parents=True)
    (folder / "torch.py").write_text(TORCH)
    (folder / "modeling" / "titok.py").write_text(titok.replace("ERROR = 0.0", f"ERROR = {error}"))
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: str(tiny.save(folder / name, getattr(tiny, name))) for name in ("TOKENIZER", "VAE", "STAGE_1")}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two pictures of the tiny models' size. The first is named like a picture whose tokens are published."""
    folder, paths = tmp_path_factory.mktemp("images"), []
    for name, pixels in zip((f"{STEM}.png", "other.png"), gd.images(2, 32, 0), strict=True):
        Image.fromarray(np.round(pixels * 255).astype(np.uint8)).save(folder / name)
        paths.append(str(folder / name))
    return paths


def read(path) -> np.ndarray:
    return np.asarray(Image.open(path))[None]


def know(monkeypatch, tokens) -> None:
    monkeypatch.setattr(parity, "published_tokens", lambda config: {STEM: tokens})


def test_published_tokens_and_reconstruction(models, images, monkeypatch, capsys, tmp_path):
    """Where published tokens are known, they are compared, and they are decoded instead of our own."""
    tokenizer = inference.load_tokenizer(models["TOKENIZER"])
    tokens = np.asarray(tokenizer.encode(read(images[0])))[0]
    wrong = np.where(np.arange(8) < 2, (tokens + 1) % 64, tokens)
    know(monkeypatch, wrong.tolist())
    pictures = []
    for name, ids in (("first.png", wrong[None]), ("second.png", np.asarray(tokenizer.encode(read(images[1]))))):
        pictures.append(str(tmp_path / name))
        Image.fromarray(to_uint8_truncate(np.asarray(tokenizer.decode(ids)))[0]).save(pictures[-1])
    arguments = ["--model", models["TOKENIZER"], *images]
    arguments += [a for picture in pictures for a in ("--reconstruction", picture)]

    assert parity.main(arguments) == 0
    out = capsys.readouterr().out
    assert "on cpu" in out
    assert "float32, precision highest" in out
    row = next(line for line in out.splitlines() if "published tokens" in line)
    assert " ".join(row.split()) == f"{STEM}.png published tokens 2 of 8 differ at most 2 pass"
    assert sum("given reconstruction" in line for line in out.splitlines()) == 2
    assert "pass: all 3 within bounds" in out

    # One more wrong token is too many. So is a picture that is off by 4 levels in one place.
    know(monkeypatch, np.where(np.arange(8) < 3, (tokens + 1) % 64, tokens).tolist())
    assert parity.main(arguments[:3]) == 1
    assert "3 of 8 differ" in capsys.readouterr().out
    know(monkeypatch, wrong.tolist())
    spoiled = np.asarray(Image.open(pictures[1])).copy()
    spoiled[5, 5, 1] += 4 if spoiled[5, 5, 1] < 128 else -4
    Image.fromarray(spoiled).save(pictures[1])
    assert parity.main(arguments) == 1
    out = capsys.readouterr().out
    psnr = 10 * math.log10(255**2 / (4**2 / spoiled.size))
    assert "4 grey levels, PSNR" in out
    assert f"PSNR {psnr:.1f} dB" in out
    assert "FAIL: 1 of 3 out of bounds" in out


@pytest.mark.parametrize("name", ["TOKENIZER", "VAE"])
def test_reference(name, models, images, capsys, tmp_path):
    """The stand-in for the published code gives our numbers. With a small error in its encoder it does not."""
    arguments = ["--model", models[name], *images, "--reference"]
    assert parity.main([*arguments, make_clone(tmp_path / "clone"), "--reference-python", sys.executable]) == 0
    out = capsys.readouterr().out
    assert sum(line.endswith("pass") for line in out.splitlines()) == 6
    for what in ("encoder output", "decoded image", "tokens" if name == "TOKENIZER" else "latents (mean)"):
        assert sum(what in line for line in out.splitlines()) == 2, what
    assert parity.main([*arguments, make_clone(tmp_path / "wrong", error=0.01)]) == 1
    out = capsys.readouterr().out
    assert [line.split()[1:3] for line in out.splitlines() if line.endswith("FAIL")].count(["encoder", "output"]) == 2


def test_reference_that_does_not_run(models, images, capsys, tmp_path, monkeypatch):
    arguments = ["--model", models["TOKENIZER"], *images, "--reference"]
    failing = make_clone(tmp_path / "failing", titok="class TiTok:\n    from_pretrained = None\n")
    assert parity.main([*arguments, failing]) == 2
    error = capsys.readouterr().err
    assert f"the published code in {failing} did not run under {sys.executable} (status 1)" in error
    assert "'NoneType' object is not callable" in error

    def load(*args, **kwargs):
        raise AssertionError("work was done")

    # What can be known of the other interpreter is known first.
    monkeypatch.setattr(inference, "load_image_model", load)
    monkeypatch.setattr(parity, "ImageFiles", load)
    broken = make_clone(tmp_path / "broken", titok="raise ImportError('no module named einops')")
    assert parity.main([*arguments, broken]) == 2
    assert capsys.readouterr().err == (
        f"error: {sys.executable} cannot import the published code in {broken} (ImportError: no module named einops): "
        "install that repository's requirements there, torch among them, or name another interpreter with "
        "--reference-python\n"
    )
    (tmp_path / "python3").touch()
    for name, message in (
        ("python", f"No such file or directory; did you mean {tmp_path}/python3?"),
        ("python3", "Permission denied"),
    ):
        assert parity.main([*arguments, broken, "--reference-python", str(tmp_path / name)]) == 2
        assert capsys.readouterr().err == f"error: --reference-python {tmp_path / name} cannot be run: {message}\n"


def test_close_calls_may_fall_either_way():
    """A token may differ from the reference's if its choice is close, but only few may; a clear choice never may."""
    z, image = np.ones((400, 4), np.float32), np.ones((8, 8, 3), np.float32)
    margin = np.full(400, 1.0, np.float32)
    margin[:5] = 1e-4

    def tokens_pass(wrong):
        tokens = np.zeros(400, np.int32)
        theirs = {"encoder_output": z, "image": image, "tokens": np.where(np.isin(np.arange(400), wrong), 1, 0)}
        return comparison.check_reference("x", comparison.Result(z, tokens, margin, tokens, image), theirs)[1].passed

    assert tokens_pass([])
    assert tokens_pass([0, 1])
    assert not tokens_pass([0, 1, 2])
    assert not tokens_pass([7])


def test_not_a_number_fails():
    nan = np.full((4, 2), np.nan, np.float32)
    checks = comparison.check_reference(
        "x", comparison.Result(nan, nan, None, nan, nan), {"encoder_output": nan, "tokens": nan[:3], "image": nan + 1}
    )
    assert [check.passed for check in checks] == [False] * 3


@pytest.mark.parametrize("precision", ["highest", "default"])
def test_precision(precision, models, images, monkeypatch):
    seen = []
    real = comparison.run

    def spy(tokenizer, *args):
        seen.append(tokenizer.functions.precision)
        return real(tokenizer, *args)

    monkeypatch.setattr(parity, "run", spy)
    know(monkeypatch, range(8))
    parity.main(["--model", models["TOKENIZER"], images[0], *(["--precision", precision] if precision != "highest" else [])])
    assert seen == [precision]


def test_what_cannot_be_compared_is_refused_before_weights_are_read(models, images, monkeypatch, capsys, tmp_path):
    def load(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(inference, "load_tokenizer", load)
    small = tmp_path / "small.png"
    Image.new("RGB", (16, 16)).save(small)
    large = tmp_path / f"{STEM}.png"
    Image.new("RGB", (64, 64)).save(large)
    model = ["--model", models["TOKENIZER"]]
    know(monkeypatch, range(8))
    for arguments, message in (
        ([*model, images[1]], "nothing to compare with"),
        ([*model, str(large)], "nothing to compare with"),  # its tokens are of another crop
        ([*model, images[0], "--reference", str(tmp_path)], "no clone of the published code"),
        ([*model, images[0], "--reference-python", "python"], "without --reference"),
        ([*model, *images, "--reconstruction", images[0]], "1 reconstructions for 2 images"),
        ([*model, images[0], "--reconstruction", str(small)], "16 x 16 pixels, expected 32 x 32"),
        ([*model, str(tmp_path / "absent.png")], "no such file"),
        (["--model", models["STAGE_1"], images[0]], "stage 1"),
        (["--model", "titok_nonsense", images[0]], "titok_nonsense"),
    ):
        assert parity.main(arguments) == 2, arguments
        assert message in capsys.readouterr().err


def test_the_published_tokens_are_those_of_titok_l32():
    published = config_files.resolve_interpolations(gd.load_json("configs/tokenizer_titok_l32.json"), source="l32")
    tokens = comparison.published_tokens(TiTokConfig.from_published(published))
    assert set(tokens) == {"ILSVRC2012_val_00010240", "ILSVRC2012_val_00008636"}
    for ids in tokens.values():
        assert len(ids) == 32
        assert all(0 <= i < 4096 for i in ids)
    for name in ("tokenizer_titok_b64", "tokenizer_titok_bl64_vq8k", "tokenizer_titok_ll32_vae_c16"):
        published = config_files.resolve_interpolations(gd.load_json(f"configs/{name}.json"), source=name)
        assert not comparison.published_tokens(TiTokConfig.from_published(published))
