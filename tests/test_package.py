"""The installed package: what the wheel holds, and which modules are never imported."""

import os
import pathlib
import subprocess
import sys
import sysconfig
import zipfile

import pytest
from test_rooms import COMMANDS

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """Builds the wheel of the package."""
    folder = tmp_path_factory.mktemp("wheel")
    # Built from a copy, because a build leaves folders behind.
    listed = ["git", "ls-files", "titok_jax", "configs", "setup.py", "pyproject.toml", "README.md", "LICENSE"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    command = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "source"]
    subprocess.run([sys.executable, "-m", "pip", *command], check=True)
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_holds_the_digits_and_is_small(wheel):
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    for name in (
        "data/digits.npz",
        "data/DIGITS.md",
        "embedded/digits/config.json",
        "embedded/digits/model.safetensors",
        "embedded/digits/tokenizer/config.json",
        "embedded/digits/tokenizer/model.safetensors",
        "embedded/digits_features/model.safetensors",
    ):
        assert f"titok_jax/{name}" in sizes, name
    assert sum(sizes.values()) < 7e6
    assert sum(size for name, size in sizes.items() if "embedded" in name or "digits" in name) <= 6e6


# This runs in an empty folder, with the Python of the environment in which the wheel is installed.
INSTALLED = """
import contextlib, io, pathlib, runpy, sys
import titok_jax
from titok_jax.training import recipes
assert pathlib.Path(titok_jax.__file__).is_relative_to(sys.prefix), titok_jax.__file__
for name in sys.argv[1].split(","):
    sys.argv = [name, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        runpy.run_module(f"titok_jax.{name}", run_name="__main__", alter_sys=True)
    assert f"python -m titok_jax.{name}" in out.getvalue(), name
for name in ("digits:generator", "stage1:l32", "stage2:b64", "single_stage:bl64_vae", "generator:s128", "maskgit_vqgan"):
    assert recipes.read_config(name, ["--config.num_steps=7"]).num_steps == 7
print(*recipes.recipe_names())
from titok_jax import sample, train
assert sample.main(["--num", "4", "--steps", "2", "--out", "four.png"]) == 0
small = ["--config.num_steps=1", "--config.data.batch_size=8", "--config.eval_every=0", "--config.preview_every=0"]
assert train.main(["--config", "digits:smoke_tokenizer", "--workdir", "run", *small]) == 0
assert pathlib.Path("run/pretrained/model.safetensors").is_file()
"""


def test_installed_it_has_every_command_and_every_recipe(wheel, tmp_path):
    """Runs from an empty folder, in an environment that has nothing of the clone."""
    environment, folder = tmp_path / "environment", tmp_path / "empty"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    # The other packages come from this environment's folder. Its .pth files (editable installs) are not read.
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = ["--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    folder.mkdir()
    (folder / "configs").mkdir()  # belongs to another project
    (folder / "configs" / "__init__.py").write_text("")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "-c", INSTALLED, ",".join(COMMANDS)]
    run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    recipes = [path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "common")]
    assert " ".join(sorted(recipes)) in run.stdout.splitlines()


def test_no_command_needs_torch_or_tensorflow():
    modules = "sample, reconstruct, evaluate, train"
    code = (
        "import sys\n"
        "for name in ('torch', 'tensorflow'): sys.modules[name] = None  # importing it raises ImportError\n"
        f"from titok_jax import {modules}\n"
        "import titok_jax\n"
        "titok_jax.load_pair('digits')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_benchmark_measures_models_and_recipes_that_there_are():
    code = (
        "import speed\n"
        "from titok_jax.weights.known_models import known_configs\n"
        "from titok_jax.training.recipes import read_config\n"
        "for case in speed.CASES:\n"
        "    if case.kind == 'train':\n"
        "        task, variant = case.model.split(':')\n"
        "        assert read_config(f'configs/{task}.py:{variant}', []).task == task\n"
        "    else:\n"
        "        kinds = ['tokenizer', 'generator'] if case.kind == 'sample' else ['tokenizer']\n"
        "        for kind in kinds:\n"
        "            assert (kind, case.model) in known_configs(), case.name\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=env)
