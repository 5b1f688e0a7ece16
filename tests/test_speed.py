"""benchmarks/speed.py and gpu.sh: each side alone and in turn, figures kept, limits of time. The sides are stand-ins."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest
import tiny_models

import titok_jax
from titok_jax.training.recipes import read_config
from titok_jax.weights.known_models import known_configs

ROOT = pathlib.Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
# A side that notes its start and its end in the file LOG, and measures nothing.
STAND_IN = f"""
import json, os, pathlib, sys, time
sys.path.insert(0, {str(BENCHMARKS)!r})
import serving
log, side = pathlib.Path(__file__).with_name("log"), sys.argv[0].rpartition("/")[2]

def prepare(request):
    name = "compiled" if request.get("compile") else side
    with log.open("a") as file:
        file.write(f"{{name}} {{request['kind']}} {{request['model']}} {{request['dtype']}}\\n")
    setting = json.loads(log.with_name("setting").read_text()).get(name, {{}})
    if "print" in setting:
        print(setting["print"])
    if "exit" in setting:
        print("killed", file=sys.stderr)
        os._exit(setting["exit"])
    time.sleep(setting.get("sleep", 0))

    def run(times):  # takes no time; what is measured is not looked at
        return 1 / setting.get("divide", 1)

    return serving.Prepared(setting.get("about", "a device"), run, lambda: setting.get("peak", 2**30))

serving.serve(prepare)
"""
ONE = ["--only", "train generator:l32", "--dtype", "bfloat16", "--rounds", "3"]


@pytest.fixture(scope="module")
def speed():
    """The modules of the benchmark, under the names by which they import each other."""
    names = ("speed", "cases", "results", "serving", "ours")
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("speed")
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture
def run(speed, tmp_path, monkeypatch):
    """Runs the command with stand-ins: run(*flags, side=setting) -> (status, the file of figures, what ran)."""
    (tmp_path / "modeling").mkdir()
    (tmp_path / "modeling" / "titok.py").touch()
    for side in ("ours.py", "published.py"):
        (tmp_path / side).write_text(STAND_IN)
    monkeypatch.setattr(speed, "HERE", tmp_path)
    monkeypatch.setattr(speed, "platform", lambda: "gpu")
    monkeypatch.setattr(speed, "check_imports", lambda *_: None)

    def run(*flags, **settings):
        settings = {name.replace("_", "."): setting for name, setting in settings.items()}
        (tmp_path / "setting").write_text(json.dumps(settings))
        (tmp_path / "log").write_text("")
        file = tmp_path / "speed.json"
        status = speed.main([*ONE, "--reference", str(tmp_path), "--json", str(file), *flags])
        return status, json.loads(file.read_text()) if file.exists() else None, (tmp_path / "log").read_text().splitlines()

    return run


def test_sides_take_turns_and_what_is_done_is_not_done_again(run, capsys):
    status, kept, ran = run("--torch-compile", ours_py={"peak": 3 * 2**29})
    assert status == 0
    assert [line.split()[0] for line in ran] == ["published.py", "ours.py"] * 2 + ["compiled"]
    assert set(ran) == {f"{side} train generator:l32 bfloat16" for side in ("published.py", "ours.py", "compiled")}
    (row,) = kept["rows"]
    assert [[len(turn) for turn in row[side]["seconds"]] for side in ("titok_jax", "published", "compiled")] == [
        *([3, 3], [3, 3], [3])
    ]
    assert kept["about"] == {"published": "a device", "titok_jax": "a device"}
    last = capsys.readouterr().out.splitlines()[-1]
    assert "| 1.5 |" in last  # GiB
    assert "memory missed" in last

    assert run("--torch-compile") == (0, kept, [])
    status, more, ran = run("--torch-compile", "--turns", "3")
    assert (status, len(ran), len(more["rows"][0]["titok_jax"]["seconds"])) == (0, 2, 3)


def test_the_table_has_medians_ratios_and_targets(speed):
    def side(*turns, peak):
        return {"seconds": turns, "first": 9.0, "peak": peak * 2**30}

    row = {"case": "train generator:l32", "dtype": "bfloat16", "batch": 64}
    row["titok_jax"] = side([0.5, 0.1, 0.125], [0.125, 0.2], peak=4)
    row["published"] = side([0.9, 1.0], [1.1], peak=5)
    cells = "train generator:l32 | bfloat16 | 64 | 125.0 ms | 512 | 4.0 | 1000.0 ms | 5.0 | 8.00"
    assert speed.table([row]).splitlines()[-1] == f"| {cells} |  |  |  | 6 met, memory met |"
    row["compiled"] = side([0.1], peak=4.5)
    end = "100.0 ms | 4.5 | 0.80 | 6 met, memory met, torch.compile missed"
    assert speed.table([row]).splitlines()[-1] == f"| {cells} | {end} |"
    row["compiled"] = {"error": "did not end in 480 s"}
    assert speed.table([row]).splitlines()[-1] == f"| {cells} | failed |  |  | 6 met, memory met |"
    heading, line, *_ = speed.table([row]).splitlines()
    assert heading.count("|") == line.count("|") == 14


def test_a_compiler_that_takes_too_long_has_failed(run, capsys):
    status, kept, _ = run("--torch-compile", "--turns", "1", "--compile-minutes", "0.01", compiled={"sleep": 600})
    assert status == 0
    assert kept["rows"][0]["compiled"] == {"error": "did not end in 1 s"}
    assert "train generator:l32, bfloat16, compiled: did not end in 1 s" in capsys.readouterr().out


def test_when_the_time_is_up_the_same_command_goes_on(speed, run, monkeypatch, capsys):
    left = iter([1000.0, 1000.0, 0.0])
    monkeypatch.setattr(speed.Benchmark, "left", lambda self: next(left))
    status, _, ran = run("--minutes", "9", "--torch-compile")
    assert (status, len(ran)) == (1, 2)
    assert "The 9 minutes are over; the same command goes on." in capsys.readouterr().out
    # What may take 10 minutes is not begun with 9 left, unless it is the first.
    left = iter([1000.0, 1000.0, 540.0])
    assert [line.split()[0] for line in run("--minutes", "9", "--torch-compile")[2]] == ["published.py", "ours.py"]
    left = iter([540.0])
    assert [line.split()[0] for line in run("--minutes", "9", "--torch-compile")[2]] == ["compiled"]


def test_a_side_cut_off_in_the_middle_leaves_no_figure(speed, run, monkeypatch):
    left = iter([1000.0, 0.3])
    monkeypatch.setattr(speed.Benchmark, "left", lambda self: next(left))
    status, kept, _ = run("--minutes", "9", ours_py={"sleep": 600})
    assert status == 1
    assert kept["rows"][0].keys() == {"case", "dtype", "batch", "published"}


def test_what_fails_is_a_row_and_prints_do_not_mix_with_figures(run, capsys):
    status, kept, ran = run(published_py={"exit": 3}, ours_py={"divide": 0, "print": "hello"})
    assert status == 0
    assert len(ran) == 2  # neither is tried a second time
    assert kept["rows"][0]["published"] == {"error": "it ended with status 3; it said: killed"}
    assert kept["rows"][0]["titok_jax"] == {"error": "ZeroDivisionError: division by zero"}
    assert "| failed |  |  | failed |" in capsys.readouterr().out


def test_figures_of_two_devices_are_not_mixed(run, tmp_path, capsys):
    run("--turns", "1")
    assert run("--turns", "2", published_py={"about": "another"})[0] == 2
    assert "has figures of a device, but this is another; name another file or add --overwrite" in capsys.readouterr().err
    (tmp_path / "speed.json").write_text('{"rows": [1]}')
    assert run()[0] == 2
    assert f"--json {tmp_path / 'speed.json'} is no file of this benchmark" in capsys.readouterr().err
    assert run("--overwrite", "--turns", "1")[0] == 0


def test_flags_that_need_another(speed, capsys):
    for flags, message in {
        ("--torch-compile",): "--reference-python and --torch-compile need --reference CLONE",
        ("--minutes", "9"): "--minutes needs --json FILE, where the next start finds what is done",
        ("--only", "nothing"): "--only nothing: no case has that in its name; --list prints them",
    }.items():
        assert speed.main(flags) == 2
        assert capsys.readouterr().err == f"error: {message}\n"


def test_the_cases_are_models_and_recipes_that_there_are(speed):
    for case in speed.CASES:
        if case.kind == "train":
            task, variant = case.model.split(":")
            assert read_config(f"configs/{task}.py:{variant}", []).task == task
        else:
            for kind in ["tokenizer", "generator"] if case.kind == "sample" else ["tokenizer"]:
                assert (kind, case.model) in known_configs(), case.name
        assert json.dumps(speed.request(case, "published", "float32", 1, 1))


@pytest.mark.parametrize(("kind", "model"), [("sample", "tiny"), ("train", "generator:smoke")])
def test_our_side_runs_a_case(speed, monkeypatch, kind, model):
    ours = importlib.import_module("ours")
    tiny = {("tokenizer", "tiny"): tiny_models.TOKENIZER, ("generator", "tiny"): tiny_models.GENERATOR}
    tiny["tokenizer", "digits"] = titok_jax.load_tokenizer("digits").config  # whose tokens the recipe trains on
    monkeypatch.setattr(ours.known_models, "known_configs", lambda *_: tiny)
    prepared = ours.prepare({"kind": kind, "model": model, "dtype": "float32", "batch": 2})
    prepared.run(2)
    assert prepared.about.startswith("cpu, ")
    assert prepared.peak() is None  # the CPU counts no bytes


def test_the_script_for_a_gpu(speed, tmp_path):
    def start(*arguments, **environment):
        env = os.environ | environment
        return subprocess.run([BENCHMARKS / "gpu.sh", *arguments], env=env, capture_output=True, text=True)

    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nif [ "$1" = -c ]; then exit "$GPU"; fi\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    settings = {"PYTHON": str(python), "RESULTS": str(tmp_path / "new" / "gpu.json")}
    done = start("the clone", "their/python", GPU="0", **settings)
    assert done.returncode == 0, done.stderr
    script, *flags = done.stdout.splitlines()
    assert script == str(BENCHMARKS / "speed.py")
    args = speed._parser().parse_args(flags)
    assert (str(args.reference), args.reference_python, args.dtype) == ("the clone", "their/python", ["bfloat16"])
    assert args.minutes <= 9 - 0.2  # for what is before and after
    assert args.compile_minutes < args.minutes
    names = [case.name for text in args.only for case in speed.CASES if text in case.name]
    assert [name for name in names if name.startswith("train")] == [case.name for case in speed.CASES if case.target]
    assert names[4:] == ["encode titok_l32", "decode titok_l32", "sample titok_l32"]

    assert "speed.py" in start("--dry-run", "clone", GPU="1", **settings).stdout
    for arguments, message in {
        ("clone",): "finds no GPU here",
        (): "expected CLONE",
        ("--dry", "clone"): "unknown option",
    }.items():
        refused = start(*arguments, GPU="1", **settings)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert refused.stderr.startswith("error: ")
        assert message in refused.stderr
