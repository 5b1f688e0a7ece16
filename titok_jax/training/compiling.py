"""The compiled programs of a run: how hard the compiler tries, where programs are kept, and what the step takes."""

import contextlib
import hashlib
import math
import pathlib
import platform
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from titok_jax.runtime.paths import is_remote


@contextlib.contextmanager
def compiler(mesh: Mesh, effort: float, folder: epath.Path) -> Iterator[None]:
    """Sets JAX's compiler for what is compiled inside.

    Args:
      effort: what a TPU's compiler puts into speed, from -1 to 1. Other compilers are left as they are.
      folder: programs that take longer than a second to compile are kept here, and read when the run is started again.
        A folder that the user has set (JAX_COMPILATION_CACHE_DIR) is used instead.
    """
    with contextlib.ExitStack() as changed:
        if mesh.devices.flat[0].platform == "tpu":
            changed.callback(
                jax.config.update, "jax_exec_time_optimization_effort", jax.config.jax_exec_time_optimization_effort
            )
            jax.config.update("jax_exec_time_optimization_effort", effort)
        if jax.config.jax_enable_compilation_cache and not jax.config.jax_compilation_cache_dir:
            if mesh.devices.flat[0].platform == "cpu":
                folder = folder / f"cpu-{_processor()}"  # a program of one CPU may be illegal on another
            if not is_remote(folder) and jax.process_index() == 0:
                _remove_incomplete(pathlib.Path(folder))
            changed.callback(compilation_cache.reset_cache)
            changed.callback(jax.config.update, "jax_compilation_cache_dir", None)
            jax.config.update("jax_compilation_cache_dir", str(folder))
            compilation_cache.reset_cache()  # JAX looks at the setting once
        yield


def _processor() -> str:
    """Names the instructions that this CPU has."""
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
        return hashlib.sha256(f"{platform.machine()} {flags}".encode()).hexdigest()[:12]
    return platform.machine()


def _remove_incomplete(folder: pathlib.Path) -> None:
    """Removes programs that a killed run has begun to write. JAX would keep them for ever and compile at each start."""
    for path in folder.glob("*-cache"):
        with contextlib.suppress(OSError):
            if not _complete(path.read_bytes()):
                path.unlink()


def _complete(program: bytes) -> bool:
    """Whether compressed bytes are all there. Only zlib's say so by themselves; others count as complete."""
    if program[:1] != b"\x78":
        return bool(program)
    unpacked = zlib.decompressobj()
    try:
        unpacked.decompress(program)
    except zlib.error:
        return False
    return unpacked.eof


def compile_step(step: Callable, *arguments: Any) -> Callable:
    """Compiles a jitted step for its arguments, with the mesh set. The first process prints how long it took, what the step
    takes of a device, and what of the state lies on every device whole."""
    began = time.perf_counter()
    compiled = step.lower(*arguments).compile()
    if jax.process_index() == 0:
        print(f"Compiled the step in {time.perf_counter() - began:.0f} s{_memory(compiled)}", flush=True)
        for line in whole(arguments[0]):
            print(line, flush=True)
    return compiled


def _memory(compiled: Any) -> str:
    memory = compiled.memory_analysis()
    if memory is None:  # a backend that does not tell
        return ""
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    sizes = [memory.argument_size_in_bytes, memory.temp_size_in_bytes + new, memory.generated_code_size_in_bytes]
    arguments, temporaries, _ = (f"{size / 2**30:.2f}" for size in sizes)
    return f": {sum(sizes) / 2**30:.2f} GiB per device ({arguments} of state and data, {temporaries} of temporaries)"


def whole(state: Any) -> list[str]:
    """Says what part of a state on several devices each of them holds whole, with the largest such arrays.

    Args:
      state: sharded arrays, or shapes with shardings, under "params", "opt" and "ema".
    """
    lines = []
    for title, parts in (("parameters", ("params",)), ("optimizer and averages", ("opt", "ema"))):
        leaves = jax.tree_util.tree_leaves_with_path({part: state[part] for part in parts})
        if not leaves or leaves[0][1].sharding.mesh.size == 1:
            return []
        kept = [(math.prod(leaf.shape), path, leaf) for path, leaf in leaves if leaf.sharding.is_fully_replicated]
        total, on_each = sum(math.prod(leaf.shape) for _, leaf in leaves), sum(size for size, _, _ in kept)
        largest = sorted(kept, key=lambda one: -one[0])[:3]
        names = [f"{jax.tree_util.keystr(path, simple=True, separator='/')} {list(leaf.shape)}" for _, path, leaf in largest]
        most = f", most of it in {', '.join(names)}" if 0 < on_each < total else ""
        lines.append(f"On every device: {on_each / 1e6:,.1f} M of the {total / 1e6:,.1f} M numbers of the {title}{most}")
    return lines
