"""A training goes on only with the data, the configuration and the networks that it began with, or when told to."""

import json
import shutil

import numpy as np
import PIL.Image
import pytest
import tiny_models
from test_train import small

from titok_jax import train as train_command
from titok_jax.data.contents import MOST_PARTS, content_changes, source_contents
from titok_jax.data.records import token_writer
from titok_jax.data.sources import make_source
from titok_jax.data.webdataset import tar_writer
from titok_jax.runtime import placement
from titok_jax.training import loop, same_run
from titok_jax.training.settings import parse_settings
from titok_jax.weights import pretrained


def write_tokens(path, count: int) -> None:
    path.unlink(missing_ok=True)
    with token_writer(path) as write:
        for number in range(count):
            write(np.full(8, number % 7), number % 10)


def on_tokens(folder, **changes):
    """The small generator, on the token records of a folder."""
    config = small("generator", num_steps=2, checkpoint_every=2, tokenizer="", **changes)
    config.data.source = {"name": "tokens", "paths": f"{folder}/*.jsonl"}
    config.data.transform = {}
    config.data.batch_size = 16
    config.model.update({"num_tokens": 8, "codebook_size": 16})
    return config


def test_data_that_have_changed_are_refused_with_what_differs_or_accepted(tmp_path, capsys):
    for number in range(2):
        write_tokens(tmp_path / "data" / f"{number}.jsonl", 40)
    config = on_tokens(tmp_path / "data")
    loop.train(parse_settings(config), tmp_path / "run")
    write_tokens(tmp_path / "data" / "1.jsonl", 43)
    config.num_steps = 4
    with pytest.raises(ValueError, match=r"--accept-changes") as refused:
        loop.train(parse_settings(config), tmp_path / "run")
    lines = str(refused.value).splitlines()
    assert lines[0].startswith(f"the configuration or the data do not fit the checkpoint of step 2 in {tmp_path}/run:")
    assert lines[1:-1] == [
        "  num_steps: 2 in the checkpoint, 4 now",
        "  config.data.source: 80 examples then, 83 now",
        "  config.data.source: 1.jsonl: 40 examples in 2,080 bytes then, 43 in 2,236 now",
    ]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["2"]

    capsys.readouterr()
    loop.train(parse_settings(config), tmp_path / "run", accept_changes=True)
    accepted = "Going on with changes after step 2, accepted by --accept-changes:\n" + "\n".join(lines[1:-1])
    assert accepted in capsys.readouterr().out
    log = (tmp_path / "run" / "log.txt").read_text()
    assert all(line in log for line in accepted.splitlines())
    stored = json.loads(next((tmp_path / "run" / "checkpoints" / "4").rglob("metadata")).read_text())
    assert stored[same_run.CHANGES] == [{"step": 2, "changes": [line.strip() for line in lines[1:-1]]}]
    loop.train(parse_settings(config), tmp_path / "run")  # knows the new values


def test_weights_that_differ_between_processes_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    """Here the comparison itself is replaced; `tests/test_distributed.py` has it."""
    config, compared = small("generator", tokenizer="digits"), []
    model = parse_settings(config).model
    pretrained.save(tmp_path / "model", model, tiny_models.params(model))
    config.init_from = str(tmp_path / "model")

    def differ(tree, mesh, what):
        compared.append(what)
        if "init_from" in what:
            raise ValueError(what)

    monkeypatch.setattr(placement, "check_same", differ)
    with pytest.raises(ValueError, match="init_from"):
        loop.train(parse_settings(config), tmp_path / "run")
    assert compared == ["config.tokenizer (digits)", f"config.init_from ({tmp_path}/model)"]
    assert not (tmp_path / "run").exists()


def test_a_change_of_the_model_cannot_be_accepted_and_moves_nothing(tmp_path):
    write_tokens(tmp_path / "data" / "0.jsonl", 40)
    config = on_tokens(tmp_path / "data")
    loop.train(parse_settings(config), tmp_path / "run")
    config.model.hidden_size = 64
    with pytest.raises(ValueError, match=r"another network or optimizer: \d+ arrays differ, e\.g\. .*: \[.*32.*\], exp"):
        loop.train(parse_settings(config), tmp_path / "run", accept_changes=True)
    assert not (tmp_path / "run" / "damaged").exists()


def test_the_flag_reaches_the_loop(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(loop, "train", lambda settings, workdir, **options: seen.append(options))
    arguments = ["--config", "digits:smoke_tokenizer", "--workdir", str(tmp_path)]
    assert train_command.main(arguments) == train_command.main([*arguments, "--accept-changes"]) == 0
    assert [options["accept_changes"] for options in seen] == [False, True]


def folder_of_images(folder) -> None:
    for name in ("a/1", "a/2", "b/3"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (8, 8), (len(name), 0, 0)).save(folder / f"{name}.png")


def test_an_image_that_is_new_missing_or_of_another_size_is_named(tmp_path):
    root = tmp_path / "images"
    folder_of_images(root)
    then = source_contents(make_source({"name": "folder", "path": root}))
    assert list(then["parts"]) == ["a/1.png", "a/2.png", "b/3.png"]
    shutil.copytree(root, tmp_path / "moved")
    assert content_changes(then, source_contents(make_source({"name": "folder", "path": tmp_path / "moved"}))) == []
    shutil.copy(root / "a" / "1.png", root / "b" / "4.png")
    (root / "a" / "2.png").unlink()
    with (root / "b" / "3.png").open("ab") as file:
        file.write(b"more")
    lines = content_changes(then, source_contents(make_source({"name": "folder", "path": root})))
    assert [line.partition(":")[0] for line in lines] == ["a/2.png", "b/3.png", "b/4.png"]
    assert lines[0].endswith("there then, missing now")
    assert lines[2].endswith("new")


def test_long_lists_are_kept_by_folder_and_messages_stop_at_five(tmp_path):
    class Many:
        def __init__(self, size=3):
            self._size = size

        def __len__(self):
            return 4 * MOST_PARTS

        def files(self):
            for number in range(4 * MOST_PARTS):
                yield f"/data/class{number % 8}/{number}.jpg", 1, self._size if number % 8 != 1 or number > 99 else 4

    then, now = source_contents(Many()), source_contents(Many(4))
    assert list(then["parts"]) == [f"class{number}" for number in range(8)]
    lines = content_changes(then, now)
    assert len(lines) == 6
    assert lines[-1] == "... and 3 more"
    assert content_changes(then, source_contents(Many())) == []
    reordered = {**then, "digest": "0"}
    assert content_changes(then, reordered) == ["the files are in another order"]


def test_every_kind_of_source_tells_its_files(tmp_path):
    folder_of_images(tmp_path / "images")
    image = (tmp_path / "images" / "a" / "1.png").read_bytes()
    for number, count in enumerate((3, 2)):
        with tar_writer(tmp_path / f"{number}.tar") as write:
            for label in range(count):
                write(image, label)
        write_tokens(tmp_path / f"{number}.array_record", count)
        write_tokens(tmp_path / f"{number}.jsonl", count)
    for name, pattern in (("webdataset", "*.tar"), ("tokens", "*.array_record"), ("tokens", "*.jsonl")):
        found = source_contents(make_source({"name": name, "paths": str(tmp_path / pattern)}))
        sizes = {part: (examples, size) for part, (examples, size, _) in found["parts"].items()}
        files = [pattern.replace("*", str(number)) for number in range(2)]
        assert sizes == {f: (c, (tmp_path / f).stat().st_size) for f, c in zip(files, (3, 2), strict=True)}
    assert source_contents(make_source({"name": "digits"}))["examples"] == len(make_source({"name": "digits"}))
