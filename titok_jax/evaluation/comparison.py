"""Comparison of a tokenizer's results with published tokens, given reconstructions and the published PyTorch code."""

import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from titok_jax.data.transforms import to_uint8_truncate
from titok_jax.evaluation import metrics

# The published run was on a GPU with TF32 matrix products: where two codes are nearly as near, another may be chosen.
MAX_TOKENS_OFF = 2


# The published pictures were cut down to whole grey levels, which an error of 1e-6 can move by one, and TF32 by more.
MAX_GREY_LEVELS = 3


# Against the published code in float32, relative to the largest magnitude. It differs from its own float64 by up to 2.5e-5
# in images of the legacy models, by 1e-6 elsewhere.
TOLERANCE = 1e-4


# A token must be the same if its second best code is further away than this.
CLEAR_MARGIN = 1e-3


# Of all tokens, this share may differ in close calls.
CLOSE_CALLS = 0.005


_TITOK_L32_TOKENS = {
    "ILSVRC2012_val_00010240": (
        *(887, 3979, 349, 720, 2809, 2743, 2101, 603, 2205, 1508, 1891, 4015, 1317, 2956, 3774, 2296),
        *(484, 2612, 3472, 2330, 3140, 3113, 1056, 3779, 654, 2360, 1901, 2908, 2169, 953, 1326, 2598),
    ),
    "ILSVRC2012_val_00008636": (
        *(1255, 2603, 982, 2222, 643, 1426, 866, 4094, 296, 1422, 398, 764, 3670, 1265, 3986, 759),
        *(1039, 3962, 2373, 2337, 1372, 4050, 4012, 3644, 2624, 3735, 1539, 1289, 2817, 2985, 2550, 2972),
    ),
}


# Runs in the interpreter of the published code. Layouts are that code's: images [B, 3, H, W], latents [B, C, 1, N].
_DRIVER = """
import sys

clone, folder, inputs, outputs = sys.argv[1:]
sys.path.insert(0, clone)

import numpy as np
import torch

from modeling.titok import TiTok

data = np.load(inputs)
model = TiTok.from_pretrained(folder, strict=True)
model.eval()
results = {"encoder_output": [], "tokens": [], "image": []}
with torch.no_grad():
    for image, given in zip(data["images"], data["tokens"]):
        z = model.encoder(pixel_values=torch.from_numpy(image[None]), latent_tokens=model.latent_tokens)
        quantized = model.quantize(z)
        tokens = quantized[1]["min_encoding_indices"] if isinstance(quantized, tuple) else quantized.mean
        results["encoder_output"].append(z.numpy())
        results["tokens"].append(tokens.numpy())
        results["image"].append(model.decode_tokens(torch.from_numpy(given[None])).numpy())
np.savez(outputs, **{name: np.concatenate(arrays) for name, arrays in results.items()})
"""


class Check(NamedTuple):
    """One row of the table."""

    image: str
    what: str
    found: str
    bound: str
    passed: bool


class Result(NamedTuple):
    """What a tokenizer makes of one image.

    Attributes:
      encoder_output: [N, C] float32, what enters the bottleneck (C is doubled for a VAE).
      tokens: [N] int32; of a VAE the mean [N, C] float32.
      margin: [N] float32, by how much the second best code is further away; None for a VAE.
      decoded_tokens: what was decoded, as `tokens`: these, or the published ones where they are known.
      image: [H, W, 3] float32, the decoded image, not clamped.
    """

    encoder_output: np.ndarray
    tokens: np.ndarray
    margin: np.ndarray | None
    decoded_tokens: np.ndarray
    image: np.ndarray


def published_tokens(config) -> Mapping[str, Sequence[int]]:
    """{stem of the file's name: published tokens} for a model of this architecture; empty if none are known."""
    from titok_jax.models.titok import TRANSFORMER_SIZES, TiTokConfig

    large = TRANSFORMER_SIZES["large"]
    return _TITOK_L32_TOKENS if config == TiTokConfig(encoder=large, decoder=large) else {}


def run(tokenizer, images: np.ndarray, known: Sequence[Sequence[int] | None]) -> list[Result]:
    """Encodes and decodes one image at a time.

    Args:
      tokenizer: as `titok_jax.load_tokenizer` or `load_vqgan` gives it; the codes of a VQGAN are numbered row by row.
      images: [n, H, W, 3] uint8.
      known: for each image, tokens to decode instead of its own.
    """
    import jax
    from flax import nnx

    from titok_jax import models

    graphdef, _ = models.abstract(tokenizer.config)
    is_vqgan = isinstance(tokenizer.config, models.MaskgitVQGANConfig)
    discrete = is_vqgan or tokenizer.config.quantize_mode == "vq"
    grid = (images.shape[1] // tokenizer.config.downsampling, -1) if is_vqgan else ()

    @jax.jit
    def encode(params, images):
        model = nnx.merge(graphdef, params)
        z = model.encode(images)
        if not discrete:
            return z, models.titok.DiagonalGaussian.from_moments(z).mean, None
        if is_vqgan:
            z = z.reshape(z.shape[0], -1, z.shape[-1])
        nearest = jax.lax.top_k(-model.quantize.distances(z), 2)[0]
        tokens = model.quantize.codes(z) if is_vqgan else model.quantize(z).tokens
        return z, tokens, nearest[..., 0] - nearest[..., 1]

    @jax.jit
    def decode(params, tokens):
        model = nnx.merge(graphdef, params)
        if is_vqgan:
            return model.decode(model.quantize.lookup(tokens.reshape(len(tokens), *grid)))
        return model.decode_tokens(tokens) if discrete else model.decode(tokens)

    results = []
    for image, given in zip(images, known, strict=True):
        z, tokens, margin = jax.tree.map(np.asarray, encode(tokenizer.params, np.float32(image[None]) / 255.0))
        decoded_tokens = tokens if given is None else np.asarray(given, np.int32)[None]
        decoded = np.asarray(decode(tokenizer.params, decoded_tokens))
        results.append(Result(z[0], tokens[0], None if margin is None else margin[0], decoded_tokens[0], decoded[0]))
    return results


def check_clone(clone: Path) -> None:
    """
    Raises:
      ValueError: `--reference` names no clone of the published repository.
    """
    if not (clone / "modeling" / "titok.py").is_file():
        raise ValueError(f"--reference {clone}: no clone of the published code, it holds no modeling/titok.py")


def reference_environment() -> dict[str, str]:
    """The environment for the interpreter of the published code: Python's own settings are of this one, not of that one."""
    return {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


def run_reference(
    clone: Path, python: str, tokenizer, images: np.ndarray, results: Sequence[Result]
) -> list[dict[str, np.ndarray]]:
    """The published code on the same images and the same weights, on the CPU in float32.

    The weights are those that `tokenizer` holds, written in the published format and read there with `strict=True`: what we
    hand back is checked on the way.

    Args:
      clone: folder of the published repository; holds modeling/titok.py.
      python: an interpreter that has what the published code imports.
      images: [n, H, W, 3] uint8.
      results: ours; their `decoded_tokens` are what the published code decodes.

    Returns:
      for each image, in our layout: "encoder_output" [N, C], "tokens" [N] or [N, C], "image" [H, W, 3].

    Raises:
      ValueError: the published code did not run; the message ends with what it said.
    """
    from titok_jax.weights import pretrained

    tokens = np.stack([result.decoded_tokens for result in results])
    tokens = tokens[:, None].astype(np.int64) if tokens.ndim == 2 else tokens.transpose(0, 2, 1)[:, :, None]
    with tempfile.TemporaryDirectory(prefix="titok_parity_") as folder:
        place = Path(folder)
        pretrained.save(place / "weights", tokenizer.config, tokenizer.params)
        (place / "driver.py").write_text(_DRIVER, encoding="utf-8")
        pixels = np.ascontiguousarray((np.float32(images) / 255.0).transpose(0, 3, 1, 2))
        np.savez(place / "inputs.npz", images=pixels, tokens=np.ascontiguousarray(tokens))
        files = (place / name for name in ("driver.py", "weights", "inputs.npz", "outputs.npz"))
        driver, *paths = (str(file) for file in files)
        arguments = [python, driver, str(clone.resolve()), *paths]
        finished = subprocess.run(
            arguments, env=reference_environment(), capture_output=True, text=True, errors="replace", check=False
        )
        if finished.returncode or not (place / "outputs.npz").is_file():
            said = "\n  ".join((finished.stderr.strip() or "(nothing)").splitlines()[-15:])
            raise ValueError(
                f"the published code in {clone} did not run under {python} (status {finished.returncode}); it needs that "
                f"repository's requirements, torch among them. It said:\n  {said}"
            )
        with np.load(place / "outputs.npz") as file:
            outputs = dict(file)
    z, theirs = outputs["encoder_output"], outputs["tokens"]
    z = z[:, :, 0].transpose(0, 2, 1)
    theirs = theirs.reshape(len(theirs), -1) if theirs.dtype.kind in "iu" else theirs[:, :, 0].transpose(0, 2, 1)
    pictures = outputs["image"].transpose(0, 2, 3, 1)
    return [{"encoder_output": a, "tokens": b, "image": c} for a, b, c in zip(z, theirs, pictures, strict=True)]


def check_published_tokens(name: str, ours: np.ndarray, published: Sequence[int]) -> Check:
    """ours int [N] against published ones."""
    off = int((ours != np.asarray(published)).sum())
    return Check(
        name, "published tokens", f"{off} of {ours.size} differ", f"at most {MAX_TOKENS_OFF}", off <= MAX_TOKENS_OFF
    )


def check_reconstruction(name: str, ours: np.ndarray, given: np.ndarray) -> Check:
    """ours [H, W, 3] float against a picture uint8 [H, W, 3] of the published code, which truncates to grey levels."""
    ours = to_uint8_truncate(ours)
    difference = int(np.abs(ours.astype(int) - given).max())
    psnr = metrics.psnr(ours[None] / 255.0, given[None] / 255.0)[0]
    found = f"{difference} grey levels, PSNR {psnr:.1f} dB"
    return Check(name, "given reconstruction", found, f"at most {MAX_GREY_LEVELS}", difference <= MAX_GREY_LEVELS)


def check_reference(name: str, ours: Result, theirs: Mapping[str, np.ndarray]) -> list[Check]:
    """One image's results against those of the published code."""
    checks = [_check_array(name, "encoder output", ours.encoder_output, theirs["encoder_output"])]
    if ours.margin is None:
        checks.append(_check_array(name, "latents (mean)", ours.tokens, theirs["tokens"]))
    else:
        off = ours.tokens != theirs["tokens"]
        clear = int((off & (ours.margin > CLEAR_MARGIN)).sum())
        allowed = max(1, int(CLOSE_CALLS * off.size))
        found = f"{off.sum()} of {off.size} differ, {clear} clearly"
        checks.append(Check(name, "tokens", found, f"at most {allowed}, 0 clearly", not clear and off.sum() <= allowed))
    return [*checks, _check_array(name, "decoded image", ours.image, theirs["image"])]


def _check_array(name: str, what: str, ours: np.ndarray, theirs: np.ndarray) -> Check:
    if ours.shape != theirs.shape:
        return Check(name, what, f"shape {list(ours.shape)}", f"shape {list(theirs.shape)}", False)
    error = float(np.abs(ours.astype(np.float64) - theirs).max() / max(np.abs(theirs).max(), 1e-30))
    # Written so that NaN fails.
    return Check(name, what, f"{error:.1e} of the largest", f"{TOLERANCE:.0e}", bool(error <= TOLERANCE))


def table(checks: Sequence[Check]) -> str:
    """The checks as aligned text."""
    rows = [("image", "compared with", "difference", "bound", "")]
    rows += [(check.image, check.what, check.found, check.bound, "pass" if check.passed else "FAIL") for check in checks]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
