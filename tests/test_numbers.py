"""Absurd numbers: every numeric flag of every command refuses them in one line, before memory or minutes are spent."""

import argparse
import copy
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny
from ml_collections import ConfigDict

from titok_jax import compile as compiling
from titok_jax import evaluate, parity, pretokenize, reconstruct, sample, train, zoo
from titok_jax.runtime import arguments, capacity, command
from titok_jax.training import recipes
from titok_jax.training.settings import parse_settings

ROOT = Path(__file__).parents[1]
ABSURD = ("-1", "nan", "inf", "-inf", "1e400", "0x10", "10**12", "1000000000000", "9" * 5000, "", "2.5.1", "two")


COMMANDS = {
    module.__name__: module for module in (compiling, evaluate, parity, pretokenize, reconstruct, sample, train, zoo)
}
COMMANDS |= {str(path.relative_to(ROOT)): path for path in ROOT.glob("tools/*.py")}
COMMANDS |= {f"benchmarks/{name}.py": ROOT / "benchmarks" / f"{name}.py" for name in ("input", "speed")}


def parser_of(module, monkeypatch):
    """The parser that a command makes."""

    class Caught(Exception):
        pass

    def parse(self, *args):
        raise Caught(self)

    with monkeypatch.context() as patch:
        for name in ("parse_args", "parse_known_args"):
            patch.setattr(argparse.ArgumentParser, name, parse)
        with pytest.raises(Caught) as caught:
            module.main([])
    return caught.value.args[0]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_numeric_flag_refuses_absurd_numbers(name, monkeypatch):
    module = COMMANDS[name]
    if isinstance(module, Path):
        monkeypatch.syspath_prepend(module.parent)
        spec = importlib.util.spec_from_file_location(module.stem, module)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    parser = parser_of(module, monkeypatch)
    for action in parser._actions:
        assert action.type not in (int, float), f"{action.option_strings}: take a type of runtime/arguments.py, with limits"
        if not isinstance(action.type, arguments.Whole | arguments.Real):
            continue
        (flag,) = action.option_strings
        for text in ABSURD:
            if isinstance(action.type, arguments.Real) and text == "-1" and action.type.least <= -1:
                continue
            with pytest.raises(
                ValueError, match=rf"^{flag} is {re.escape(text[:80])}, expected a (whole )?number from"
            ) as error:
                parser.parse_args([f"{flag}={text}"])
            assert len(str(error.value)) < 250
        if isinstance(action.type, arguments.Reals):
            with pytest.raises(ValueError, match=rf"^{flag} is 1,1,.*, expected at most 100 numbers"):
                parser.parse_args([flag, ",".join(["1"] * 101)])
            with pytest.raises(ValueError, match=f"^{flag} is nan, expected a number from 0 to 10,000,000"):
                parser.parse_args([flag, "1,nan"])


RECIPES = ("stage2:smoke", "generator:smoke", "maskgit_vqgan:smoke", "digits:tokenizer")
NONE_IS_MEANT = (  # 0 is a value of these
    *("seed", "num_workers", "num_threads", "eval_every", "preview_every", "warmup_steps", "discriminator_start"),
    *("num_tokens", "codebook_size"),  # of a generator: the tokenizer's
)


def numbers_in(config, prefix=""):
    """{path: value} of the numbers in a recipe."""
    found = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            found |= numbers_in(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{name}"] = value
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_number_of_a_recipe_is_checked(recipe):
    changes = ["--config.init_from=random"] if recipe.startswith("stage2") else []

    config = recipes.read_config(recipe, changes)
    numbers = numbers_in(config)
    fields = {field: value for field, value in numbers.items() if not field.startswith("recipe.")}
    assert len(fields) > 30
    for field, own in fields.items():
        name = field.rpartition(".")[2]
        wrong = [-5, float("nan"), "many"]
        if name != "max_grad_norm":  # inf: no clipping
            wrong += [10**12, float("inf")]
        if isinstance(own, int):
            wrong += [-(10**12), 10**400, True]
        if isinstance(own, int) and not field.startswith("mesh.") and name not in NONE_IS_MEANT:
            wrong += [0, None]
        for value in wrong:
            changed = copy.deepcopy(config)
            with changed.ignore_type():
                changed.update_from_flattened_dict({field: value})
            with pytest.raises(ValueError, match=rf"^config\.?.*\b{name} is ") as error:
                parse_settings(changed)
            assert len(str(error.value)) < 700, field


@pytest.fixture
def small_machine(monkeypatch):
    """A machine with 2 GB of memory and of free disk."""
    monkeypatch.setattr(capacity, "machine_memory", lambda: 2_000_000_000)
    usage = capacity.shutil.disk_usage("/")._replace(free=2_000_000_000)
    monkeypatch.setattr(capacity.shutil, "disk_usage", lambda folder: usage)


TOO_MUCH = r" needs at least 3\.1 GB of memory, there are 2\.0 GB"


@pytest.mark.parametrize(
    ("run", "arguments", "message"),
    [
        (sample, "--steps 9", r"--steps is 9, expected at most 8: the model makes 8 tokens, at least one in each step"),
        (evaluate, "--steps 9", r"--steps is 9, expected at most 8"),
        (sample, "--num 100000 --batch-size 100000 --out x/", "--batch-size 100000" + TOO_MUCH),
        (sample, "--num 400000 --out x.npz", r"--num 400000 needs at least 2\.5 GB on the disk of .*, 2\.0 GB are free"),
        (evaluate, "--num 100000 --batch-size 100000", "--batch-size 100000" + TOO_MUCH),
        (evaluate, "--num 9999990", r"--num 9999990 needs at least 33\.3 GB of memory, there are 2\.0 GB"),
        (train, "--config digits:tokenizer --config.data.batch_size=1000000", "config.data.batch_size=1000000" + TOO_MUCH),
        (train, "--config digits:generator --config.data.batch_size=1000000", "config.data.batch_size=1000000" + TOO_MUCH),
        (
            train,
            "--config digits:generator --config.model.num_classes=10000000",
            "a model of 1,280,.* parameters, with AdamW",
        ),
        (train, "--config digits:tokenizer --config.model.encoder.width=9999999", "parameters, with AdamW, needs at least"),
    ],
)
def test_what_a_machine_cannot_hold_is_said_before_it_is_tried(
    run, arguments, message, small_machine, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    workdir = ["--workdir", str(tmp_path / "run")] if run is train else []
    assert run.main([*arguments.split(), *workdir]) == 2
    error = capsys.readouterr().err
    assert re.search(rf"^error: .*{message}.*\n\Z", error), error
    assert not list(tmp_path.iterdir())


def test_a_batch_is_at_most_what_there_is(small_machine, tmp_path, monkeypatch):
    """A batch of a million is filled up to the number of images, not beyond."""
    monkeypatch.chdir(tmp_path)
    most = ["--batch-size", "1000000"]
    assert reconstruct.main([*most, "--num", "2"]) == 0
    assert pretokenize.main(["digits:test", *most, "--shards", "30", "--out", "tokens"]) == 0
    assert sample.main([*most, "--num", "2", "--steps", "1"]) == 0


def test_a_lack_of_memory_is_one_line(capsys):
    @command.command
    def too_large(argv=None):
        np.zeros(2**50, np.float64)

    @command.command
    def device_full(argv=None):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.\nmore")

    for main, message in ((too_large, "Unable to allocate 8.00 PiB"), (device_full, "RESOURCE_EXHAUSTED: Out of memory")):
        assert main() == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: not enough memory, a smaller batch or model needs less: {message}")
        assert error.count("\n") == 1


def test_sizes_of_models_are_bounded():
    with pytest.raises(ValueError, match="hidden_size is 1000000000000, expected at most 10000000"):
        type(tiny.GENERATOR)(hidden_size=10**12)
    with pytest.raises(ValueError, match="num_steps is 10000000, expected at most 10000"):
        type(tiny.GENERATOR.sampling)(num_steps=10**7)
    with pytest.raises(ValueError, match=r"commitment_cost is 10{77,}.*, expected a number from 0"):
        type(tiny.TOKENIZER)(commitment_cost=10**400)
