"""Checkpoints that cannot be written or read: complete ones stay, and only damaged ones are put aside."""

import errno
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from titok_jax.runtime import sharding
from titok_jax.training.checkpoint import Checkpoints, checksums, config_changes

CONFIG = {"seed": 0}


def state(step: int):
    return {"w": jax.random.normal(jax.random.key(step), (256, 1024)), "step": jnp.int32(step)}


def restore(checkpoints):
    abstract = jax.eval_shape(lambda: state(0))
    shardings = sharding.state_shardings(sharding.make_mesh(), abstract)
    return checkpoints.restore_newest(abstract, shardings, lambda step, config: None)


def test_a_full_disk_leaves_the_checkpoint_before_and_says_so(tmp_path, full_disk):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, state(1), CONFIG)

    def save_again():
        with Checkpoints(tmp_path / "checkpoints") as checkpoints:
            checkpoints.save(2, state(2), CONFIG)

    message = r"cannot be written to .*is the disk full\? the newest complete one, of step 1, "
    with full_disk(100_000), pytest.raises(OSError, match=message):
        save_again()
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        step, found = restore(checkpoints)
        assert step == 1
        np.testing.assert_array_equal(found["w"], state(1)["w"])
    save_again()  # now there is room again
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


class HttpError(Exception):
    """The error that gcsfs raises for most answers of Google's server."""

    __module__ = "gcsfs.retry"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, os.strerror(errno.EIO)),
        PermissionError(errno.EACCES, "Permission denied"),
        TimeoutError("the read operation timed out"),
        ValueError("UNAVAILABLE: Error reading local file: gs://bucket/run/checkpoints/2"),
        OSError("Forbidden: https://storage.googleapis.com/storage/v1/b/bucket/o/run: no storage.objects.get"),
        HttpError("Service Unavailable, 503"),
        MemoryError(),
    ],
)
def test_a_storage_that_fails_is_no_damage(tmp_path, monkeypatch, error):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), CONFIG)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        real = ocp.StandardCheckpointHandler.restore

        def fail(self, folder, args):
            if folder.parent.name == "2":
                raise ValueError("cannot restore") from error
            return real(self, folder, args)

        monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", fail)
        with pytest.raises(OSError, match=r"checkpoint of step 2 in .* cannot be read now"):
            restore(checkpoints)
        assert not (tmp_path / "damaged").exists()
        monkeypatch.undo()
        assert restore(checkpoints)[0] == 2


def test_a_field_that_is_newer_than_a_checkpoint_has_the_value_that_the_run_had():
    found, later = {"seed": 1, "data": {"batch_size": 8}}, {"data.cache": 0}
    assert config_changes(found, {**found, "data": {"batch_size": 8, "cache": 0}}, (), later={**later, "else": 3}) == []
    changed = config_changes(found, {**found, "data": {"batch_size": 8, "cache": 1}}, (), later=later)
    assert changed == ["data.cache: 0 in the checkpoint, 1 now"]
    changed = config_changes(found, {**found, "data": {"batch_size": 8, "cache": 0}}, ())
    assert changed == ["data.cache: 'absent' in the checkpoint, 0 now"]


def test_a_state_of_other_arrays_is_not_a_damaged_one(tmp_path):
    """Orbax's own error would count as damage, and the checkpoint would be moved aside."""
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(2, {**state(2), "more": np.zeros((3, 4), np.float32)}, CONFIG)
    with (
        Checkpoints(tmp_path / "checkpoints") as checkpoints,
        pytest.raises(ValueError, match=r"step 2 in .* 1 arrays differ, e.g. more: \[3, 4\], expected absent"),
    ):
        restore(checkpoints)
    assert not (tmp_path / "damaged").exists()


def test_what_a_killed_save_left_is_removed(tmp_path):
    left = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    left.mkdir(parents=True)
    (left / "part").write_text(json.dumps({}))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(1, state(1), CONFIG)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_a_folder_that_is_named_like_a_checkpoint_is_not_removed(tmp_path):
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "checkpoints" / "3" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"checkpoints/3 is named like a checkpoint, but is none.*move it away"):
        Checkpoints(tmp_path / "checkpoints", keep=1)
    assert (tmp_path / "checkpoints" / "3" / "notes.txt").read_text() == "mine"
    (tmp_path / "checkpoints" / "3").rename(tmp_path / "checkpoints" / "three")
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        for step in (4, 5):
            checkpoints.save(step, state(step), CONFIG)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["5", "three"]


def test_a_wrong_bit_in_an_array_is_found_and_the_checkpoint_before_is_used(tmp_path, capsys):
    """In the arrays' files, which have no checksums: of some flipped bits Orbax notices nothing."""
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, state(1), CONFIG)
        checkpoints.save(2, state(2), CONFIG)
    largest = max((tmp_path / "checkpoints" / "2").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    whole = largest.read_bytes()
    for place in range(len(whole) // 3, len(whole), 999):  # until the decompression does not notice
        largest.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with Checkpoints(tmp_path / "checkpoints") as checkpoints:
            step, found = restore(checkpoints)
        assert step == 1
        np.testing.assert_array_equal(found["w"], state(1)["w"])
        if "1 arrays are not as they were saved, e.g. w" in capsys.readouterr().out:
            return
        (tmp_path / "damaged" / "2").rename(tmp_path / "checkpoints" / "2")
    pytest.fail("no flipped bit reached the array")


def test_the_checksum_is_of_the_bits_and_the_same_on_every_mesh():
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int32, jnp.bool_):
        array = jnp.arange(64).reshape(8, 8).astype(dtype)
        (one,) = checksums({"a": array}).values()
        other = array.at[0, 0].set(array[7, 7]).at[7, 7].set(array[0, 0])
        assert (checksums({"a": other})["a"] == one) == bool((other == array).all())
        mesh = sharding.make_mesh(data=jax.device_count())
        placed = jax.device_put(array, sharding.batch_sharding(mesh))
        assert checksums({"a": placed})["a"] == one
