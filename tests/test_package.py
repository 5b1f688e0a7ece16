"""The installed package: what the wheel holds, and which modules are never imported."""

import ast
import os
import pathlib
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile

import pytest
from test_rooms import COMMANDS

from titok_jax.runtime.command import TRAIN_EXTRA

ROOT = pathlib.Path(__file__).parents[1]


# What the package is built from.
NEEDED = ("titok_jax", "configs", "setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """Builds the wheel of the package."""
    folder = tmp_path_factory.mktemp("wheel")
    # Built from a copy, because a build leaves folders behind.
    for name in subprocess.run(
        ["git", "ls-files", *NEEDED], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split():
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
        "py.typed",
    ):
        assert f"titok_jax/{name}" in sizes, name
    # pyproject.toml lists the packages; a new one is easily forgotten there.
    modules = {str(path.relative_to(ROOT)) for path in ROOT.glob("titok_jax/**/*.py")}
    modules |= {f"titok_jax/{path.relative_to(ROOT)}" for path in ROOT.glob("configs/*.py")}
    assert {name for name in sizes if name.endswith(".py")} == modules
    assert sum(sizes.values()) < 7e6
    assert sum(size for name, size in sizes.items() if "embedded" in name or "digits" in name) <= 6e6


def test_an_image_has_what_the_package_is_built_from():
    """And nothing that is not named, such as a config.sh."""
    lines = (ROOT / "tpu_scripts/Dockerfile").read_text().splitlines()
    copied = {name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]}
    assert copied == {*NEEDED, "constraints.txt", "tools"}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"train", "tpu", "cuda"} <= extras.keys()
    (install,) = (line for line in lines if "pip install" in line)
    assert install.endswith('-c constraints.txt -e ".[train,$DEVICE]"')


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
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # The other packages come from this environment's folder. Its .pth files (editable installs) are not read.
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = ["--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run([sys.executable, "-m", "pip", *install], env=env, check=True)
    folder.mkdir()
    (folder / "configs").mkdir()  # belongs to another project
    (folder / "configs" / "__init__.py").write_text("")
    command = [python, "-c", INSTALLED, ",".join(COMMANDS)]
    run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    recipes = [path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "common")]
    assert " ".join(sorted(recipes)) in run.stdout.splitlines()


# What the extra "train" installs cannot be imported here, but for optax, which Flax imports, and absl, which optax imports.
BASE = """
import pathlib, sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None  # importing it, or a module of it, raises ModuleNotFoundError
import titok_jax
from titok_jax import compile, evaluate, inference, parity, pretokenize, reconstruct, sample, train, zoo
public = {name for name in dir(titok_jax) if not name.startswith("__")}
assert public == set(titok_jax.__all__) and "__version__" in dir(titok_jax), dir(titok_jax)
assert public < set(dir(inference)) and not hasattr(titok_jax, "load_everything")
assert "jax" not in sys.modules
import jax
import numpy as np
tokenizer, generator = titok_jax.load_tokenizer("digits"), titok_jax.load_generator("digits")
ids = titok_jax.generate(generator, [3, 1, 4, 1], jax.random.key(0), num_steps=2)
images = np.asarray(tokenizer.decode(ids))
assert images.shape == (4, 32, 32, 3) and tokenizer.encode(images).shape == (4, 8)
assert sample.main(["--num", "4", "--steps", "2"]) == 0
assert reconstruct.main(["--num", "4"]) == 0
assert reconstruct.main(["samples.png", "--out", "file"]) == 0
assert zoo.main([]) == 0
assert pretokenize.main(["digits:test", "--out", "tokens", "--format", "jsonl", "--batch-size", "4"]) == 0
pathlib.Path("a.array_record").touch()
pathlib.Path("a.parquet").touch()
for main, arguments in (
    (train.main, ["--config", "digits:smoke_tokenizer", "--workdir", "run"]),
    (compile.main, ["--config", "digits:smoke_tokenizer", "--slice", "v5e-16"]),
    (evaluate.main, ["--json", "digits.json"]),
    (pretokenize.main, ["digits:test", "--out", "records"]),
    (pretokenize.main, ["array_record:a.array_record", "--out", "records", "--format", "jsonl"]),
    (pretokenize.main, ["parquet:a.parquet", "--out", "records", "--format", "jsonl"]),
    (pretokenize.main, ["tfds:mnist:test", "--out", "records", "--format", "jsonl"]),
):
    assert main(arguments) == 2
"""


def test_what_the_extra_installs_is_needed_only_where_it_is_used(tmp_path):
    """Without it, the library and `sample`, `reconstruct` and `zoo` work, and other commands name what they need."""
    absent = [*(name for name in TRAIN_EXTRA if name not in ("optax", "absl")), "torch", "tensorflow"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", BASE, ",".join(absent)]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert {"samples.png", "reconstructions", "file", "tokens"} <= {path.name for path in tmp_path.iterdir()}
    needed = ("ml_collections", "ml_collections", "scipy", "array_record", "grain", "pyarrow", "tensorflow_datasets")
    expected = [f'error: this needs {name}; pip install "titok_jax[train]"' for name in needed]
    assert [line for line in run.stderr.splitlines() if line.startswith(("error", "Traceback"))] == expected
    assert not (tmp_path / "run").exists()


def test_what_is_imported_is_a_dependency_and_the_extra_is_what_the_commands_say_it_is():
    names = {
        "absl-py": "absl",
        "orbax-checkpoint": "orbax",
        "tensorflow-datasets": "tensorflow_datasets",
        "pillow": "PIL",
        "PyYAML": "yaml",
    }

    def to_import(lines: list[str]) -> set[str]:
        packages = [re.match(r"[\w-]+", line)[0] for line in lines]
        return {names.get(package, package) for package in packages}

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base, train = to_import(project["dependencies"]), to_import(project["optional-dependencies"]["train"])
    assert train == set(TRAIN_EXTRA)
    imported = set()
    for path in [*ROOT.glob("titok_jax/**/*.py"), *ROOT.glob("configs/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                imported |= {module.partition(".")[0] for module in modules}
    ours = {"titok_jax", "configs", "jaxlib"}  # the last comes with jax
    # torch and google: only where they are installed, with a message of their own where they are not.
    assert imported - sys.stdlib_module_names - ours - {"torch", "google"} == base | train


def test_training_and_evaluation_need_no_torch_and_no_tensorflow():
    # Of the other commands the test above says it.
    code = (
        "import sys\n"
        "for name in ('torch', 'tensorflow'): sys.modules[name] = None  # importing it raises ImportError\n"
        "from titok_jax.evaluation import digits, features, runs, sweep\n"
        "from titok_jax.training import build, loop, settings\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
