"""Compares a tokenizer's results with published tokens, with given reconstructions and with the published PyTorch code."""

import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from titok_jax.data.transforms import to_uint8_truncate
from titok_jax.evaluation import metrics
from titok_jax.runtime.messages import near_path, shown

# The published run used a GPU with TF32 matrix products. If two codes are almost equally near, it may choose another one.
MAX_TOKENS_OFF = 2

# The published pictures were truncated to whole grey levels. An error of 1e-6 can change one by 1, and TF32 by more.
MAX_GREY_LEVELS = 3

# Difference from the published code in float32, relative to the largest magnitude. That code differs from its own float64
# results by up to 2.5e-5 in images of the legacy models, and by 1e-6 elsewhere.
TOLERANCE = 1e-4

# A token must be equal if its second best code is further away by more than this.
CLEAR_MARGIN = 1e-3

# The share of all tokens that may differ because of close calls.
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

# What the interpreter of the published code must be able to import. The first argument is the clone.
_IMPORTS = """
import sys

sys.path.insert(0, sys.argv[1])

import numpy as np
import torch

from modeling.titok import TiTok
"""

# Runs there after the imports and uses that code's layouts: images [B, 3, H, W], latents [B, C, 1, N].
_DRIVER = """
folder, inputs, outputs = sys.argv[2:]
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
    """A tokenizer's results for one image.

    Attributes:
      encoder_output: [N, C] float32, the input of the bottleneck (C is doubled for a VAE).
      tokens: [N] int32; for a VAE the mean [N, C] float32.
      margin: [N] float32, by how much the second best code is further away; None for a VAE.
      decoded_tokens: the tokens that were decoded, like `tokens`: the published ones if known, otherwise `tokens` itself.
      image: [H, W, 3] float32, the decoded image, not clamped.
    """

    encoder_output: np.ndarray
    tokens: np.ndarray
    margin: np.ndarray | None
    decoded_tokens: np.ndarray
    image: np.ndarray


def published_tokens(config) -> Mapping[str, Sequence[int]]:
    """{stem of the file name: published tokens} for a model with this configuration; empty if none are known."""
    from titok_jax.models.titok import TRANSFORMER_SIZES, TiTokConfig

    large = TRANSFORMER_SIZES["large"]
    return _TITOK_L32_TOKENS if config == TiTokConfig(encoder=large, decoder=large) else {}


def run(tokenizer, images: np.ndarray, known: Sequence[Sequence[int] | None]) -> list[Result]:
    """Encodes and decodes one image at a time.

    Args:
      tokenizer: from `titok_jax.load_tokenizer` or `load_vqgan`. A VQGAN's codes are in row-major order.
      images: [n, H, W, 3] uint8.
      known: for each image, tokens to decode instead of the encoded ones, or None.
    """
    import jax

    functions, has_tokens = tokenizer.functions, tokenizer.config.has_tokens

    @jax.jit
    def encode(params, image):
        z = functions.encoder_output(params, image)
        if not has_tokens:
            return z, functions.latents(params, image), None
        nearest = jax.lax.top_k(-functions.distances(params, z), 2)[0]
        return z, functions.quantize(params, z).tokens, nearest[..., 0] - nearest[..., 1]

    results = []
    for image, given in zip(images, known, strict=True):
        z, tokens, margin = jax.tree.map(np.asarray, encode(tokenizer.params, np.float32(image[None]) / 255.0))
        chosen = tokens if given is None else np.asarray(given, np.int32)[None]
        decoded = np.asarray(tokenizer.decode(chosen, clip=False))
        if has_tokens:  # a VQGAN's grid of codes row by row
            tokens, chosen, margin = (array.reshape(1, -1) for array in (tokens, chosen, margin))
            z = z.reshape(1, tokens.shape[1], -1)
        results.append(Result(z[0], tokens[0], None if margin is None else margin[0], chosen[0], decoded[0]))
    return results


def check_clone(clone: Path) -> None:
    """
    Raises:
      ValueError: if `--reference` is not a clone of the published repository.
    """
    if not (clone / "modeling" / "titok.py").is_file():
        raise ValueError(f"--reference {clone}: no clone of the published code, it holds no modeling/titok.py")


def reference_environment() -> dict[str, str]:
    """The environment for the published code's interpreter, without Python's settings, which are for this interpreter."""
    return {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


def check_imports(clone: Path, python: str) -> None:
    """Checks that an interpreter can import the published code, which takes seconds, before anything else is done.

    Raises:
      ValueError: if it cannot be run, or lacks a package.
    """
    arguments = [python, "-c", _IMPORTS, str(clone.resolve())]
    options = {"env": reference_environment(), "capture_output": True, "text": True, "errors": "replace", "check": False}
    try:
        finished = subprocess.run(arguments, **options)
    except OSError as error:
        meant = near_path(python) if isinstance(error, FileNotFoundError) else ""
        raise ValueError(f"--reference-python {python} cannot be run: {error.strerror}{meant}") from None
    if finished.returncode:
        said = (finished.stderr.strip() or f"status {finished.returncode}").splitlines()[-1]
        raise ValueError(
            f"{python} cannot import the published code in {clone} ({shown(said)}): install that repository's requirements "
            "there, torch among them, or name another interpreter with --reference-python"
        )


def run_reference(
    clone: Path, python: str, tokenizer, images: np.ndarray, results: Sequence[Result]
) -> list[dict[str, np.ndarray]]:
    """Runs the published code on the same images and the same weights, on the CPU in float32.

    The weights of `tokenizer` are written in the published format, and the published code reads them with `strict=True`. So
    this checks our export too.

    Args:
      clone: folder of the published repository; holds modeling/titok.py.
      python: an interpreter with the packages that the published code imports.
      images: [n, H, W, 3] uint8.
      results: our results. The published code decodes their `decoded_tokens`.

    Returns:
      for each image, in our layout: "encoder_output" [N, C], "tokens" [N] or [N, C], "image" [H, W, 3].

    Raises:
      ValueError: if the published code fails. The message ends with its output.
    """
    from titok_jax.weights import pretrained

    tokens = np.stack([result.decoded_tokens for result in results])
    tokens = tokens[:, None].astype(np.int64) if tokens.ndim == 2 else tokens.transpose(0, 2, 1)[:, :, None]
    with tempfile.TemporaryDirectory(prefix="titok_parity_") as folder:
        place = Path(folder)
        pretrained.save(place / "weights", tokenizer.config, tokenizer.params)
        (place / "driver.py").write_text(_IMPORTS + _DRIVER, encoding="utf-8")
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
    """Compares our tokens int [N] with the published ones."""
    off = int((ours != np.asarray(published)).sum())
    return Check(
        name, "published tokens", f"{off} of {ours.size} differ", f"at most {MAX_TOKENS_OFF}", off <= MAX_TOKENS_OFF
    )


def check_reconstruction(name: str, ours: np.ndarray, given: np.ndarray) -> Check:
    """Compares our float image [H, W, 3] with a picture uint8 [H, W, 3] of the published code, which truncates pixels."""
    ours = to_uint8_truncate(ours)
    difference = int(np.abs(ours.astype(int) - given).max())
    psnr = metrics.psnr(ours[None] / 255.0, given[None] / 255.0)[0]
    found = f"{difference} grey levels, PSNR {psnr:.1f} dB"
    return Check(name, "given reconstruction", found, f"at most {MAX_GREY_LEVELS}", difference <= MAX_GREY_LEVELS)


def check_reference(name: str, ours: Result, theirs: Mapping[str, np.ndarray]) -> list[Check]:
    """Compares one image's results with those of the published code."""
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
