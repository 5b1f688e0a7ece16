"""Settings of the whole test suite."""

import importlib.util
import os
import pathlib

import pytest

# Every process of a test run shares compiled programs; the folder is ignored by git.
CACHE = pathlib.Path(__file__).parents[1] / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PLATFORMS", "cpu")


@pytest.fixture(scope="module")
def tool(request):
    """The module of the file in tools/ that a test module calls TOOL."""
    spec = importlib.util.spec_from_file_location(request.module.TOOL.stem, request.module.TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
