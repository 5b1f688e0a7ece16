"""Folders on gs://: here in memory, behind the same paths."""

import fsspec
import jax
import numpy as np
import pytest
import test_train
import tiny_models
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from test_distributed import log_of

import titok_jax
from titok_jax import pretrained, train
from titok_jax.checkpoint import Checkpoints


class _Bucket(MemoryFileSystem):
    """What `etils.epath` opens for gs://."""

    protocol = ("gs", "gcs")
    store: dict = {}  # noqa: RUF012 (one for all, as a bucket is)
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://").removeprefix("gcs://"))


@pytest.fixture
def bucket(monkeypatch):
    for name in ("gs", "gcs"):
        fsspec.register_implementation(name, _Bucket, clobber=True)
    monkeypatch.setattr(_Bucket, "store", {})
    monkeypatch.setattr(_Bucket, "pseudo_dirs", [""])
    return epath.Path("gs://bucket")


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
    with pytest.raises(FileNotFoundError, match=r"gs://bucket/nothing is no model folder: it has no config\.json"):
        pretrained.locate("gs://bucket/nothing")


def test_a_run_lives_in_a_bucket(bucket, tmp_path, monkeypatch):
    """All but the checkpoints: Orbax reaches Google's storage by itself."""
    asked = []

    def local_checkpoints(folder, keep):
        asked.append(str(folder))
        return Checkpoints(tmp_path, keep=keep)

    monkeypatch.setattr(train, "Checkpoints", local_checkpoints)
    config, workdir = test_train.small("tokenizer", preview_every=3), "gs://bucket/runs/one"
    train.train(config, workdir)
    run = epath.Path(workdir)
    assert asked == [workdir + "/checkpoints"]
    assert [line["step"] for line in log_of(run)] == [2, 4, 6]
    assert sorted(path.name for path in (run / "previews").iterdir()) == ["0000003.png", "0000006.png"]
    assert len(list((run / "tensorboard").iterdir())) == 1
    assert (run / "curves.png").exists()
    train.train(config, workdir)  # at its end already; the log stays
    assert [line["step"] for line in log_of(run)] == [2, 4, 6]
    assert titok_jax.load_tokenizer(workdir + "/pretrained").config.codebook_size == config.model.codebook_size
