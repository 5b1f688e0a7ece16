"""Runs the commands of docs/training.md that lead from images to a generator's samples, one after the other.

Trainings run with fewer steps, a shorter warm-up and smaller batches; nothing else is changed. Every training's loss falls.
"""

import json
import pathlib
import re

import command_lines
import numpy as np
from PIL import Image

from titok_jax.data.sources import make_source
from titok_jax.models import MaskgitVQGANConfig, TiTokConfig
from titok_jax.weights import pretrained

ROOT = pathlib.Path(__file__).parents[1]
SECTION = "## The whole chain, small"
SHORTER = (
    " --config.num_steps=10 --config.data.batch_size=16 --config.preview_every=0 --config.eval_every=0"
    " --config.log_every=1 --config.optimizer.warmup_steps=1"
)
# The loss that each training must lower, apart from the terms that depend on other networks in training.
LOSSES = {"vqgan": "reconstruction_loss", "stage1": "total_loss", "stage2": "reconstruction_loss", "generator": "loss"}


def test_each_output_is_the_next_ones_input(tmp_path):
    (block,) = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/training.md").read_text().split(SECTION)[1], re.DOTALL)
    lines = []
    for line in block.replace("\\\n", "").splitlines():
        short = {"train": SHORTER, "sample": " --steps 2"}.get(line.split()[2].removeprefix("titok_jax."), "")
        if "stage2.py" in line:
            short += " --config.loss.discriminator_start=5"
        lines.append(line + short)
    output = {
        line.split(":")[0].split()[-1]: text for line, text in zip(lines, command_lines.run(lines, tmp_path), strict=True)
    }

    chain = tmp_path / "runs/chain"
    for run, name in LOSSES.items():
        log = [json.loads(line)[name] for line in (chain / run / "metrics.jsonl").read_text().splitlines()]
        assert len(log) == 10
        assert sum(log[7:]) < sum(log[:3]), f"{run}: {log}"
    vqgan = pretrained.load(chain / "vqgan/pretrained", MaskgitVQGANConfig)[1]
    stage1 = pretrained.load(chain / "stage1/pretrained", TiTokConfig)[1]
    config, stage2 = pretrained.load(chain / "stage2/pretrained", TiTokConfig)
    # Stage 2 began with stage 1's encoder, which it keeps fixed, and with the VQGAN's codes, which it trains.
    for part in ("encoder", "latent_tokens", "quantize"):
        for a, b in zip(*map(_leaves, (stage1[part], stage2[part])), strict=True):
            np.testing.assert_array_equal(a, b)
    difference = np.abs(stage2["pixel_quantize"]["embedding"] - vqgan["quantize"]["embedding"]).max()
    assert 0 < difference < 1e-2
    assert "discriminator: new" in output["configs/stage2.py"]
    tokens = make_source({"name": "tokens", "paths": str(chain / "tokens/*.array_record")})
    assert len(tokens) == 1437
    assert tokens[0]["tokens"].shape == (config.num_latent_tokens,)
    with Image.open(chain / "samples.png") as picture:
        assert min(picture.size) > 4 * 32
        assert np.asarray(picture).std() > 0


def _leaves(tree) -> list:
    return [leaf for child in tree.values() for leaf in _leaves(child)] if isinstance(tree, dict) else [tree]
