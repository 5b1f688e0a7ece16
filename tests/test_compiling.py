"""The compiler's settings during a run, the programs that it keeps, and what it prints about the step."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from titok_jax.runtime import sharding
from titok_jax.training import compiling


@pytest.fixture
def no_cache():
    former = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", former)
    compiling.compilation_cache.reset_cache()


def kept(folder) -> list:
    return sorted(folder.glob("*/*-cache"))


def test_programs_are_kept_in_the_folder_and_broken_ones_are_made_again(tmp_path, no_cache):
    mesh, folder = sharding.make_mesh(), tmp_path / "compiled"
    for number in range(3):
        with compiling.compiler(mesh, 0.0, epath.Path(folder)):
            jax.jit(lambda x: jnp.sin(x) @ x.T)(np.ones((7, 3), np.float32))
            jax.clear_caches()
        assert jax.config.jax_compilation_cache_dir is None
        found = kept(folder)
        assert found
        complete = [compiling._complete(path.read_bytes()) for path in found]
        assert all(complete)
        if number == 0:
            for path in found:  # as a kill leaves it
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_folder_that_the_user_has_set_is_used_instead(tmp_path, no_cache):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    with compiling.compiler(sharding.make_mesh(), 0.0, epath.Path(tmp_path / "compiled")):
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    assert not (tmp_path / "compiled").exists()


@pytest.mark.parametrize(("kind", "inside"), [("tpu", -0.3), ("cpu", 0.0)])
def test_the_effort_is_that_of_the_configuration_on_a_tpu(kind, inside, tmp_path):
    mesh = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform=kind)]))
    with compiling.compiler(mesh, -0.3, epath.Path(tmp_path)):
        assert jax.config.jax_exec_time_optimization_effort == pytest.approx(inside)
    assert jax.config.jax_exec_time_optimization_effort == 0.0


def test_the_compiled_step_is_described(capsys):
    step = jax.jit(lambda state, x: (jax.tree.map(lambda p: p + x.sum(), state), x.sum()), donate_argnums=0)
    mesh = sharding.make_mesh()
    array = jax.device_put(np.ones((256, 1024), np.float32), sharding.replicated(mesh))
    state = {"params": {"a": array}, "opt": {}, "ema": {}}
    compiled = compiling.compile_step(step, state, np.ones(4, np.float32))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Compiled the step in 0 s: 0.00 GiB per device (0.00 of state and data, 0.00 of temporaries)")
    state, total = compiled(state, np.ones(4, np.float32))
    assert total == 4
    assert state["params"]["a"][0, 0] == 5


def test_what_every_device_holds_whole_is_named():
    mesh = jax.sharding.AbstractMesh((4, 2, 1), sharding.AXES)
    leaves = {"mlp": {"fc1": {"kernel": (2, 512, 1024), "bias": (2, 1024)}}, "conv": {"kernel": (3, 3, 64, 64)}}
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, np.float32), leaves, is_leaf=lambda x: isinstance(x, tuple))
    state = {"params": {"net": shapes}, "opt": {"net": {"mu": shapes}}, "ema": {"net": shapes}}
    places = sharding.state_shardings(mesh, state, shard_optimizer=True)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, places)
    of_parameters, of_optimizer = compiling.whole(state)
    assert of_parameters == (
        "On every device: 0.0 M of the 1.1 M numbers of the parameters, most of it in params/net/conv/kernel "
        "[3, 3, 64, 64], params/net/mlp/fc1/bias [2, 1024]"
    )
    assert of_optimizer.startswith(
        "On every device: 0.1 M of the 2.2 M numbers of the optimizer and averages, most of it in"
    )


def test_nothing_is_said_of_one_device():
    mesh = sharding.make_mesh()
    leaf = jax.ShapeDtypeStruct((4, 4), np.float32, sharding=sharding.replicated(mesh))
    assert compiling.whole({"params": {"a": leaf}, "opt": {}, "ema": {}}) == []
