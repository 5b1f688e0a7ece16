"""Every command line and every line of Python in the README runs.

Long trainings run with fewer steps; nothing else is changed.
"""

import os
import pathlib
import re
import shutil
import subprocess
import tomllib

import command_lines
import pytest

from titok_jax.training.recipes import read_config

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SHORTER = " --config.num_steps=2 --config.data.batch_size=16 --config.preview_images=10"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def bash_lines() -> list[str]:
    lines = [line.split(" #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line]


def test_the_readme_shows_what_it_promises():
    lines = bash_lines()
    assert lines[:2] == ["make demo", "make test"]
    for name in ("sample", "reconstruct", "evaluate", "train"):
        assert any(line.startswith(f"python -m titok_jax.{name} ") for line in lines), name
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link


def test_the_commands_run_one_after_the_other(tmp_path):
    lines = [line for line in bash_lines() if not line.startswith("make ")]
    for line in lines:
        assert line.startswith(("python -m titok_jax.", "python tools/")), line
    command_lines.run([line + SHORTER if ".train " in line else line for line in lines], tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    assert {"pi.png", "samples.npz", "reconstructions", "digits.json", "runs", "mine.png", "mine.safetensors"} <= written


def test_the_commands_for_your_hardware_are_commands():
    """What can be looked at without such hardware: the scripts and their arguments, the extras, the fields of the recipe."""
    section = README.split("## Run it on your hardware")[1].split("\n## ")[0]
    rows = [row for row in section.splitlines() if row.startswith("|")]
    commands = [command for row in rows[2:] for command in re.findall(r"`([^`]+)`", row)]
    slices = {}
    for command in commands:
        if "tpu.sh" not in command:
            continue
        line = command.replace("tpu.sh", "tpu.sh --config tpu_scripts/config.sh.example --dry-run", 1)
        done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        create, *_ = done.stdout.splitlines()
        slices[command.split()[0].partition("=")[2]] = create.split()
    assert "--accelerator-type=v5litepod-8" in slices["v5e-8"]
    assert "--accelerator-type=v5litepod-256" in slices["v5e-256"]
    assert {"queued-resources", "--node-count=2", "--accelerator-type=v5litepod-256"} <= set(slices["2xv5e-256"])
    batches = {"v5e-256": 1024, "2xv5e-256": 2048}  # divide among 256 and 512 chips
    for command in commands:
        changes = [word for word in command.split() if word.startswith("--config.")]
        if batch := batches.get(command.split()[0].partition("=")[2]):
            assert read_config("stage1:l32", changes).num_steps == 1_000_000 * 256 // batch
    assert all((ROOT / f"tpu_scripts/{name}").exists() and name in section for name in ("slurm.sbatch", "Dockerfile"))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert '-e ".[train,cuda]"' in section
    assert {"train", "cuda"} <= extras.keys()


@pytest.mark.parametrize(("target", "command"), [("demo", "-m titok_jax.sample"), ("test", "-m pytest")])
def test_the_make_targets_run_what_they_say(target, command):
    # These are not run: they would install, or run the tests, inside this test.
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # this test may run under make
    command_line = ["make", "--no-print-directory", "--dry-run", target]
    plan = subprocess.run(command_line, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    assert plan.splitlines()[-1].startswith(f".venv/bin/python {command}")


def test_the_python_lines_run():
    (code,) = blocks("python")
    assert len(code.splitlines()) <= 8
    names: dict = {}
    exec(code, names)
    assert names["ids"].shape == (3, 8)
    assert names["tokens"].shape == (3, 8)
    assert names["images"].shape == (100, 32, 32, 3)
