"""The recipes: they have the published models and the published values, and the small ones can be built.

This file also tests that losses fall for the small single stage and the small generator of images; test_chain.py does so
for the others.
"""

import ast
import dataclasses
import importlib.util
import json
import pathlib
import re
import shlex

import jax
import pytest
import tiny_models as tiny
from ml_collections import ConfigDict

from titok_jax import compile as compiling
from titok_jax import train
from titok_jax.compiler import slices
from titok_jax.data.sources import make_source, parse_source
from titok_jax.models import GeneratorConfig, MaskgitVQGANConfig, TiTokConfig
from titok_jax.models.titok import transformer_size
from titok_jax.training import loop, same_run
from titok_jax.training.build import build_task
from titok_jax.training.recipes import read_config
from titok_jax.training.settings import parse_settings, read_ahead
from titok_jax.weights import convert, known_models, pretrained
from titok_jax.weights.perceptual_files import CONVNEXT_FILE

ROOT = pathlib.Path(__file__).parents[1]


def config(file: str, variant: str):
    return importlib.import_module(f"configs.{file}").get_config(variant)


PUBLISHED = known_models.known_configs()
TWO_STAGE = ("l32", "b64", "s128")
SINGLE_STAGE = ("bl64_vq8k", "bl128_vq8k", "sl256_vq8k", "ll32_vae", "bl64_vae", "bl128_vae")


@pytest.mark.parametrize(
    ("file", "variant"),
    [(f, v) for f in ("stage1", "stage2") for v in TWO_STAGE] + [("single_stage", v) for v in SINGLE_STAGE],
)
def test_tokenizers_are_the_published_ones(file, variant):
    fields = config(file, variant).model.to_dict()
    fields |= {tower: transformer_size(fields[tower]) for tower in ("encoder", "decoder")}
    expected = PUBLISHED["tokenizer", f"titok_{variant}"]
    # The published training of stage 2 has no commitment loss; a VAE has no codebook.
    free = {"finetune_decoder": file == "stage2"} if file != "single_stage" else {}
    if file == "stage2":
        free["commitment_cost"] = 0.0
    if expected.quantize_mode == "vae":
        free |= {name: fields[name] for name in ("codebook_size", "use_l2_norm", "commitment_cost")}
    assert TiTokConfig(**fields) == dataclasses.replace(expected, **free)


@pytest.mark.parametrize("variant", TWO_STAGE)
def test_generators_are_the_published_ones(variant):
    fields = config("generator", variant).model.to_dict()
    expected = PUBLISHED["generator", f"titok_{variant}"]
    sampling = dataclasses.replace(expected.sampling, **fields.pop("sampling"))
    assert GeneratorConfig(**fields, sampling=sampling) == expected


@pytest.mark.parametrize(
    ("file", "variant", "steps", "batch", "rate", "beta2", "decay", "warmup"),
    [
        ("stage1", "s128", 1_000_000, 256, 1e-4, 0.99, 1e-4, 10_000),
        ("stage2", "l32", 500_000, 256, 1e-4, 0.999, 1e-4, 5_000),
        ("single_stage", "bl64_vq8k", 1_000_000, 256, 1e-4, 0.999, 1e-4, 10_000),
        ("generator", "b64", 500_000, 2048, 2e-4, 0.96, 0.03, 10_000),
    ],
)
def test_optimizers_are_the_published_ones(file, variant, steps, batch, rate, beta2, decay, warmup):
    found = config(file, variant)
    assert (found.num_steps, found.data.batch_size, found.seed, found.ema_decay) == (steps, batch, 42, 0.999)
    for name in ("optimizer", "discriminator_optimizer"):
        if name in found:
            assert found[name].to_dict() == {
                "learning_rate": rate,
                "end_learning_rate": 1e-5,
                "mu_dtype": "float32",
                "schedule": "cosine",
                "warmup_steps": warmup,
                "beta1": 0.9,
                "beta2": beta2,
                "weight_decay": decay,
                "max_grad_norm": 1.0,
            }
    assert ("discriminator_optimizer" in found) == (file in ("stage2", "single_stage"))


@pytest.mark.parametrize(("variant", "size", "tokens"), [("l64_512", "large", 64), ("b128_512", "base", 128)])
def test_models_for_512_pixels(variant, size, tokens):
    for file in ("stage1", "stage2"):
        found = config(file, variant)
        fields = found.model.to_dict()
        assert (fields["encoder"], fields["num_latent_tokens"], fields["codebook_size"]) == (size, tokens, 4096)
        fields |= {tower: transformer_size(fields[tower]) for tower in ("encoder", "decoder")}
        assert TiTokConfig(**fields).grid_size == 32  # the grid of the MaskGIT-VQGAN's codes at 512 pixels
        assert found.data.transform.crop_size == found.data.eval_transform.size == fields["image_size"] == 512
        if file == "stage2":
            found.loss.perceptual, found.init_from = "none", "random"
        with pytest.raises(ValueError, match=r"set --config\.vqgan"):  # the one for 256 pixels is not the default
            build_task(parse_settings(found))
    assert config("generator", variant).model.num_tokens == tokens


def test_maskgit_vqgan_has_the_published_values():
    found = config("maskgit_vqgan", "imagenet256")
    assert MaskgitVQGANConfig(**found.model.to_dict()) == PUBLISHED["vqgan", "maskgit_vqgan"]
    assert (found.num_steps, found.data.batch_size, found.seed, found.ema_decay) == (1_000_000, 256, 42, 0.999)
    loss = found.loss
    assert (loss.discriminator_weight, loss.gradient_penalty, loss.perceptual_weight) == (0.1, 10.0, 0.1)
    assert (loss.entropy_weight, loss.entropy_temperature, loss.commitment_weight) == (0.1, 0.01, 0.25)
    assert (loss.discriminator_start, loss.lecam_weight) == (0, 0.0)
    for adam in (found.optimizer, found.discriminator_optimizer):
        assert (adam.learning_rate, adam.schedule, adam.beta1, adam.beta2) == (1e-4, "constant", 0.0, 0.99)
        assert (adam.weight_decay, adam.warmup_steps, adam.max_grad_norm) == (0.0, 0, float("inf"))
    large = config("maskgit_vqgan", "imagenet512")
    assert large.model.resolution == large.data.transform.crop_size == 512


@pytest.mark.parametrize("file", ["stage1", "stage2", "single_stage", "generator", "maskgit_vqgan"])
def test_small_recipes_can_be_built(file):
    task = build_task(parse_settings(config(file, "smoke")))
    assert task.networks
    with pytest.raises(ValueError, match="variant 'huge', expected one of"):
        config(file, "huge")


def test_stage2_says_what_it_needs():
    found = config("stage2", "smoke")
    found.init_from = ""
    with pytest.raises(ValueError, match=r"set --config.init_from to it"):
        build_task(parse_settings(found))
    found.init_from, found.loss.perceptual = "random", "convnext_s"
    with pytest.raises(
        FileNotFoundError, match=r"(?s)convnext_small-0c510722.pth.*download.pytorch.org.*perceptual_weights"
    ):
        build_task(parse_settings(found))


@pytest.mark.parametrize("file", ["stage1", "stage2"])
def test_a_random_vqgan_is_for_small_recipes(file):
    found = config(file, "l32")
    found.vqgan = found.init_from = "random"
    if file == "stage2":
        found.loss.perceptual = "none"
    with pytest.raises(ValueError, match=r"config\.vqgan: 'random' is for the smoke recipes"):
        build_task(parse_settings(found))


def test_remat_is_a_policy_or_as_in_older_recipes():
    for given, meant in (("dots", "dots"), ("True", "full"), ("False", "none")):
        assert parse_settings(read_config("generator:l32", [f"--config.remat={given}"])).remat == meant
    older = config("generator", "l32").to_dict()
    assert parse_settings(ConfigDict({**older, "remat": False})).remat == "none"
    with pytest.raises(ValueError, match=r"^config\.remat is 'maybe', expected 'none', 'dots' or 'full'$"):
        parse_settings(ConfigDict({**older, "remat": "maybe"}))


def test_the_form_of_the_layers_is_said_or_that_of_the_platform():
    for changes, meant in (([], None), (["--config.scan_layers=True"], True), (["--config.scan_layers=False"], False)):
        assert parse_settings(read_config("generator:l32", changes)).scan_layers is meant
    with pytest.raises(ValueError, match=r"^config\.scan_layers is 'on', expected 'auto', True or False$"):
        parse_settings(read_config("generator:l32", ["--config.scan_layers=on"]))


def test_what_a_training_keeps_of_an_image_is_what_the_documentation_says():
    """Two entries of the table, which benchmarks/memory.py makes."""
    spec = importlib.util.spec_from_file_location("memory", ROOT / "benchmarks/memory.py")
    memory = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(memory)
    text = (ROOT / "docs/performance.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+:\w+)` \| ([\d,]+ \| [\d,]+ \| [\d,]+) \|$", text, re.MULTILINE))
    assert list(rows) == memory.recipes()
    for recipe, column, remat in (("stage1:l32", 1, "dots"), ("generator:l32", 0, "none")):
        assert f"{memory.of_an_image(recipe, remat):,.0f}" == rows[recipe].split(" | ")[column]


def test_a_budget_too_small_for_the_workers_is_refused():
    config = read_config("stage1:l32", ["--config.vqgan=maskgit_vqgan"])
    assert config.data.read_ahead_mib == 1024
    config.data.read_ahead_mib = 60
    with pytest.raises(ValueError, match=r"^config\.data\.read_ahead_mib") as error:
        parse_settings(config, abstract=True)
    assert str(error.value) == (
        "config.data.read_ahead_mib is 60, expected at least 61, which is 320 examples of 192.0 KiB, the least for 16 "
        "workers with 16 threads each; or set fewer config.data.num_workers or config.data.num_threads"
    )
    config.data.num_threads = 15
    assert read_ahead(parse_settings(config, abstract=True), config.data.source) == 60 * 2**20 // (256 * 256 * 3 + 16)
    config.data.update({"num_workers": 0, "num_threads": 256})  # an evaluation has no workers
    config.data.read_ahead_mib = 2
    with pytest.raises(ValueError, match=r"expected at least 49, .* the least for 256 threads;"):
        parse_settings(config, abstract=True)


def test_tokens_are_small_examples():
    config = read_config("generator:l32", [])
    config.data.read_ahead_mib = 1  # also where the tokenizer, whose images are larger, is known
    for config.tokenizer in ("", "titok_l32"):
        assert read_ahead(parse_settings(config, abstract=True), config.data.source) == 2**20 // (32 * 4 + 16)


# A run may set these fields freely. The tables of docs/recipes.md hold all other fields of a recipe.
NOT_RECIPE = {
    "task", "init_from", "vqgan", "tokenizer", "perceptual_weights", "data.source", "data.eval_source",
    "data.num_workers", "data.num_threads", "data.read_ahead_mib", "remat", "scan_layers", "gradient_accumulation", "mesh",
    "log_every", "checkpoint_every", "keep_checkpoints", "eval_every", "eval_images", "max_nonfinite_steps", "preview_every",
    "preview_images", "preview_columns", "recipe", "log_grad_norms", "watchdog_minutes", "scale_with_batch",
    "compile_effort",
}  # fmt: skip
RECIPES = {
    "maskgit_vqgan": ("imagenet256", "imagenet512"),
    "stage1": (*TWO_STAGE, "l64_512", "b128_512"),
    "stage2": (*TWO_STAGE, "l64_512", "b128_512"),
    "single_stage": SINGLE_STAGE,
    "generator": tuple(v + i for v in (*TWO_STAGE, "l64_512", "b128_512") for i in ("", "_images")),
}


def documented(file: str) -> dict[str, dict]:
    """{variant: {field: value}} from a recipe's table in docs/recipes.md. A row that names variants overrides one that names
    none. Every row must state a source."""
    text = (ROOT / "docs/recipes.md").read_text()
    table = text.split(f"### configs/{file}.py\n")[1].split("\n#")[0]
    rows = re.findall(r"^\| `([\w.]+)`(?: \(([^)]*)\))? \| `([^`]*)` \| \S.* \|$", table, re.MULTILINE)
    assert len(rows) == sum(line.startswith("| `") for line in table.splitlines()), "a row of another form"
    values = {variant: {} for variant in RECIPES[file]}
    for general in (True, False):
        for name, variants, value in rows:
            if general == (not variants):
                for variant in variants.split(", ") if variants else RECIPES[file]:
                    values[variant][name] = float("inf") if value == "inf" else ast.literal_eval(value)
    return values


def leaves(section, prefix: str = "") -> dict:
    found = {}
    for name, value in section.items():
        if prefix + name in NOT_RECIPE or value is None:
            continue
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, ConfigDict | dict) else {prefix + name: value}
    return found


@pytest.mark.parametrize("file", RECIPES)
def test_recipes_are_what_the_documentation_says_field_by_field(file):
    for variant, expected in documented(file).items():
        assert leaves(config(file, variant)) == expected, variant


@pytest.mark.parametrize(
    ("file", "variant", "loss", "steps"),
    [
        ("single_stage", "smoke", "reconstruction_loss", 10),
        pytest.param("single_stage", "smoke_vae", "reconstruction_loss", 10, marks=pytest.mark.long),
        ("generator", "smoke", "loss", 60),
    ],
)
def test_the_loss_of_a_small_recipe_falls(file, variant, loss, steps, tmp_path):
    found = config(file, variant)
    found.update({"num_steps": steps, "log_every": 1, "preview_every": 0, "eval_every": 0})
    found.data.batch_size = 16
    found.optimizer.warmup_steps = 1
    if "discriminator" in found:
        found.loss.discriminator_start = 5
    loop.train(parse_settings(found), tmp_path)
    log = [json.loads(line)[loss] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sum(log[-(steps // 3) :]) < sum(log[: steps // 3]), log


@pytest.mark.parametrize(
    ("recipe", "then"),
    [
        ("stage1:l32", {"name": "random_resize_crop_flip", "resize_shorter_edge": 256, "crop_size": 256}),
        ("generator:b64_images", {"name": "center_crop_flip", "size": 256}),
        ("generator:l64_512_images", {"name": "center_crop_flip", "size": 512}),
    ],
)
def test_a_run_from_before_the_flags_of_augmentation_and_source_goes_on(recipe, then):
    def stored(*changes):
        return json.loads(read_config(recipe, changes).to_json()) | {"frozen_weights": "x"}

    old = stored()
    old["data"]["transform"] = then
    for name in ("image_key", "label_key", "skip_damaged"):
        del old["data"]["source"][name]
    for config in (stored(), old):
        assert same_run.changes(old, config, None) == []
    for change in ("transform.random_flip=False", "transform.resize_shorter_edge=600", "source.skip_damaged=True"):
        (line,) = same_run.changes(old, stored(f"--config.data.{change}"), None)
        assert line.startswith(f"data.{change.partition('=')[0]}: ")


def test_flags_choose_the_augmentation():
    flags = ("random_crop=False", "random_flip=False", "resize_shorter_edge=288")
    eval_flag = "--config.data.eval_transform.resize_shorter_edge=288"
    found = read_config("single_stage:bl64_vq8k", [*(f"--config.data.transform.{flag}" for flag in flags), eval_flag])
    data = parse_settings(found).data
    assert data.transform == {
        "name": "random_resize_crop_flip",
        "resize_shorter_edge": 288,
        "crop_size": 256,
        "random_crop": False,
        "random_flip": False,
    }
    assert data.eval_transform == {"name": "center_crop_torchvision", "size": 256, "resize_shorter_edge": 288}
    for name in ("transform", "eval_transform"):
        small = read_config("single_stage:bl64_vq8k", [f"--config.data.{name}.resize_shorter_edge=200"])
        with pytest.raises(ValueError, match=rf"data\.{name}\.(crop_)?size is 256, but resize_shorter_edge .* is 200"):
            parse_settings(small)


def start_of(folder, model: TiTokConfig):
    """A small single-stage recipe for `model` that begins from a folder -> the parameters it begins with."""
    found = config("single_stage", "smoke")
    found.model.update({name: getattr(model, name) for name in ("num_latent_tokens", "token_size", "codebook_size")})
    size = {name: getattr(model.encoder, name) for name in ("width", "num_layers", "num_heads")}
    found.model.update({"encoder": size, "decoder": size})
    found.loss.discriminator_weight = 0.0
    found.init_from = str(folder)
    return build_task(parse_settings(found)).start["tokenizer"]


def test_a_start_is_filled_as_far_as_it_fits_and_the_rest_is_listed(tmp_path, capsys):
    tiny.save(tmp_path / "model", tiny.TOKENIZER)
    given, model = tiny.params(tiny.TOKENIZER), dataclasses.replace(tiny.TOKENIZER, use_l2_norm=False)
    same = convert.flatten(start_of(tmp_path / "model", model))
    assert "100.0% of" in capsys.readouterr().out
    for path, array in convert.flatten(given).items():
        assert (same[path] == array).all(), path
    # With twice the tokens, the parameters that belong to single tokens are new; all others are filled.
    other = convert.flatten(start_of(tmp_path / "model", dataclasses.replace(model, num_latent_tokens=16)))
    out = capsys.readouterr().out
    new = {line.split()[1] for line in out.splitlines() if line.startswith("  new: ")}
    assert new == {path for path, array in convert.flatten(given).items() if other[path].shape != array.shape}
    assert "latent_tokens" in new
    assert "num_latent_tokens: 8 there, 16 here" in out
    for path, array in convert.flatten(given).items():
        assert path in new or (other[path] == array).all(), path
    wide = dataclasses.replace(model.encoder, width=64)
    with pytest.raises(ValueError, match=r"(?s)is another model.*encoder: .*width=32.* there, .*width=64"):
        start_of(tmp_path / "model", dataclasses.replace(model, encoder=wide, decoder=wide))


def small_network(file: str):
    """(recipe, name, network) of the small recipe, without its discriminator."""
    found = config(file, "smoke")
    if "discriminator_weight" in found.loss:
        found.loss.discriminator_weight = 0.0
    ((name, network),) = build_task(parse_settings(found)).networks.items()
    return found, name, network


@pytest.mark.parametrize("file", ["stage1", "stage2", "generator", "maskgit_vqgan"])
def test_every_training_begins_with_the_weights_that_are_given(file, tmp_path, capsys):
    found, name, network = small_network(file)
    # Two-stage models were published as they are after stage 2. Stage 1 may begin from those too.
    model = small_network("stage2")[2].config if file == "stage1" else network.config
    given = tiny.params(model)
    pretrained.save(tmp_path / "model", model, given)
    found.init_from = str(tmp_path / "model")
    task = build_task(parse_settings(found))
    out = capsys.readouterr().out
    assert "100.0% of" in out
    assert ("not used of it: pixel_decoder" in out) == (file == "stage1")
    state, given = jax.jit(task.begin)(jax.random.key(0), task.start), convert.flatten(given)
    for part in ("params", "ema"):
        started = convert.flatten(state[part][name])
        assert started.keys() == convert.flatten(network.abstract).keys()
        for path, array in started.items():
            assert (array == given[path]).all(), path
    if file == "maskgit_vqgan":
        found.model.hidden_channels = 64
        with pytest.raises(ValueError, match=r"(?s)is another model.*hidden_channels: 32 there, 64 here"):
            build_task(parse_settings(found))


def documented_commands(page: str) -> list[list[str]]:
    """The arguments after `python` of each command in the code blocks of a page of docs/."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    lines = (shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines())
    return [line[line.index("python") + 1 :] for line in lines if "python" in line]


@pytest.mark.parametrize("page", ["training.md", "tpu.md"])
def test_the_documented_commands_are_understood(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    trained, converted = 0, {output for tool, *_, output in documented_commands("training.md") if "convert" in tool}
    for first, *argv in documented_commands(page):
        if first == "tools/prepare_imagenet.py":
            spec = importlib.util.spec_from_file_location("prepare_imagenet", first)
            spec.loader.exec_module(tool := importlib.util.module_from_spec(spec))
            tool._parser().parse_args(argv)
        elif argv[0] == "titok_jax.compile":
            args, changes = compiling._parser().parse_known_args(argv[1:])
            assert args.slice in slices.SLICES
            read_config(args.config, changes)
        elif argv[0] == "titok_jax.train":
            args, changes = train._parser().parse_known_args(argv[1:])
            found = read_config(args.config, changes)
            # The published files of these networks need PyTorch, which a training machine may lack. So no such file is read.
            if found.get("vqgan", "random") != "random":
                assert found.vqgan.endswith(("/pretrained", ".safetensors")), found.vqgan
            if "loss" in found and found.loss.get("perceptual", "none") != "none":
                assert f"{found.perceptual_weights}/{CONVNEXT_FILE.stem}.safetensors" in converted
            source = found.data.source
            if source.name != "digits":  # its options are complete, and only its files are missing
                with pytest.raises(FileNotFoundError):
                    make_source(source)
            trained += 1
        elif argv[0] in ("titok_jax.sample", "titok_jax.evaluate", "titok_jax.pretokenize"):
            args = importlib.import_module(argv[0])._parser().parse_args(argv[1:])
            for data in filter(None, (getattr(args, "data", None), getattr(args, "reconstruct", None))):
                assert parse_source(data)["name"] in ("digits", "array_record")
    assert trained == {"training.md": 8, "tpu.md": 1}[page]
