"""Settings of the whole test suite, also of the processes that tests start: they are in the environment."""

import contextlib
import gc
import importlib.metadata
import importlib.util
import os
import pathlib
import resource

import pytest

# Every process of a test run shares compiled programs; the folder is ignored by git.
CACHE = pathlib.Path(__file__).parents[1] / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# These tests spend most of their time compiling. Without LLVM's optimisation that takes a fourth of the time; the compiled
# programs are slower and round otherwise. If XLA_FLAGS is set, nothing is added to it: `make test-machines` sets it.
FAST_COMPILING = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# The same where a test computes for long: a third of the time to compile, and the usual speed.
FAST_LOOPS = FAST_COMPILING.replace("level=0", "level=1")
if tuple(map(int, importlib.metadata.version("jax").split(".")[:2])) < (0, 11):
    # Later versions have no other way, and end at a flag that they do not know.
    FAST_COMPILING += " --xla_cpu_use_fusion_emitters=false"
    FAST_LOOPS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", FAST_COMPILING)

# Traced programs are many objects that live long. With Python's own thresholds a fifth of the time goes into garbage
# collection.
gc.set_threshold(100_000, 50, 100)

# The files whose tests take the longest, in this order, so that no worker is left with one of them in the end.
FIRST = ("test_sharding", "test_train", "test_tasks", "test_distributed", "test_readme", "test_chain", "test_configs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


@pytest.fixture(scope="module")
def tool(request):
    """The module of the file in tools/ that a test module calls TOOL."""
    spec = importlib.util.spec_from_file_location(request.module.TOOL.stem, request.module.TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny generator with its tokenizer."""
    import tiny_models

    return str(tiny_models.save(tmp_path_factory.mktemp("models") / "generator"))


@pytest.fixture(scope="module")
def pair(model):
    """That tokenizer and generator, loaded."""
    from titok_jax import inference

    return inference.load_pair(model)


@pytest.fixture
def full_disk():
    """A context manager in which writes beyond a number of bytes in a file fail, as on a full disk."""

    @contextlib.contextmanager
    def limited(size):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))  # Python ignores the signal that comes with the error
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return limited
