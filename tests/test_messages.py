"""What messages show of names: escaped, short, few, and with what was perhaps meant."""

import pytest

from titok_jax.data.files import find_files
from titok_jax.data.image_files import find_images
from titok_jax.data.sources import make_source
from titok_jax.runtime import command, messages
from titok_jax.weights import published_models


def test_names_are_short_and_do_not_control_the_terminal():
    assert messages.shown("decoder.ffn.0.weight") == "decoder.ffn.0.weight"
    assert messages.shown("ü") == "ü"
    assert messages.shown("a\x1b[31mb\nc\td\u202ee\udc80") == r"a\x1b[31mb\nc\td\u202ee\udc80"
    assert messages.shown("x" * 200) == "x" * 200
    assert messages.shown("x" * 201) == "x" * 200 + "..."
    assert len(messages.shown("\0" * 10**7)) == 4 * 200 + 3


def test_lists_stop_at_five():
    lines = [str(number) for number in range(150)]
    assert messages.first_lines(lines[:5], "missing") == lines[:5]
    assert messages.first_lines(lines, "missing") == [*lines[:5], "... and 145 more missing"]
    assert messages.first_lines(lines[:6]) == [*lines[:5], "... and 1 more"]


def test_near_names():
    known = ["titok_l32", "titok_b64", "digits"]
    assert messages.near("titok_l33", known) == "; did you mean titok_l32?"
    assert messages.near("something", known) == messages.near("x", []) == ""


def test_near_paths(tmp_path, monkeypatch):
    (tmp_path / "runs" / "generator").mkdir(parents=True)
    (tmp_path / "model.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    for path, meant in (
        ("run/generator", "runs"),
        ("runs/generatr/pretrained/model.safetensors", "runs/generator"),
        (tmp_path / "runs" / "Generator", tmp_path / "runs" / "generator"),
        ("./rums", "runs"),
        ("modle.safetensors", "model.safetensors"),
        ("model.safetensor", "model.safetensors"),
    ):
        assert messages.near_path(path) == f"; did you mean {meant}?"
    for path in ("nope.safetensors", "else", "runs/x", "/nowhere/at/all/or/not", "", "gs://runs/x", "https://runs"):
        assert messages.near_path(path) == ""


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_an_error_does_not_control_the_terminal(error, capsys):
    def main(argv):
        raise error("a \x1b[2J of a library\nin two lines" + "x" * 10**6)

    assert command.command(main)([]) == 2
    assert capsys.readouterr().err == f"error: a \\x1b[2J of a library\nin two lines{'x' * 1988}...\n"


def test_missing_data_and_files_are_answered_with_near_names(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    monkeypatch.chdir(tmp_path)
    for call, meant in (
        (lambda: find_images(["photos/cats.jpg"]), "photos/cat.jpg"),
        (lambda: find_files("photo/*.tar", "tars"), "photos"),
        (lambda: make_source({"name": "folder", "path": "fotos"}), "photos"),
        (lambda: make_source({"name": "web_dataset", "paths": "x"}), "webdataset"),
        (lambda: published_models.find("photo/model"), "photos"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=rf"; did you mean {meant}\?$"):
            call()
