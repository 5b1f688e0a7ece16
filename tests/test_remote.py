"""Paths on gs://, served from memory. Commands read and write there just as they do in a folder."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import fake_gcs
import fsspec
import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import test_checkpoint
import test_train
import tiny_models
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image
from test_distributed import log_of
from test_weights_in_parts import PARTS, split_weights

import titok_jax
from titok_jax import evaluate, parity, pretokenize, reconstruct, sample
from titok_jax.data import token_shards
from titok_jax.data.records import image_writer, token_writer
from titok_jax.data.sources import make_source
from titok_jax.data.webdataset import tar_writer
from titok_jax.evaluation import features, references
from titok_jax.models import TiTokConfig
from titok_jax.runtime import locks, outputs
from titok_jax.runtime import paths as storage
from titok_jax.runtime.shards import Shards
from titok_jax.training import loop
from titok_jax.training.checkpoint import Checkpoints
from titok_jax.training.settings import parse_settings
from titok_jax.weights import model_files, pretrained, published_models
from titok_jax.weights import perceptual_files as perceptual

TOOL = test_train.ROOT / "tools" / "convert_weights.py"
# When one read fails, TensorStore may finish others after their event loop is closed.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning")


class _Bucket(MemoryFileSystem):
    """Stands for gs:// in `etils.epath`. As in a real bucket, a folder is just a prefix of names."""

    protocol = ("gs", "gcs")
    store: dict = {}  # noqa: RUF012 (one for all, as a bucket is)
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://").removeprefix("gcs://"))

    def mkdir(self, path, create_parents=True, **kwargs):
        pass

    def makedirs(self, path, exist_ok=False):
        pass

    def ls(self, path, detail=True, **kwargs):
        """Caches listings unless told not to, as gcsfs does."""
        path = self._strip_protocol(path)
        found = self.dircache[path] if path in self.dircache else super().ls(path, **kwargs)
        self.dircache[path] = found
        return found if detail else sorted(entry["name"] for entry in found)

    def cp_file(self, path1, path2, **kwargs):
        if self.isfile(path1):
            super().cp_file(path1, path2, **kwargs)


@pytest.fixture
def bucket(monkeypatch):
    for name in ("gs", "gcs"):
        fsspec.register_implementation(name, _Bucket, clobber=True)
    monkeypatch.setattr(_Bucket, "store", {})
    monkeypatch.setattr(_Bucket, "pseudo_dirs", [""])
    storage._copied.cache_clear()
    return epath.Path("gs://bucket")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_models.save(tmp_path_factory.mktemp("model") / "model"))


@pytest.fixture
def photos(bucket, tmp_path):
    """The same images in a local folder and in the bucket: (local folder, remote folder)."""
    rng = np.random.default_rng(0)
    for i in range(7):
        data = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (40 + i, 50, 3), np.uint8)).save(data, "PNG")
        for root in (tmp_path / "photos", bucket / "photos"):
            path = root / f"class{i % 2}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data.getvalue())
    return tmp_path / "photos", bucket / "photos"


def objects(folder=""):
    """The names of all objects in the bucket, or in one of its folders."""
    names = (name.removeprefix("/bucket/") for name in _Bucket.store)
    return sorted(name for name in names if name.startswith(folder))


def interrupted():
    return pytest.raises(KeyboardInterrupt)


def same(a, b):
    """Asserts that two sources give the same examples."""
    assert len(a) == len(b) > 0
    for i in range(len(a)):
        assert a[i].keys() == b[i].keys()
        for name in a[i]:
            np.testing.assert_array_equal(a[i][name], b[i][name])


def test_no_output_has_a_name_that_fsspec_takes_for_a_pattern(bucket):
    for check in (lambda path: outputs.check_output(path, True), lambda path: locks.lock_run(path).__enter__()):
        with pytest.raises(ValueError, match=r"cannot write gs://bucket/run \[1\].*: names in a bucket may have no"):
            check("gs://bucket/run [1]/x.npz")
    assert not (bucket / "run [1]").exists()


def test_a_model_is_saved_and_loaded(bucket):
    folder = bucket / "models/digits"
    tiny_models.save(str(folder))
    with pytest.raises(FileExistsError, match="gs://bucket/models/digits exists"):
        tiny_models.save(str(folder))
    for source in (str(folder), folder):
        tokenizer, generator = titok_jax.load_pair(source)
        assert (tokenizer.config, generator.config) == (tiny_models.TOKENIZER, tiny_models.GENERATOR)
        expected = tiny_models.params(tiny_models.GENERATOR)
        for a, b in zip(jax.tree.leaves(generator.params), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(
        FileNotFoundError, match=r"gs://bucket/nothing is no model folder: it has no config\.json and no mod"
    ):
        model_files.locate("gs://bucket/nothing")


def test_all_forms_of_a_model_are_found(bucket, tmp_path):
    """Weights in parts, a file of one's own name, and the checkpoint folder of the published trainer."""
    local = tiny_models.save(tmp_path / "model", tiny_models.TOKENIZER)
    split_weights(local)
    checkpoint = tiny_models.save(tmp_path / "checkpoint-5" / "ema_model", tiny_models.TOKENIZER).parent
    (checkpoint / "optimizer.bin").touch()
    for path in filter(Path.is_file, tmp_path.rglob("*")):
        remote = bucket / "parts" / path.relative_to(tmp_path)
        remote.write_bytes(path.read_bytes())
    for source in ("parts/model", "parts/model/model.safetensors.index.json", "parts/checkpoint-5"):
        params = pretrained.load(f"gs://bucket/{source}", TiTokConfig)[1]
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(tiny_models.params(tiny_models.TOKENIZER)), strict=True):
            np.testing.assert_array_equal(a, b)
    for name in ("config.json", PARTS[0], PARTS[2], "model.safetensors.index.json"):
        (bucket / "short" / name).write_bytes((local / name).read_bytes())
    with pytest.raises(FileNotFoundError, match=f"of its 3 files there are missing: {PARTS[1]}"):
        pretrained.load("gs://bucket/short", TiTokConfig)


@pytest.fixture
def clock(monkeypatch):
    """A list of functions. Each time the lock waits, it calls the next one."""
    events = []
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: events.pop(0)() if events else None)
    monkeypatch.setattr(locks, "BEAT", 1e6)  # nothing beats by itself
    return events


@pytest.fixture(scope="module")
def server():
    with fake_gcs.serve(_Bucket()) as server:
        yield server


@pytest.fixture
def google(bucket, server, monkeypatch):
    """The server through which Orbax's arrays reach the bucket."""
    monkeypatch.setattr(server, "asked", [])
    monkeypatch.setattr(server, "refuse", lambda method, name: None)
    return server


def test_a_run_lives_in_a_bucket(bucket, google, clock, tmp_path, monkeypatch, capsys):
    """Though interrupted, and though the server fails once, the run ends like the same run in a folder."""
    config = test_train.small("tokenizer", checkpoint_every=2, preview_every=3)
    straight = loop.train(parse_settings(config), tmp_path / "folder")
    monkeypatch.chdir(tmp_path / "folder")
    before = sorted((tmp_path / "folder").rglob("*"))
    real_write = loop.MetricLog.write

    def crash(self, step, metrics, **options):
        real_write(self, step, metrics, **options)
        if step == 4:
            raise test_train.Stopped

    failures = [503]
    google.refuse = lambda method, name: failures.pop() if failures and method == "POST" else None
    with monkeypatch.context() as patch:
        patch.setattr(loop.MetricLog, "write", crash)
        with pytest.raises(test_train.Stopped):
            loop.train(parse_settings(config), "gs://bucket/runs/one")
    assert not failures
    test_train.assert_same_state(straight, loop.train(parse_settings(config), "gs://bucket/runs/one"))
    assert "Continuing at step 2 of 6 from gs://bucket/runs/one/checkpoints" in capsys.readouterr().out
    run = bucket / "runs/one"
    assert sorted({name.split("/")[2] for name in objects("runs/one/")}) == sorted(
        ["checkpoints", "config.json", "curves.png", "log.txt", "metrics.jsonl", "pretrained", "previews", "tensorboard"]
    )
    assert sorted({name.split("/")[3] for name in objects("runs/one/checkpoints/")}) == ["4", "6"]
    assert any("/checkpoints/6/state/" in name for _, name in google.asked)
    assert [line["step"] for line in log_of(run)] == [2, 4, 6]
    assert sorted(path.name for path in (run / "previews").iterdir()) == ["0000003.png", "0000006.png"]
    loop.train(parse_settings(config), "gs://bucket/runs/one")  # the run is complete already; the log stays
    assert [line["step"] for line in log_of(run)] == [2, 4, 6]
    assert titok_jax.load_tokenizer(str(run / "pretrained")).config.codebook_size == config.model.codebook_size
    assert sorted((tmp_path / "folder").rglob("*")) == before  # no folder "gs:" appears in the current folder


def save(folder, step, keep=2):
    with Checkpoints(folder, keep=keep) as checkpoints:
        checkpoints.save(step, test_checkpoint.state(step), test_checkpoint.CONFIG)


def go_on(folder):
    """Resumes from a checkpoint -> its step. Its state must be the saved one. Then the next checkpoint is saved."""
    with Checkpoints(folder) as checkpoints:
        step, state = test_checkpoint.restore(checkpoints)
        test_train.assert_same_state(state, test_checkpoint.state(step))
        checkpoints.save(step + 1, test_checkpoint.state(step + 1), test_checkpoint.CONFIG)
    return step


def contents():
    return {path: file.getvalue() for path, file in _Bucket.store.copy().items()}


def fill(contents):
    _Bucket.store.clear()
    for path, data in contents.items():
        _Bucket().pipe_file(path, data)


def test_whichever_object_of_a_checkpoint_is_damaged_none_is_read_wrong(bucket, google, capsys):
    """One object is deleted, emptied or cut in half. Either the checkpoint can be read correctly all the same, or the one
    before it is read and this one is put aside."""
    for step in (1, 2):
        save(bucket / "run/checkpoints", step)
    saved, newest, fatal = contents(), objects("run/checkpoints/2/"), set()
    for name in newest:
        for part in (None, 0, 0.5):
            fill(saved)
            data = (bucket / name).read_bytes()
            (bucket / name).unlink() if part is None else (bucket / name).write_bytes(data[: int(part * len(data))])
            left = objects("run/checkpoints/2/")
            step, printed = go_on(bucket / "run/checkpoints"), capsys.readouterr().out
            if step == 2:
                assert objects("run/checkpoints/2/") == left
                continue
            assert not {n for n in left if "/d/" in n} & {*objects()}  # the new checkpoint 2 has only new objects
            if name == "run/checkpoints/2/commit_success.txt":
                assert objects("run/damaged/") == []  # treated like the remains of a killed run
            else:
                assert "warning: the checkpoint of step 2 cannot be read (" in printed
                assert objects("run/damaged/") == ["run/damaged/2.txt", *(n.replace("checkpoints", "damaged") for n in left)]
                fatal.add(name.removeprefix("run/checkpoints/2/"))
    arrays = max((n for n in newest if "/ocdbt" in n), key=lambda n: len(saved["/bucket/" + n]))
    assert {"config/metadata", "state/manifest.ocdbt", arrays.removeprefix("run/checkpoints/2/")} <= fatal


def test_a_save_may_be_killed_at_any_moment(bucket, google, monkeypatch):
    """Tests a kill after every change that a save makes in the bucket, up to the removal of the replaced checkpoint's last
    object."""
    moments = []

    class Watched(dict):
        def __setitem__(self, path, file):
            super().__setitem__(path, file)
            moments.append(contents())

        def __delitem__(self, path):
            super().__delitem__(path)
            moments.append(contents())

    monkeypatch.setattr(_Bucket, "store", Watched())
    save(bucket / "run", 1, keep=1)
    before = len(moments)
    save(bucket / "run", 2, keep=1)
    moments = moments[before:]
    assert {name.split("/")[1] for name in objects()} == {"2"}
    monkeypatch.setattr(_Bucket, "store", {})
    steps = []
    for moment in moments:
        fill(moment)
        left = {name for name in objects("run/2/") if "/d/" in name}
        steps.append(go_on(bucket / "run"))
        assert steps[-1] == 2 or not left & {*objects()}  # nothing that it had written is left
        assert go_on(bucket / "run") == steps[-1] + 1
    assert steps == sorted(steps)
    assert min(steps.count(step) for step in (1, 2)) > 5


def test_a_bucket_that_may_not_be_read_is_no_damage(bucket, google):
    for step in (1, 2):
        save(bucket / "run", step)
    before = objects()
    google.refuse = lambda method, name: 403 if "/2/state/" in name else None
    with pytest.raises(
        OSError, match=r"step 2 in gs://bucket/run cannot be read now .*PERMISSION_DENIED.*nothing was changed"
    ):
        go_on(bucket / "run")
    assert objects() == before
    google.refuse = lambda method, name: None
    assert go_on(bucket / "run") == 2


def test_a_bucket_that_may_not_be_written_ends_the_run(bucket, google):
    save(bucket / "run", 1)
    google.refuse = lambda method, name: 403 if method == "POST" else None
    with pytest.raises(OSError, match=r"cannot be written to gs://bucket/run .*newest complete one, of step 1, is intact"):
        save(bucket / "run", 2)
    google.refuse = lambda method, name: None
    assert any(name.startswith("run/2/") for name in objects())
    save(bucket / "run", 3)
    assert {name.split("/")[1] for name in objects()} == {"1", "3"}


def test_a_bucket_whose_metadata_may_not_be_read_is_told(bucket, google, monkeypatch):
    """Orbax asks for the bucket's metadata. A role for objects only does not grant that."""

    def forbidden(name):
        raise RuntimeError(f"403 GET /storage/v1/b/{name}: no storage.buckets.get access to the bucket")

    monkeypatch.setattr(google.client, "get_bucket", forbidden)
    with pytest.raises(OSError, match=r"checkpoints in gs://bucket/run cannot be listed \(.*403 GET.*storage\.buckets\.get"):
        save(bucket / "run", 1)
    assert objects() == []


def test_a_second_run_is_refused_while_the_first_lives(bucket, clock):
    with locks.lock_run(bucket / "run") as first:
        clock += [lambda: None, first.beat]
        with (
            pytest.raises(ValueError, match=r"another run \(.*, process \d+\) is at work in gs://bucket/run; wait for it"),
            locks.lock_run(bucket / "run"),
        ):
            pass
        assert not clock
        first.beat()
        first.check()  # the other run did not disturb it
        assert objects() == ["run/.lock"]
    assert objects() == []


def test_the_lock_of_a_killed_run_is_taken_over(bucket, clock, capsys):
    (bucket / "run/.lock").write_text("host-3, process 17, 0123\n5\n")
    looked = []
    clock += [lambda: looked.append((bucket / "run/.lock").read_text())] * 3
    with locks.lock_run(bucket / "run") as now:
        assert len(looked) == 3
        assert "a run (host-3, process 17) began here and has not ended in order" in capsys.readouterr().out
        now.beat()
        assert not (bucket / "run/.lock").read_text().startswith("host-3")
    assert objects() == []


def test_what_is_no_lock_is_left_alone(bucket, clock):
    (bucket / "run/.lock").write_text("mine")
    with pytest.raises(FileExistsError, match=r"gs://bucket/run/\.lock is of other origin"), locks.lock_run(bucket / "run"):
        pass
    assert (bucket / "run/.lock").read_text() == "mine"


def test_a_lock_that_is_given_back_meanwhile_is_free(bucket, clock):
    first = locks.BucketLock(bucket / "run/.lock")
    assert first.acquire()
    clock += [first.release]
    with locks.lock_run(bucket / "run"):
        assert objects() == ["run/.lock"]


def test_of_two_runs_that_begin_in_the_same_moment_one_goes_on(bucket, clock):
    """Both have found no lock, and both write one."""
    first, second = (locks.BucketLock(bucket / "run/.lock") for _ in range(2))
    clock += [second._write]
    assert not first.acquire()
    assert (bucket / "run/.lock").read_text().startswith(second._name)  # the second goes on


def test_who_lost_the_lock_writes_nothing_more(bucket, clock, tmp_path, monkeypatch):
    with locks.lock_run(bucket / "run") as first:
        (bucket / "run/.lock").write_text("host-3, process 17, 0123\n1\n")
        with pytest.raises(OSError, match=r"another run \(host-3, process 17, 0123\) has taken gs://bucket/run over"):
            first.check()
        first.beat()
    assert (bucket / "run/.lock").read_text() == "host-3, process 17, 0123\n1\n"  # the loser does not take the lock back


# ---------------------------------------------------------------------------------------------------------------------
# Data


def test_images_of_a_folder(photos):
    local, remote = (make_source({"name": "folder", "path": str(path)}) for path in photos)
    same(local, remote)
    assert remote.class_names == ["class0", "class1"]
    assert remote.paths[0] == "gs://bucket/photos/class0/0.png"
    with pytest.raises(FileNotFoundError, match="gs://bucket/nothing: no such folder"):
        make_source({"name": "folder", "path": "gs://bucket/nothing"})


def test_of_a_tar_the_images_asked_for_are_read(photos, bucket, tmp_path, monkeypatch):
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for file in sorted((photos[0] / f"class{number}").iterdir()):
                tar.add(file, file.name)
                member = tarfile.TarInfo(file.stem + ".cls")
                member.size = 1
                tar.addfile(member, io.BytesIO(str(number).encode()))
        epath.Path(tmp_path / f"{number}.tar").copy(bucket / f"tars/{number}.tar")
    local = make_source({"name": "webdataset", "paths": str(tmp_path / "*.tar")})
    remote = make_source({"name": "webdataset", "paths": "gs://bucket/t*s/{0..1}.tar"})
    asked = []
    whole = _Bucket.cat_file
    monkeypatch.setattr(
        _Bucket, "cat_file", lambda self, *a, start=None, end=None: asked.append(end - start) or whole(self, *a, start, end)
    )
    same(local, remote)
    assert [int(remote[i]["label"]) for i in range(7)] == [0, 0, 0, 0, 1, 1, 1]
    assert max(asked) < 10_000 < len((bucket / "tars/0.tar").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"gs://bucket/tars/\*\.zip: no such file, and no file matches"):
        make_source({"name": "webdataset", "paths": "gs://bucket/tars/*.zip"})
    with pytest.raises(FileNotFoundError, match=r"gs://bucket/tars/2\.tar: no such file"):
        make_source({"name": "webdataset", "paths": "gs://bucket/tars/{0..2}.tar"})
    same(remote, make_source({"name": "webdataset", "paths": "gs://bucket/**/*.tar"}))
    for number in range(2):
        (bucket / f"tars/{number}.tar").copy(bucket / f"run [1] {{a,b}}/x-0000{number}-of-00002.tar")
    odd = "gs://bucket/run [1] {a,b}"
    same(remote, make_source({"name": "webdataset", "paths": f"{odd}/*.tar"}))
    same(remote, make_source({"name": "webdataset", "paths": f"{odd}/x-{{00000..00001}}-of-00002.tar"}))
    with token_writer(tmp_path / "a.jsonl") as write:
        write(np.arange(3), 1)
    (bucket / "run [1] {a,b}/a.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes())
    assert len(make_source({"name": "tokens", "paths": f"{odd}/*.jsonl"})) == 1
    del _Bucket.store["/bucket/run [1] {a,b}/x-00001-of-00002.tar"]  # fsspec removes what such a name matches as a glob
    with pytest.raises(FileNotFoundError, match=r"\{a,b\}: x-00001-of-00002\.tar of 2 shards missing"):
        make_source({"name": "webdataset", "paths": f"{odd}/*.tar"})


def images_in_files(folder):
    """The same images as two tars and two Parquet files in a local folder."""
    for number in range(2):
        rows = []
        with tar_writer(folder / f"{number}.tar") as write:
            for index in range(3):
                data = io.BytesIO()
                noise = np.random.default_rng([number, index]).integers(0, 256, (40, 50, 3), np.uint8)
                Image.fromarray(noise).save(data, "PNG")
                write(data.getvalue(), index)
                rows.append({"image": {"bytes": data.getvalue()}, "label": index})
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{number}.parquet", row_group_size=2)
    return folder


@pytest.mark.parametrize("kind", ["gs", "s3", "https"])
def test_tars_and_parquet_files_are_read_there(kind, bucket, tmp_path, monkeypatch):
    """The bucket also stands for s3:// and for a web server."""
    images_in_files(tmp_path)
    for file in tmp_path.iterdir():
        epath.Path(file).copy(bucket / f"images/{file.name}")
    if kind != "gs":
        strip = _Bucket._strip_protocol.__func__
        fsspec.register_implementation(kind, _Bucket, clobber=True)
        named = classmethod(lambda cls, path: strip(cls, str(path).removeprefix(f"{kind}://")))
        monkeypatch.setattr(_Bucket, "_strip_protocol", named)
        monkeypatch.setattr(_Bucket, "protocol", (kind,))
    for name, suffix in (("webdataset", "tar"), ("parquet", "parquet")):
        local = make_source({"name": name, "paths": str(tmp_path / f"*.{suffix}")})
        remote = make_source({"name": name, "paths": f"{kind}://bucket/images/{{0..1}}.{suffix}"})
        same(local, pickle.loads(pickle.dumps(remote)))
        pattern = f"{kind}://bucket/images/*.{suffix}"
        if kind == "https":
            with pytest.raises(ValueError, match=r"\*\.\w+: the web lists no files for \*; name them, e\.g\. by braces"):
                make_source({"name": name, "paths": pattern})
        else:
            same(local, make_source({"name": name, "paths": pattern}))
        with pytest.raises(FileNotFoundError, match=rf"{kind}://bucket/images/2\.{suffix}: no such file"):
            make_source({"name": name, "paths": f"{kind}://bucket/images/{{1..2}}.{suffix}"})
    if kind != "https":
        return
    source = make_source({"name": "webdataset", "paths": "https://bucket/images/0.tar"})
    monkeypatch.setattr(_Bucket, "cat_file", lambda self, *a, **k: bytes(10_000_000))
    with pytest.raises(OSError, match=r"https://bucket/images/0\.tar: this server sends whole files, not parts"):
        source[0]

    error = type("ClientResponseError", (Exception,), {"__module__": "aiohttp.client_exceptions"})

    def fails(self, *args, **kwargs):
        raise error("502 Bad Gateway")

    monkeypatch.setattr(_Bucket, "cat_file", fails)
    with pytest.raises(OSError, match=r"https://bucket/images/0\.tar cannot be read: 502 Bad Gateway"):
        source[0]
    monkeypatch.setattr(_Bucket, "_open", fails)
    for name, suffix in (("webdataset", "tar"), ("parquet", "parquet")):
        with pytest.raises(OSError, match=rf"https://bucket/images/1\.{suffix} cannot be read: 502 Bad Gateway"):
            make_source({"name": name, "paths": f"https://bucket/images/1.{suffix}"})
    with pytest.raises(ValueError, match=r"https://bucket/a: https:// is only for tars \(webdataset\) and Parquet files"):
        storage.as_path("https://bucket/a")


@pytest.mark.parametrize("form", ["array_record", "jsonl"])
def test_tokens_are_written_there_whole_and_read(form, bucket, tmp_path):
    for path in (tmp_path / f"0.{form}", bucket / f"tokens/0.{form}"):
        with token_writer(path) as write:
            for i in range(5):
                write(np.arange(8) + i, i)
            assert objects() == []
    assert objects() == [f"tokens/0.{form}"]
    same(*(make_source({"name": "tokens", "paths": f"{root}/*.{form}"}) for root in (tmp_path, bucket / "tokens")))
    with interrupted(), token_writer(bucket / f"tokens/1.{form}") as write:
        write(np.arange(8), 0)
        raise KeyboardInterrupt
    assert objects() == [f"tokens/0.{form}"]
    # As for local files, a pattern does not match what a killed upload may have left.
    (bucket / f"tokens/0.{form}").copy(bucket / f"tokens/.1.partial-{17:016x}.{form}")
    assert len(make_source({"name": "tokens", "paths": f"gs://bucket/tokens/*.{form}"})) == 5


def test_what_needs_a_mounted_bucket_says_so(bucket):
    with image_writer(bucket / "images/0.array_record") as write:
        write(b"no image", 3)
    assert objects() == ["images/0.array_record"]
    for source in (
        {"name": "array_record", "paths": "gs://bucket/images/*.array_record"},
        {"name": "tfds", "path": "gs://bucket/imagenet2012/5.1.0", "split": "train"},
        {"name": "tfds", "dataset": "imagenet2012", "data_dir": "gs://bucket", "split": "train"},
    ):
        with pytest.raises(ValueError, match=r"gs://bucket\S*: .* is read from files.*mount it .*with_bucket\.sh"):
            make_source(source)


# ---------------------------------------------------------------------------------------------------------------------
# Outputs


def test_a_file_appears_whole_or_not_at_all(bucket):
    path = bucket / "folder/a.txt"
    with outputs.new_file(path, replace=False) as partial:
        partial.write_text("one")
        assert objects() == []
    assert objects() == ["folder/a.txt"]
    with interrupted(), outputs.new_file(path, replace=True) as partial:
        partial.write_text("two")
        raise KeyboardInterrupt
    assert objects() == ["folder/a.txt"]
    assert path.read_text() == "one"


def test_an_interrupted_upload_changes_nothing(bucket, monkeypatch):
    """A writer's content appears when the writer is closed, and an interrupt closes it."""
    path = bucket / "a.txt"
    path.write_text("one")

    def copy(self, place, overwrite):
        with epath.Path(place).open("wb") as file:
            file.write(b"tw")
            raise KeyboardInterrupt

    monkeypatch.setattr(type(path), "copy", copy)
    with interrupted(), outputs.new_file(path, replace=True) as partial:
        partial.write_text("two")
    assert objects() == ["a.txt"]
    assert path.read_text() == "one"


def test_a_folder_is_whole_when_it_holds_its_last_file(bucket, monkeypatch):
    folder, order = bucket / "folder", []
    for name in ("stale.txt", "in/stale.txt", "a.txt", "last.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("old")
    copy = type(folder).copy

    def recorded(self, place, overwrite):
        order.append((epath.Path(place).name, (folder / "last.txt").exists()))
        return copy(self, place, overwrite)

    monkeypatch.setattr(type(folder), "copy", recorded)
    with outputs.new_folder(folder, files=r"(in/)?\w+\.txt", replace=True, last="last.txt") as partial:
        for name in ("a.txt", "last.txt", "z.txt"):
            (partial / name).write_text("new")
    assert objects() == ["folder/a.txt", "folder/last.txt", "folder/z.txt"]
    assert all((folder / name).read_text() == "new" for name in ("a.txt", "last.txt", "z.txt"))
    assert [name for name, _ in order][2].startswith(".last.partial-")
    assert not any(there for _, there in order)


def test_what_appears_during_the_work_is_not_replaced(bucket):
    def write(name, replace):
        options = {"files": r"a\.txt", "replace": replace}
        folder = name.endswith("/")
        with (
            outputs.new_folder(bucket / name, **options) if folder else outputs.new_file(bucket / name, replace=False) as new
        ):
            (new / "a.txt" if folder else new).write_text("new")
            (bucket / "folder/in/.notes.txt" if folder else bucket / "file.txt").write_text("mine")

    for name, replace in (("file.txt", False), ("folder/", False), ("folder/", True)):
        with pytest.raises(
            FileExistsError, match=r"/(file\.txt|folder\S*) has appeared .*; what was made is gs\S+$"
        ) as error:
            write(name, replace)
        kept = epath.Path(str(error.value).rpartition(" ")[2])
        made = kept / "a.txt" if name == "folder/" else kept
        assert made.read_text() == "new"
        other = "folder/in/.notes.txt" if name == "folder/" else name
        assert objects() == sorted([str(made).removeprefix("gs://bucket/"), other])
        assert (bucket / other).read_text() == "mine"
        made.unlink()
        (bucket / other).unlink()


def test_outputs_there_are_refused_as_here(bucket, monkeypatch):
    (bucket / "a.png").write_text("mine")
    (bucket / "folder/mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"gs://bucket/a\.png exists and nothing was overwritten"):
        outputs.check_output("gs://bucket/a.png", False)
    assert outputs.check_output("gs://bucket/a.png", True) == bucket / "a.png"
    with pytest.raises(ValueError, match="it is a folder, expected a file"):
        outputs.check_output("gs://bucket/folder", True)
    with pytest.raises(ValueError, match="it is a file, not a folder"):
        outputs.check_output("gs://bucket/a.png", True, folder_of="x")
    with pytest.raises(FileExistsError, match=r"files of other origin \(mine\.txt\)"):
        outputs.check_output("gs://bucket/folder", True, folder_of="x")
    assert outputs.check_output("gs://bucket/b.png", False) == bucket / "b.png"
    assert objects() == ["a.png", "folder/mine.txt"]

    def denied(self, *args, **kwargs):
        raise OSError("Forbidden: no storage.objects.create\nmore")

    monkeypatch.setattr(_Bucket, "_open", denied)
    with pytest.raises(
        PermissionError, match=r"cannot write gs://bucket/b\.png: Forbidden: no storage\.objects\.create; does"
    ):
        outputs.check_output("gs://bucket/b.png", False)


def test_without_what_reaches_it_the_error_says_what_to_install(monkeypatch, capsys):
    def absent(protocol):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "get_filesystem_class", absent)
    assert sample.main(["--out", "gs://bucket/a.png"]) == 2
    message = (
        "gs://bucket/a.png cannot be reached (Please install gcsfs to access Google Storage): pip install 'etils[epath-gcs]'"
    )
    assert message in capsys.readouterr().err
    with pytest.raises(OSError, match=r"gs://bucket/run cannot be reached"):
        loop.train(parse_settings(test_train.small("tokenizer")), "gs://bucket/run")
    for address, extra in (("s3://bucket", "s3"), ("http://host", "http"), ("https://host", "http")):
        for kind in ("webdataset", "parquet"):
            message = rf"{address}/a cannot be reached \(.*\): pip install 'titok_jax\[{extra}\]'"
            with pytest.raises(OSError, match=message):
                make_source({"name": kind, "paths": f"{address}/a"})
    with pytest.raises(ValueError, match="ftp://host/x: unknown storage ftp://, expected a path of this machine or gs://"):
        storage.as_path("ftp://host/x")


def test_pieces_of_a_long_job(bucket):
    def job(**changes):
        restart = changes.pop("restart", False)
        return Shards(bucket / "out.shards", {"seed": 0} | changes, length=5, size=2, restart=restart)

    shards = job()
    shards.write(0, x=np.arange(2))
    shards.write(2, x=np.arange(4, 5))
    again = job()
    assert again.missing() == [1]
    with pytest.raises(ValueError, match="unfinished work with other settings"):
        job(seed=1)
    again.write(1, x=np.arange(2, 4))
    assert np.concatenate([piece["x"] for piece in job()]).tolist() == [0, 1, 2, 3, 4]
    (bucket / f"out.shards/.00001.partial-{17:016x}.npz").write_text("half")  # left by a killed process
    (bucket / "out.shards/0001_mine.npz").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds files of other origin \(0001_mine.npz\)"):
        job(seed=1, restart=True)
    again.remove()
    assert objects() == ["out.shards/0001_mine.npz"]


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def run(command, *arguments):
    assert command.main([str(argument) for argument in arguments]) == 0


def refused(capsys, command, *arguments):
    assert command.main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


def arrays(path):
    with epath.Path(path).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
        return dict(file)


def test_a_second_command_is_refused_while_the_first_lives(bucket, clock, capsys):
    for command, out, options in ((sample, "a.png", {}), (reconstruct, "folder", {"beside": True})):
        with locks.lock_run(bucket / (out if options else f"{out}.shards"), **options) as first:
            clock += [lambda: None, first.beat]
            error = refused(capsys, command, "--out", bucket / out)
            assert f"gs://bucket/{out}" in error
            assert "is at work in" in error
            assert not clock
    assert objects() == []


@pytest.mark.usefixtures("clock")
def test_samples(model, bucket, tmp_path, capsys, monkeypatch):
    """Also with a model in the bucket. The samples are pictures of noise, which need no compilation."""
    tiny_models.save(bucket / "model")
    made = []

    def noise(tokenizer, generator, labels, seed, *, batch_size, numbers, **settings):
        for batch in numbers:
            if len(made) == 2:
                made.append("killed")
                raise KeyboardInterrupt
            made.append(batch)
            where = slice(batch * batch_size, min((batch + 1) * batch_size, len(labels)))
            shape = (where.stop - where.start, 32, 32, 3)
            yield where, None, np.random.default_rng(batch).integers(0, 256, shape, np.uint8)

    monkeypatch.setattr(sample, "sample", noise)

    def arguments(model, out):
        return "--model", model, "--num", 5, "--batch-size", 2, "--out", out

    with interrupted():
        run(sample, *arguments(bucket / "model", "gs://bucket/samples.npz"))
    assert [name for name in objects() if "samples" in name] == [
        f"samples.npz.shards/{name}" for name in ("00000.npz", "00001.npz", "settings.json")
    ]
    for name in ("samples.npz", "grid.png", "folder/"):
        run(sample, *arguments(bucket / "model", f"gs://bucket/{name}"))
        run(sample, *arguments(model, f"{tmp_path}/{name}"))
        message = f"error: gs://bucket/{name.strip('/')} exists and nothing was overwritten"
        assert message in refused(capsys, sample, *arguments(bucket / "model", f"gs://bucket/{name}"))
    assert made[:6] == [0, 1, "killed", 2, 0, 1]
    assert not [name for name in objects() if ".shards" in name or "partial" in name]
    local, remote = arrays(tmp_path / "samples.npz"), arrays(bucket / "samples.npz")
    assert local.keys() == remote.keys() == {"arr_0", "labels"}
    np.testing.assert_array_equal(local["arr_0"], remote["arr_0"])
    assert (tmp_path / "grid.png").read_bytes() == (bucket / "grid.png").read_bytes()
    files = sorted(path.name for path in (tmp_path / "folder").iterdir())
    assert len(files) == 6
    assert objects("folder/") == [f"folder/{name}" for name in files]
    assert all((tmp_path / "folder" / name).read_bytes() == (bucket / "folder" / name).read_bytes() for name in files)


@pytest.mark.usefixtures("clock")
def test_reconstructions(model, photos, bucket, tmp_path, capsys):
    local, remote = photos
    run(reconstruct, "--model", model, local, "--out", tmp_path / "out")
    run(reconstruct, "--model", model, remote, "--out", "gs://bucket/out")
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(files) == 10
    assert objects("out/") == [f"out/{name}" for name in files]
    for name in set(files) - {"tokens.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (bucket / "out" / name).read_bytes()
    here, there = (json.loads((root / "out/tokens.json").read_text()) for root in (tmp_path, bucket))
    assert list(there) == [f"gs://bucket/photos/class{i % 2}/{i}.png" for i in (0, 2, 4, 6, 1, 3, 5)]
    assert list(here.values()) == list(there.values())
    arguments = ("--model", model, remote / "class0/0.png", "--out", "gs://bucket/out")
    assert "gs://bucket/out exists and nothing was overwritten" in refused(capsys, reconstruct, *arguments)
    assert "gs://bucket/no.png: no such file" in refused(capsys, reconstruct, "--model", model, "gs://bucket/no.png")
    options = ("--model", model, remote / "class0/0.png", "--reconstruction", remote / "class0/2.png")
    assert "gs://bucket/photos/class0/2.png: 50 x 42 pixels" in refused(capsys, parity, *options)


@pytest.mark.usefixtures("clock")
def test_pretokenizing_goes_on(model, photos, bucket, tmp_path, monkeypatch, capsys):
    local, remote = photos
    options = ("--model", model, "--shards", 3, "--batch-size", 4)
    run(pretokenize, local, *options, "--out", tmp_path / "tokens")
    encoded = []
    records = token_shards.records

    def stopped_in_the_second(source, positions, **options):
        for record in records(source, positions, **options):
            encoded.append(positions)
            if len(set(encoded)) == 2:
                raise KeyboardInterrupt
            yield record

    with monkeypatch.context() as patch, interrupted():
        patch.setattr(token_shards, "records", stopped_in_the_second)
        run(pretokenize, remote, *options, "--out", "gs://bucket/tokens")
    first = "tokens/tokens-00000-of-00003.array_record"
    assert objects("tokens/") == ["tokens/pretokenize.json", first]
    before = (bucket / first).read_bytes()
    (bucket / first).write_bytes(before + b"not written again")
    run(pretokenize, remote, *options, "--out", "gs://bucket/tokens")
    assert "wrote 2 shards of gs://bucket/tokens; 1 were there" in capsys.readouterr().out
    assert (bucket / first).read_bytes() == before + b"not written again"
    (bucket / first).write_bytes(before)
    same(*(make_source({"name": "tokens", "paths": f"{root}/tokens/*.array_record"}) for root in (tmp_path, bucket)))
    assert "was begun with other settings" in refused(
        capsys, pretokenize, remote, *options, "--out", "gs://bucket/tokens", "--seed", 1
    )


@pytest.mark.usefixtures("clock")
def test_evaluations(model, photos, bucket, tmp_path, capsys):
    options = ("--model", model, "--features", "digits", "--batch-size", 8)
    for root, images in ((tmp_path, photos[0]), (bucket, photos[1])):
        run(evaluate, *options, "--reconstruct", images, "--json", root / "reconstruction.json")
        run(evaluate, *options, "--reference", images, "--save-reference", root / "reference.npz")
    samples = np.random.default_rng(1).integers(0, 256, (8, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "samples.npz", samples, labels=np.arange(8))
    epath.Path(tmp_path / "samples.npz").copy(bucket / "samples.npz")
    for root in (tmp_path, bucket):
        arguments = ("--samples", root / "samples.npz", "--reference", root / "reference.npz")
        run(evaluate, *arguments, "--features", "digits", "--json", root / "samples.json")
    for name in ("reconstruction", "samples"):
        here, there = (json.loads((root / f"{name}.json").read_text()) for root in (tmp_path, bucket))
        assert here["metrics"] == there["metrics"]
        assert len(here["metrics"]) >= 4
    here, there = arrays(tmp_path / "reference.npz"), arrays(bucket / "reference.npz")
    np.testing.assert_array_equal(here["sigma"], there["sigma"])
    assert objects() == sorted(
        [*objects("photos/"), "reconstruction.json", "reference.npz", "samples.json", "samples.npz"]
    )  # no unfinished work is left
    arguments = (*options, "--reconstruct", photos[1], "--json", bucket / "reconstruction.json")
    assert "gs://bucket/reconstruction.json exists and nothing was overwritten" in refused(capsys, evaluate, *arguments)
    arguments = (*options, "--reference", bucket / "no.npz", "--json", bucket / "b.json")
    assert "--reference gs://bucket/no.npz: no such file" in refused(capsys, evaluate, *arguments)
    (bucket / "bad.npz").write_text("no zip")
    arguments = ("--samples", bucket / "bad.npz", "--reference", bucket / "reference.npz")
    assert "gs://bucket/bad.npz is no .npz file that can be read" in refused(capsys, evaluate, *arguments)
    with pytest.raises(ValueError, match=r"gs://bucket/bad\.npz is no \.npz file that can be read"):
        references.read_reference(bucket / "bad.npz", "digits", 32)


def test_weights_are_converted(tool, bucket, capsys):
    tiny_models.save(bucket / "model", tiny_models.TOKENIZER)
    run(tool, "gs://bucket/model", "gs://bucket/a.safetensors")
    assert objects("a.") == ["a.json", "a.safetensors"]
    run(tool, "gs://bucket/a.safetensors", "gs://bucket/again/")
    assert objects("again/") == ["again/config.json", "again/model.safetensors"]
    for name in ("config.json", "model.safetensors"):
        assert (bucket / "model" / name).read_bytes() == (bucket / "again" / name).read_bytes()
    message = "gs://bucket/{} exists and nothing was overwritten"
    for name in ("a.safetensors", "again/"):
        assert message.format(name.strip("/")) in refused(capsys, tool, "gs://bucket/model", f"gs://bucket/{name}")


def test_weights_of_other_networks(bucket, tmp_path):
    """Weights of networks for features and losses. The function that reads all weight files reads them too."""
    epath.Path(features.DIGITS_WEIGHTS).copy(bucket / "digits.safetensors")
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    a, b = (features.load_digits_features(p)(images) for p in (features.DIGITS_WEIGHTS, bucket / "digits.safetensors"))
    np.testing.assert_array_equal(a.pool, b.pool)
    with pytest.raises(
        features.WeightsError,
        match=r"bucket/digits\.safetensors holds the weights of .*; the InceptionV3 of FID belongs here",
    ):
        features.load_inception("gs://bucket/digits.safetensors")
    with pytest.raises(FileNotFoundError, match=r"gs://bucket/no\.pth is not a file"):
        features.load_inception("gs://bucket/no.pth")
    (bucket / "convnext_small-0c510722.safetensors").write_text("nothing")
    with pytest.raises(features.WeightsError, match=r"bucket/convnext_small-0c510722\.safetensors"):
        perceptual.load_perceptual("convnext_s", "gs://bucket")


def test_a_copy_is_made_again_when_the_file_has_changed(bucket):
    (bucket / "a").write_text("one")
    first = storage.local_copy("gs://bucket/a")
    assert first.read_text() == "one"
    first.write_text("the same copy")
    assert storage.local_copy("gs://bucket/a").read_text() == "the same copy"
    (bucket / "a").write_text("two and more")
    assert storage.local_copy("gs://bucket/a").read_text() == "two and more"
    with pytest.raises(FileNotFoundError, match="gs://bucket/b is not a file"):
        storage.local_copy("gs://bucket/b")


def test_a_model_there_is_known_before_jax_is_imported(bucket):
    (bucket / "model/config.json").write_text("{}")
    assert published_models.find("gs://bucket/model") == bucket / "model"
    with pytest.raises(ValueError, match="gs://bucket/no: no such file or folder"):
        published_models.find("gs://bucket/no")
