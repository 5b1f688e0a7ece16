"""Images of a training that cannot be decoded: the next one takes the place of each, all are named, many end the run."""

import io
import itertools
import pickle
import re
import tarfile
from types import SimpleNamespace

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ml_collections import ConfigDict
from PIL import Image
from test_train import small

from titok_jax.data import loader, records, sources
from titok_jax.data.checked import CheckedSource, Limits, most_replaced
from titok_jax.data.transforms import REPLACED, Undecodable
from titok_jax.runtime import sharding
from titok_jax.training import loop, progress, replaced
from titok_jax.training.settings import open_source, parse_settings

DAMAGED = (3, 7, 8, 19)  # of 20
STANDS_IN = {3: 4, 7: 9, 8: 9, 19: 0}


def png(index: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (index, 2 * index, 0)).save(file, "PNG")
    return file.getvalue()


def images(num: int = 20, damaged=DAMAGED) -> list[bytes]:
    return [png(index)[:60] if index in damaged else png(index) for index in range(num)]


def folder(path, data):
    path.mkdir(exist_ok=True)
    for index, image in enumerate(data):
        (path / f"{index:03d}.png").write_bytes(image)
    return {"name": "folder", "path": str(path)}


def array_record(path, data):
    path.mkdir()
    for shard in range(2):
        with records.image_writer(path / f"{shard}.array_record") as write:
            for index in range(shard * len(data) // 2, (shard + 1) * len(data) // 2):
                write(data[index], index)
    return {"name": "array_record", "paths": str(path / "*")}


def parquet(path, data):
    pq.write_table(pa.table({"image": data, "label": list(range(len(data)))}), path, row_group_size=7)
    return {"name": "parquet", "paths": str(path)}


def tar(path, data):
    with tarfile.open(path, "w") as file:
        for index, image in enumerate(data):
            for ending, content in (("png", image), ("cls", str(index).encode())):
                member = tarfile.TarInfo(f"{index:03d}.{ending}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
    return {"name": "webdataset", "paths": str(path)}


KINDS = {"folder": folder, "array_record": array_record, "parquet": parquet, "webdataset": tar}


@pytest.fixture(params=KINDS)
def source(request, tmp_path):
    return CheckedSource(sources.make_source(KINDS[request.param](tmp_path / "data", images())), Limits(), replace=True)


def test_the_next_image_takes_the_place_of_one_that_cannot_be_decoded(source):
    for index in range(20):
        example = source[index]
        shown = STANDS_IN.get(index, index)
        assert example["image"][0, 0].tolist() == [shown, 2 * shown, 0]
        assert example["label"] in (shown, -1)  # the label is that of the image
        assert example[REPLACED] == (index if index in DAMAGED else -1)
    for index in DAMAGED:
        assert "cannot read these 60 bytes as an image" in source.damage(index)
        assert source.damage(index).startswith(source.where(index))


def draw(example, rng):
    return example | {"draw": rng.integers(0, 2**31)}


def take(source, steps, **options):
    options = {"global_batch_size": 8, "seed": 3, "blocks": [0], "num_blocks": 1} | options
    with loader.make_loader(source, train_transform=draw, **options) as batches:
        return list(itertools.islice(batches, steps)), batches.take_replaced(), batches.take_replaced()


def test_batches_are_the_same_for_any_processes_and_after_a_restart(tmp_path):
    source = CheckedSource(sources.make_source(folder(tmp_path / "data", images())), Limits(), replace=True)
    whole, found, rest = take(source, 5)
    assert sorted(found) == sorted(DAMAGED * 2)  # two epochs
    assert rest == []
    assert whole[0].keys() == {"image", "label", "draw"}

    def same(left, right):
        assert all(np.array_equal(a[key], b[key]) for a, b in zip(left, right, strict=True) for key in a)

    same(take(pickle.loads(pickle.dumps(source)), 3, start_step=2, num_threads=0)[0], whole[2:])
    parts = [take(source, 5, blocks=[index], num_blocks=2) for index in range(2)]
    same(
        [{key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(parts[0][0], parts[1][0], strict=True)], whole
    )
    assert sorted(parts[0][1] + parts[1][1]) == sorted(found)


def test_only_images_of_a_training_are_replaced(tmp_path):
    settings = parse_settings(small("tokenizer"))
    spec = folder(tmp_path / "data", images())
    assert open_source(spec, settings, replace=True)[3][REPLACED] == 3
    with pytest.raises(Undecodable, match=r"003\.png: cannot read"):  # what is held out
        open_source(spec, settings)[3]
    # A label that is out of range is no damage, and neither are tokens.
    labelled = CheckedSource(sources.make_source(parquet(tmp_path / "p", images())), Limits(num_classes=10), replace=True)
    assert labelled[3]["label"] == 4
    with pytest.raises(ValueError, match="row 10: label 10, expected 0 to 9"):
        labelled[10]
    with records.token_writer(tmp_path / "t.array_record") as write:
        for index in range(200):
            write(np.arange(9), index)
    data = bytearray((tmp_path / "t.array_record").read_bytes())
    data[5000] ^= 255
    (tmp_path / "t.array_record").write_bytes(data)
    tokens = open_source({"name": "tokens", "paths": str(tmp_path / "t.array_record")}, settings, replace=True)
    with pytest.raises(ValueError, match=r"t\.array_record, record \d+: damaged, replace the file"):
        [tokens[index] for index in range(200)]


def test_flipped_bytes_of_records_are_replaced_and_named(tmp_path):
    spec = array_record(tmp_path / "data", images(damaged=()))
    path = tmp_path / "data" / "1.array_record"
    data = bytearray(path.read_bytes())
    data[data.index(png(14)) + 40] ^= 255
    path.write_bytes(data)
    source = CheckedSource(sources.make_source(spec), Limits(), replace=True)
    assert [index for index in range(20) if source[index][REPLACED] >= 0] == [14]
    assert re.match(rf"{path}, record 4: damaged, replace the file \(.+\)", source.damage(14))


def test_all_of_them_in_a_row_end_the_search(tmp_path):
    source = CheckedSource(sources.make_source(folder(tmp_path / "data", images(20, range(20)))), Limits(), replace=True)
    with pytest.raises(Undecodable, match=r"11 examples in a row cannot be decoded, the first: .*005\.png: cannot read"):
        source[5]
    assert [most_replaced(num) for num in (0, 10, 1099, 1100, 50_000)] == [10, 10, 10, 11, 500]


def config(path, **changes):
    config = small("tokenizer", **changes)
    config.data.source = ConfigDict({"name": "folder", "path": str(path)})
    config.data.eval_source = ConfigDict({"name": "folder", "path": ""})
    config.data.transform = ConfigDict({"name": "center_crop_flip", "size": 32})
    return config


def test_a_run_goes_on_and_names_them(tmp_path, capsys):
    folder(tmp_path / "data", images(64, (9, 10)))
    loop.train(parse_settings(config(tmp_path / "data")), tmp_path / "run")
    assert (tmp_path / "run" / "pretrained").is_dir()
    out = capsys.readouterr().out
    assert re.search(r"WARNING: \d of \d+ images could not be decoded, and the next one took the place of each\. Found", out)
    for name in ("009", "010"):  # each once, though both were met in two epochs
        assert out.count(f"\n  {tmp_path}/data/{name}.png: cannot read these 60 bytes as an image") == 1
    assert "009.png" in (tmp_path / "run" / "log.txt").read_text()


def test_many_end_the_run_with_their_names(tmp_path, capsys):
    folder(tmp_path / "data", images(64, range(0, 64, 2)))
    with pytest.raises(ValueError, match="images since the start could not be decoded, at most 10 may be") as error:
        loop.train(parse_settings(config(tmp_path / "data")), tmp_path / "run")
    lines = str(error.value).splitlines()
    assert re.match(
        r"1\d of the 32 images since the start .* \(1 %, at least 10\): stopped\. Repair or remove these:", lines[0]
    )
    assert all(re.match(rf"  {tmp_path}/data/\d*[02468]\.png: cannot read", line) for line in lines[1:])
    assert len(lines) > 10
    assert not (tmp_path / "run" / "pretrained").exists()


def test_an_error_names_some_and_says_how_many_more(tmp_path):
    source = CheckedSource(sources.make_source(folder(tmp_path / "data", images(40, range(30)))), Limits(), replace=True)
    with pytest.raises(ValueError, match="30 of the 2,000 images") as error:
        replaced.ReplacedImages(source, 0).check(range(30), 2000)
    assert len(str(error.value).splitlines()) == 22
    assert str(error.value).endswith("and 10 more")
    replaced.ReplacedImages(source, 0).check(range(30), 3000)


def test_processes_agree_on_what_was_replaced(tmp_path, monkeypatch, capsys):
    """Of four processes, the last two read the same part of the batches. All end with the same error."""
    source = CheckedSource(sources.make_source(folder(tmp_path / "data", images(40, range(40)))), Limits(), replace=True)
    own = {0: (0, [1, 2]), 1: (1, []), 2: (2, [5, 5, 6]), 3: (2, [5, 5, 6])}
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    errors = []
    for process, (part, new) in own.items():
        gathered = iter(
            [
                np.array([(part, len(new)) for part, new in own.values()], np.int32),
                np.array([new + [-1] * (3 - len(new)) for _, new in own.values()], np.int32),
            ]
        )

        def gather(value, process=process, gathered=gathered):
            rows = next(gathered)
            np.testing.assert_array_equal(rows[process], value)
            return rows

        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        monkeypatch.setattr(replaced.multihost_utils, "process_allgather", gather)
        monkeypatch.setattr(replaced, "most_replaced", lambda num: 4)
        with pytest.raises(ValueError, match="5 of the 40 images") as error:
            replaced.ReplacedImages(source, part).check(new, 40)
        errors.append(str(error.value))
        assert ("WARNING" in capsys.readouterr().out) == (process == 0)
    assert len(set(errors)) == 1
    assert [re.search(r"(\d+)\.png", line)[1] for line in errors[0].splitlines()[1:]] == ["001", "002", "005", "006"]


def test_previews_of_training_images_show_the_next_one(tmp_path):
    folder(tmp_path / "data", images(64, (0, 9)))
    settings = parse_settings(config(tmp_path / "data", preview_every=6, preview_images=16))
    task = SimpleNamespace(shows_pictures=True, preview=lambda *arrays: {})
    shown = progress.Previews(settings, task, sharding.make_mesh())._batch
    assert shown["image"][:2, 0, 0].tolist() == [[1, 2, 0]] * 2
    assert REPLACED not in shown
