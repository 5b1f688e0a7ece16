"""Two real processes on one run: together they give the results of one process, and neither outlives the other."""

import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import test_train

from titok_jax.runtime import processes
from titok_jax.training import loop
from titok_jax.training.settings import parse_settings
from titok_jax.weights import tensor_files

ROOT = pathlib.Path(__file__).parents[1]


def start(program: str, *arguments: str, processes: int = 1, devices: int = 1) -> list[subprocess.Popen]:
    """Starts `program` in processes that find each other, each with `devices` simulated devices."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_NUM_CPU_DEVICES": str(devices)}
    if processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        env |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            cwd=ROOT,
            env=env | ({"JAX_PROCESS_ID": str(index)} if processes > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]


def finish(*runs: list[subprocess.Popen]) -> list[str]:
    """Waits for processes, which must all succeed -> what each printed."""
    processes = [process for run in runs for process in run]
    try:
        outputs = [process.communicate(timeout=1200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, error) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, error[-4000:]
    return [out for out, _ in outputs]


CONFIG = """
import sys
import test_train
from titok_jax.runtime import processes, sharding
from titok_jax.training import loop
from titok_jax.training.settings import parse_settings
processes.initialize_distributed()
sharding.SMALLEST_SHARDED = 64
workdir = sys.argv[1]
config = test_train.small("tokenizer", num_steps=16, log_every=1, keep_checkpoints=9)
"""
# All commands run one after the other in the same processes, which saves start-up time.
ALL_COMMANDS = (
    CONFIG
    + """
config.mesh.update({"data": 1, "fsdp": 4})
import json, pathlib, time
import jax
from titok_jax.data import sources
read, own = [], sources.DigitsSource.__getitem__
def getitem(self, index):
    read.append(int(index))
    return own(self, index)
sources.DigitsSource.__getitem__ = getitem
def what_was_read(command):
    pathlib.Path(f"{workdir}/{command}.{jax.process_index()}.json").write_text(json.dumps(read))
    read.clear()
import numpy as np
from titok_jax.data import loader
devices, digits = jax.devices(), sources.make_source({"name": "digits"})
mesh = sharding.make_mesh(devices=devices[::2] + devices[1::2])  # as on a TPU slice: neighbours are of different processes
options = {"seed": 0, "global_batch_size": 16, "num_threads": 0}
with loader.make_loader(digits, **options, **sharding.batch_part(mesh)) as own_rows:
    labels = sharding.put_batch(mesh, next(own_rows))["label"]
with loader.make_loader(digits, **options, blocks=[0], num_blocks=1) as all_rows:
    rows = next(all_rows)["label"]
for shard in labels.addressable_shards:
    np.testing.assert_array_equal(shard.data, rows[shard.index])
read.clear()
loop.train(parse_settings(config), workdir + "/run")
what_was_read("train")
from titok_jax import evaluate, inference, pretokenize, reconstruct, sample
from titok_jax.data import token_shards
from titok_jax.inference import generator
shared = []
for owner, name in ((inference.Tokenizer, "encode"), (inference.Tokenizer, "decode"), (generator, "generate")):
    def recorded(*arguments, real=getattr(owner, name), **options):
        result = real(*arguments, **options)
        rows = {part.device: part.data.shape[0] for part in result.addressable_shards}
        shared.append(rows == dict.fromkeys(jax.local_devices(), len(result) / jax.local_device_count()))
        return result
    setattr(owner, name, recorded)
tokens = ["digits:test", "--out", workdir + "/tokens", "--crops", "center", "--shards", "3", "--format", "jsonl"]
samples = ["--num", "30", "--steps", "2", "--batch-size", "8", "--out", workdir + "/samples.npz"]
generated = ["--reference", "digits:test", "--num", "40", "--steps", "2", "--batch-size", "8"]
generated += ["--json", workdir + "/generated.json"]
figures = ["--reconstruct", "digits:test", "--features", "digits", "--json", workdir + "/figures.json"]
records = token_shards.records
def late(*arguments, **options):
    time.sleep(3 * jax.process_index())
    return records(*arguments, **options)
token_shards.records = late
for command, arguments in ((pretokenize, tokens), (sample, samples), (evaluate, generated), (evaluate, figures)):
    assert command.main(arguments) == 0
    what_was_read(command.__name__)
    assert len(list(pathlib.Path(workdir, "tokens").iterdir())) == 4  # the first of two has waited for the second
if jax.process_index() == 0:  # by itself
    assert reconstruct.main(["--num", "5", "--out", workdir + "/reconstructions"]) == 0
assert shared and all(shared), "a batch is not cut evenly over all devices of this process"
"""
)
# Here the second of two processes gets SIGTERM after its second step, as on a preempted host.
STOPPED = (
    CONFIG
    + """
import os, signal
import jax, pytest
from titok_jax.runtime import locks
several = {"process_index": jax.process_index(), "process_count": 2}
with locks.lock_run(workdir, **several):
    with pytest.raises(ValueError, match="another run"):
        with locks.lock_run(workdir, **several):
            pass
real, steps = loop.sharding.put_batch, iter(range(100))
def put_batch(mesh, batch):
    if next(steps) == 2 and jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return real(mesh, batch)
loop.sharding.put_batch = put_batch
config.mesh.update({"data": 1, "tensor": 2})
assert loop.train(parse_settings(config), workdir) is None
"""
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Workdirs in which every command ran: one process with four devices, and two processes with two devices each."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    printed = finish(start(ALL_COMMANDS, str(one), devices=4), start(ALL_COMMANDS, str(two), processes=2, devices=2))
    for text in ("Global batch", "step 16/16", "Done: ", "wrote " + str(two / "samples.npz")):
        assert text.replace(str(two), str(one)) in printed[0]
        assert text in printed[1]
        assert text not in printed[2]  # the second of two processes does not repeat the first's messages
    assert re.search(r" data wait \d+ % \(most: \d+ %, process [01] \(\S+\)\)  left ", printed[1])
    return one, two


def log_of(workdir) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_same_training(found, expected):
    """Losses and final parameters are the same up to rounding: sums over devices may be in another order."""
    logs = [log_of(found), log_of(expected)]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]]
    for a, b in zip(*logs, strict=True):
        for name in ("total_loss", "reconstruction_loss", "quantizer_loss", "grad_norm", "lr", "codebook_usage"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, err_msg=f"{name} of step {b['step']}")
    for name, array in test_train.weights(expected).items():
        np.testing.assert_allclose(test_train.weights(found)[name], array, atol=1e-5, err_msg=name)


def test_two_processes_train_as_one_with_as_many_devices(runs):
    one, two = runs
    assert_same_training(two / "run", one / "run")
    for line in log_of(two / "run"):
        assert line["data_wait"] <= line["data_wait_max"]
        assert line["data_wait_slowest"] in (0, 1)
    assert not any("data_wait_max" in line for line in log_of(one / "run"))


def test_two_processes_read_each_its_own_part_of_the_data(runs):
    """Both never read the same example: in the training's one epoch, in pretokenizing and in the evaluation."""
    _, two = runs
    for command, all_of_it in (("train", None), ("titok_jax.pretokenize", 360), ("titok_jax.evaluate", 360)):
        first, second = (set(json.loads((two / f"{command}.{process}.json").read_text())) for process in range(2))
        assert first, command
        assert second, command
        assert not first & second, command
        assert len(first | second) == all_of_it or all_of_it is None


def test_two_processes_pretokenize_sample_and_evaluate_as_one(runs):
    one, two = runs
    names = [f"tokens-{shard:05d}-of-00003.jsonl" for shard in range(3)]
    for name in names:
        assert (two / "tokens" / name).read_bytes() == (one / "tokens" / name).read_bytes()
    with np.load(one / "samples.npz") as a, np.load(two / "samples.npz") as b:
        np.testing.assert_array_equal(a["labels"], b["labels"])
        # If the last bit rounds differently, a value may be truncated to the next level: seen once in 92,160.
        difference = np.abs(a["arr_0"].astype(int) - b["arr_0"])
        assert len(difference) == 30
        assert difference.max() <= 1
        assert difference.mean() < 1e-3
    tokens = [json.loads((workdir / "reconstructions/tokens.json").read_text()) for workdir in runs]
    assert tokens[0] == tokens[1]
    for file, some in (("figures.json", {"psnr", "ssim"}), ("generated.json", {"digits-FID-40", "digits-precision-40"})):
        figures = [json.loads((workdir / file).read_text())["metrics"] for workdir in runs]
        assert figures[0].keys() == figures[1].keys() > some
        for name, value in figures[0].items():
            np.testing.assert_allclose(figures[1][name], value, rtol=1e-4, err_msg=name)
    assert not list(two.glob("*.shards"))


def test_a_run_changes_its_mesh_and_its_number_of_processes(runs, tmp_path):
    """One process with four devices begins, sharded along fsdp. Two processes continue, sharded along tensor, so that both
    compute the same rows of a batch, until one gets SIGTERM. One process with one device ends the run."""
    one, _ = runs
    shutil.copytree(one / "run", tmp_path, dirs_exist_ok=True)
    for later in (6, 9, 12, 15, 16):
        shutil.rmtree(tmp_path / "checkpoints" / str(later))
    shutil.rmtree(tmp_path / "pretrained")
    printed = finish(start(STOPPED, str(tmp_path), processes=2))
    assert "Continuing at step 3 of 16" in printed[0]
    assert "Stopped by SIGTERM after step" in printed[0]
    config = test_train.small("tokenizer", num_steps=16, log_every=1, keep_checkpoints=9)
    loop.train(parse_settings(config), tmp_path)
    assert_same_training(tmp_path, one / "run")


# One part of the newest checkpoint is damaged, as by one host's disk. Only one of two processes reads that part.
ONE_CANNOT_READ = """
import pathlib, sys
from titok_jax.runtime import processes
from titok_jax.runtime import sharding
processes.initialize_distributed()
sharding.SMALLEST_SHARDED = 64
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from titok_jax.training.checkpoint import Checkpoints
folder, which = epath.Path(sys.argv[1]) / "checkpoints", int(sys.argv[2])
def begin():
    return {"ffn_0": {"kernel": jnp.arange(256.0 * 128).reshape(256, 128)}}
mesh, abstract = sharding.make_mesh(1, 2, 1), jax.eval_shape(begin)
shardings = sharding.state_shardings(mesh, abstract)
state = jax.jit(begin, out_shardings=shardings)()
with Checkpoints(folder) as checkpoints:
    for step in (1, 2):
        checkpoints.save(step, jax.tree.map(lambda x: x + step, state), {})
if jax.process_index() == 0:
    damaged = [path for path in pathlib.Path(folder / "2/state" / f"ocdbt.process_{which}/d").iterdir()]
    assert damaged
    for path in damaged:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
multihost_utils.sync_global_devices("damaged")
with Checkpoints(folder) as checkpoints:
    step, found = checkpoints.restore_newest(abstract, shardings, lambda step, config: None)
(part,) = found["ffn_0"]["kernel"].addressable_shards
np.testing.assert_array_equal(part.data, np.arange(256.0 * 128).reshape(256, 128)[part.index] + 1)
print("restored", step, part.data.shape, flush=True)
"""


@pytest.mark.parametrize("which", [0, 1])
def test_a_checkpoint_that_one_process_cannot_read_is_damaged_for_all(which, tmp_path):
    """Each process reads its own shards only, so damage to one's shards does not disturb the other."""
    printed = finish(start(ONE_CANNOT_READ, str(tmp_path), str(which), processes=2))
    assert all("restored 1 (256, 64)" in text for text in printed)
    assert "warning: the checkpoint of step 2 cannot be read" in printed[0]
    assert ("another process cannot read it" in printed[0]) == (which == 1)
    assert (tmp_path / "damaged" / "2").is_dir()


# Four processes write a sharded model of 128 MiB as a file, place an array of 64 MiB, and try to place different arrays.
WEIGHTS = """
import pathlib, sys
from titok_jax.runtime import placement, processes, sharding
from titok_jax.weights import safetensors_file
processes.initialize_distributed()
import jax
import jax.numpy as jnp
import numpy as np
def grown(action):
    before = peak()
    result = action()
    print("grown by", peak() - before, flush=True)
    return result
def peak():
    (line,) = (line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) // 1024
def begin():
    return {f"{n:02d}/ffn_0/kernel": jnp.arange(2**21, dtype=jnp.float32).reshape(2**10, 2**11) + n for n in range(16)}
mesh, first = sharding.make_mesh(1, 4, 1), jax.process_index() == 0
def export():
    leaves = placement.gathered(state)
    if first:
        safetensors_file.write_safetensors(sys.argv[1], leaves, arrays=leaves.items())
    else:
        placement.take_part(leaves)
shardings = sharding.state_shardings(mesh, jax.eval_shape(begin))
state = jax.block_until_ready(jax.jit(begin, out_shardings=shardings)())
grown(export)
del state
place, array = placement.placer(mesh), np.arange(2**24, dtype=np.float32).reshape(2**10, 2**14)
cut = grown(lambda: jax.block_until_ready(place("ffn_0/kernel", array)))
whole = grown(lambda: jax.block_until_ready(placement.put(array, sharding.replicated(mesh))))
for placed, columns in ((cut, 2**12), (whole, 2**14)):
    (part,) = placed.addressable_shards
    assert part.data.shape == (2**10, columns)
    np.testing.assert_array_equal(part.data, array[part.index])
last = jax.process_index() == 3
for tree in ({"a": np.ones(2), "b": np.full(3, float(last))}, {"a": np.ones(2 + last)}):
    try:
        placement.put(tree, sharding.replicated(mesh), "config.vqgan (FOLDER)")
    except ValueError as error:
        print("error:", error, flush=True)
"""


def test_weights_reach_four_processes_and_leave_them_without_copies_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")  # freed arrays leave the process at once
    printed = finish(start(WEIGHTS, str(tmp_path / "model.safetensors"), processes=4))
    for text in printed:
        export, cut, whole = (int(line.split()[-1]) for line in text.splitlines() if line.startswith("grown by"))
        assert export < 64  # MiB: some leaves of 8. Gathering all of them takes 128 and more
        assert cut < 40  # a quarter of 64
        assert whole < 96
        why = "config.vqgan (FOLDER): process 3 has other weights than process 0 ({}), but every host needs the same weights"
        errors = [line.removeprefix("error: ") for line in text.splitlines() if line.startswith("error")]
        assert errors == [why.format(what) for what in ("b", "names, shapes or dtypes")]
    with tensor_files.open_weights(tmp_path / "model.safetensors") as (_, tensors):
        for n in range(16):
            expected = np.arange(2**21, dtype=np.float32).reshape(2**10, 2**11) + n
            np.testing.assert_array_equal(np.asarray(tensors[f"{n:02d}/ffn_0/kernel"]), expected)


# Here the bucket is a folder. Only the first process looks into it.
LOST = """
import sys
from titok_jax.runtime import locks
from titok_jax.runtime import processes
processes.initialize_distributed()
import jax
from etils import epath
locks.is_remote = lambda path: True
workdir = epath.Path(sys.argv[1])
with locks.lock_run(workdir, process_index=jax.process_index(), process_count=2) as held:
    held.check()
    if jax.process_index() == 0:
        (workdir / ".lock").write_text("host-3, process 17, 0123")
    try:
        held.check()
    except OSError as error:
        print(error)
"""


def test_of_a_run_that_lost_its_workdir_all_processes_end(tmp_path):
    printed = finish(start(LOST, str(tmp_path), processes=2))
    for text, holder in zip(printed, ("host-3, process 17, 0123", "see process 0"), strict=True):
        assert f"another run ({holder}) has taken {tmp_path} over" in text
    assert (tmp_path / ".lock").read_text() == "host-3, process 17, 0123"


ONE_DIES = """
import os, sys
from titok_jax.runtime import processes
from titok_jax.runtime import sharding
processes.HEARTBEAT_SECONDS = 3
processes.initialize_distributed()
import jax
from jax.experimental import multihost_utils
multihost_utils.sync_global_devices("started")
if jax.process_index() == int(sys.argv[1]):
    os.kill(os.getpid(), 9)
multihost_utils.sync_global_devices("never")
print("reached")
"""


@pytest.mark.parametrize("which", [0, 1])
def test_a_process_does_not_wait_for_a_dead_one(which):
    processes = start(ONE_DIES, str(which), processes=2)
    printed = [process.communicate(timeout=900) for process in processes]
    assert all(process.returncode != 0 for process in processes)
    assert not any("reached" in out for out, _ in printed)
    assert "process 1 of 2 at localhost:" in printed[1][0]


def test_a_process_does_not_wait_for_ever_to_start():
    program = "from titok_jax.runtime import processes; processes.START_SECONDS = 2; processes.initialize_distributed()"
    first, second = start(program, processes=2)
    second.kill()
    second.communicate()
    out, _ = first.communicate(timeout=900)
    assert first.returncode != 0
    assert "process 0 of 2 at localhost:" in out
    assert "waiting for the others, 2 s at most; was the command started for all?" in out


def test_what_the_environment_says_is_checked(monkeypatch):
    processes.initialize_distributed()  # no variable is set, so this does nothing
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1234")
    with pytest.raises(ValueError, match="found JAX_COORDINATOR_ADDRESS=host:1234, JAX_NUM_PROCESSES=, JAX_PROCESS_ID="):
        processes.initialize_distributed()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    with pytest.raises(ValueError, match="JAX_PROCESS_ID is 2, expected 0 to 1"):
        processes.initialize_distributed()


@pytest.mark.parametrize(
    ("environment", "metadata", "hosts"),
    [
        ({}, {"worker-network-endpoints": "10.0.0.1,10.0.0.2"}, 2),
        ({}, {"worker-network-endpoints": "10.0.0.1", "tpu-env": "A: 'b'\nMEGASCALE_NUM_SLICES: '2'\nC: 'd'"}, 2),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d", "MEGASCALE_NUM_SLICES": "2"}, {}, 8),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, {}, 1),
        ({}, {}, 1),
    ],
)
def test_the_hosts_of_a_pod_are_joined_and_a_single_one_is_not(monkeypatch, capsys, environment, metadata, hosts):
    joined = []
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "_has_tpu", lambda: True)
    monkeypatch.setattr(processes, "_metadata", lambda name: metadata.get(name, ""))
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda **arguments: joined.append(arguments))
    # The tests have no TPU, so JAX falls back to the CPU, which nobody asked for.
    with pytest.raises(ValueError, match=r"this machine has TPU chips, but JAX found the CPU only.*JAX_PLATFORMS=cpu"):
        processes.initialize_distributed()
    assert len(joined) == (hosts > 1)
    assert (f"a host of {hosts} with TPU chips: waiting" in capsys.readouterr().out) == (hosts > 1)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    processes.initialize_distributed()
    assert len(joined) == (hosts > 1)
