"""What follows another batch size, and the table of docs/tpu.md, which the same function makes."""

import json
import math
import pathlib

import pytest

from titok_jax.training import loop, same_run
from titok_jax.training.batch_scaling import scale_with_batch
from titok_jax.training.recipes import read_config
from titok_jax.training.settings import parse_settings

ROOT = pathlib.Path(__file__).parents[1]
SCALED = "--config.scale_with_batch=True"
TABLE = "<!-- the table that tests/test_batch_scaling.py compares -->"
RECIPES = {
    "stage1": ("l32", "b64", "s128", "l64_512", "b128_512"),
    "stage2": ("l32", "b64", "s128", "l64_512", "b128_512"),
    "single_stage": ("bl64_vq8k", "bl128_vq8k", "sl256_vq8k", "ll32_vae", "bl64_vae", "bl128_vae"),
    "maskgit_vqgan": ("imagenet256", "imagenet512"),
    "generator": ("l32", "b64", "s128", "l64_512", "b128_512", "l32_images"),
}


def scaled(recipe: str, batch: int, *changes: str):
    return read_config(recipe, [SCALED, f"--config.data.batch_size={batch}", *changes])


def test_what_is_scaled_and_by_which_rule():
    plain, config = read_config("single_stage:bl64_vq8k", []), scaled("single_stage:bl64_vq8k", 2048)
    for optimizer, before in (
        (config.optimizer, plain.optimizer),
        (config.discriminator_optimizer, plain.discriminator_optimizer),
    ):
        assert optimizer.learning_rate == pytest.approx(before.learning_rate * math.sqrt(8), rel=1e-8)
        assert optimizer.end_learning_rate == pytest.approx(before.end_learning_rate * math.sqrt(8), rel=1e-8)
        assert optimizer.warmup_steps == before.warmup_steps / 8 == 1250
        assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (
            before.beta1,
            before.beta2,
            before.weight_decay,
        )
    assert (config.num_steps, config.loss.discriminator_start) == (125_000, 25_000)
    assert config.ema_decay == config.loss.lecam_decay == pytest.approx(0.999**8, abs=1e-9)
    assert config.checkpoint_every == plain.checkpoint_every
    small = scaled("generator:l32", 256)  # smaller than the recipe's
    assert small.num_steps == 4_000_000
    assert small.optimizer.learning_rate == pytest.approx(2e-4 / math.sqrt(8), rel=1e-8)
    assert small.ema_decay == pytest.approx(0.999 ** (1 / 8), abs=1e-9)
    assert scaled("maskgit_vqgan:imagenet256", 300).optimizer.warmup_steps == 0  # none stays none
    assert scaled("digits:smoke_tokenizer", 32 * 1000).optimizer.warmup_steps == 1  # and some stays some


def test_nothing_is_scaled_unless_asked_for():
    for changes in (["--config.data.batch_size=1024"], [SCALED]):
        config = read_config("stage1:l32", changes)
        assert config.optimizer == read_config("stage1:l32", []).optimizer
        assert "scaled" not in config.recipe
    own = read_config("stage1:l32", [SCALED]).unlock()
    del own["recipe"]
    with pytest.raises(ValueError, match=r"config\.scale_with_batch is set, but the recipe does not say which batch size"):
        scale_with_batch(own)


def test_what_is_given_stays_and_nothing_is_scaled_twice():
    config = scaled("stage2:l32", 1024, "--config.optimizer.learning_rate=3e-4", "--config.num_steps=7")
    assert (config.optimizer.learning_rate, config.num_steps) == (3e-4, 7)
    assert "  num_steps 7 stays, as given" in config.recipe.scaled
    settings = parse_settings(config, abstract=True)
    # What does not fit the batch is warned of, as without scaling.
    assert sorted(loop.off_recipe(settings.given, settings.recipe)) == [
        "num_steps is 7, the recipe has 125000",
        "optimizer.learning_rate is 0.0003, the recipe has 0.0002",
    ]
    again = config.copy_and_resolve_references()
    scale_with_batch(again)
    assert again == config
    assert not any("scaled" in text for text in (settings.text.replace("scale_with_batch", ""), json.dumps(settings.given)))


def test_a_resumed_run_compares_what_scaling_gave():
    def settings(*changes: str):
        return parse_settings(read_config("digits:tokenizer", changes))

    def differ(a, b) -> list[str]:
        stored = {same_run.FROZEN: "0" * 64, same_run.CONTENTS: {}, same_run.CLASSES: []}
        return same_run.changes({**a.given, **stored}, {**b.given, **stored}, b)

    batch = "--config.data.batch_size=512"
    run = settings(batch, SCALED)
    assert not differ(run, settings(batch, SCALED))
    values = {"num_steps": 625, "ema_decay": run.ema_decay, "optimizer.warmup_steps": 50}
    values |= {"optimizer.learning_rate": 2e-3, "optimizer.end_learning_rate": 2e-5}
    by_hand = settings(batch, *(f"--config.{name}={value!r}" for name, value in values.items()))
    assert not differ(run, by_hand)
    assert {line.partition(":")[0] for line in differ(run, settings(batch))} == values.keys()


def test_a_run_prints_what_was_scaled(tmp_path, capsys):
    changes = ["--config.data.batch_size=128", SCALED, "--config.eval_every=0", "--config.preview_every=0"]
    loop.prepare(parse_settings(read_config("digits:smoke_tokenizer", changes)), tmp_path)
    printed = capsys.readouterr().out
    assert "Scaled from a batch of 32 to 128 (config.scale_with_batch):\n  num_steps 30 -> 8\n" in printed
    assert "  optimizer.learning_rate 0.001 -> 0.002\n" in printed
    assert "WARNING" not in printed


def rows() -> list[str]:
    lines = ["| recipe | chips | batch | steps | learning rate | warm-up | averages' decay | discriminator from |"]
    lines.append("|---|--:|--:|--:|--:|--:|--:|--:|")
    for recipe, (variant, *_) in RECIPES.items():
        published = read_config(f"{recipe}:{variant}", []).data.batch_size
        for chips in (64, 128, 256, 512, 1024):
            config = scaled(f"{recipe}:{variant}", published * chips // 64)
            start = f"{config.loss.discriminator_start:,}" if "discriminator" in config else ""
            cells = [
                f"`{recipe}`",
                "up to 64" if chips == 64 else chips,
                f"{config.data.batch_size:,}",
                f"{config.num_steps:,}",
            ]
            cells += [
                f"{config.optimizer.learning_rate:.3g}",
                f"{config.optimizer.warmup_steps:,}",
                f"{config.ema_decay:.5f}",
            ]
            lines.append(f"| {' | '.join(map(str, [*cells, start]))} |")
    return lines


def test_the_table_of_the_documentation_is_what_scaling_gives():
    for recipe, variants in RECIPES.items():  # one row is for all of them
        configs = [scaled(f"{recipe}:{variant}", 4096) for variant in variants]
        assert len({config.recipe.scaled for config in configs}) == 1
    table = (ROOT / "docs/tpu.md").read_text().split(f"{TABLE}\n\n")[1].split("\n\n")[0]
    assert table.splitlines() == rows(), "write this into docs/tpu.md:\n" + "\n".join(rows())
