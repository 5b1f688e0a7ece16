"""The package as it is installed: what the wheel holds, and what is never imported."""

import os
import pathlib
import subprocess
import sys
import zipfile

ROOT = pathlib.Path(__file__).parents[1]


def test_the_wheel_holds_the_digits_and_is_small(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
    ]
    # From a copy: a build leaves folders behind.
    files = subprocess.run(["git", "ls-files", "titok_jax", "setup.py", "pyproject.toml", "README.md", "LICENSE"],
                           cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()  # fmt: skip
    for name in files:
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*command, str(tmp_path / "source")], check=True)
    (wheel,) = tmp_path.glob("*.whl")
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
