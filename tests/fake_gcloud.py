#!/usr/bin/env python3
"""A fake `gcloud` with one TPU slice of two workers, or two of one, which are local folders. Used by test_tpu_scripts.py.

The folder $FAKE_GCLOUD holds:

- `calls.jsonl`: every call.
- `slice.json`: the current slice: its kind, the states still to come, and how many slices have been made.
- `preempt`: the first slice is preempted after this many status checks of its running workers (0: never).
- `gone`: the state of a preempted slice, or `REPAIRING`, from which the slice recovers by itself.
- `offline`: the number of state queries that still fail, and the error that they return.
- `worker0` and `worker1`: the workers' home folders.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

ROOT = pathlib.Path(os.environ["FAKE_GCLOUD"])
STATES = {"tpu-vm": ["CREATING", "READY"], "queued-resources": ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]}


def fail(message: str) -> None:
    print(f"ERROR: (gcloud) {message}", file=sys.stderr)
    sys.exit(1)


def write(slice_: dict) -> None:
    (ROOT / "slice.json").write_text(json.dumps(slice_))


def workers() -> list[pathlib.Path]:
    return [ROOT / "worker0", ROOT / "worker1"]


def maintain(slice_: dict) -> None:
    """The machines restart after a power loss. The disks survive, the processes do not."""
    for home in workers():
        pid = int((home / "titok_run/pid").read_text())
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
            while True:  # until all of them are gone
                os.killpg(pid, 0)
    slice_["states"] = ["REPAIRING", "REPAIRING", "READY"]
    write(slice_)


def preempt(slice_: dict) -> None:
    """Sends SIGTERM to the runs, as a shutdown does. The workers can be reached once more before they are gone."""
    for home in workers():
        pid = int((home / "titok_run/pid").read_text())
        os.killpg(pid, signal.SIGTERM)
        while not (home / "titok_run/exit").exists():  # ends because the test's command obeys SIGTERM
            pass
    slice_["preempted"] = True
    write(slice_)


def main() -> None:
    arguments = sys.argv[1:]
    with (ROOT / "calls.jsonl").open("a") as file:
        file.write(json.dumps(arguments) + "\n")
    assert arguments[:2] == ["compute", "tpus"], arguments
    assert {"--project=p", "--zone=z"} <= set(arguments), arguments
    kind, verb, name = arguments[2:5]
    options = dict(a.removeprefix("--").split("=", 1) for a in arguments[5:] if "=" in a)
    slice_ = json.loads((ROOT / "slice.json").read_text()) if (ROOT / "slice.json").exists() else {"made": 0}
    there = "states" in slice_

    offline = ROOT / "offline"
    if offline.exists():
        looks, message = offline.read_text().split(" ", 1)
        left = int(looks) - (verb == "describe")
        offline.write_text(f"{left} {message}") if left else offline.unlink()
        fail(message)
    if verb == "create":
        if there:
            fail("ALREADY_EXISTS")
        for home in workers():
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir()
        nodes = int(options.get("node-count", 1))
        assert nodes == 1 or (kind == "queued-resources" and options["node-prefix"] == name and "node-id" not in options)
        write({"kind": kind, "made": slice_["made"] + 1, "states": STATES[kind], "looks": 0, "nodes": nodes})
    elif verb == "delete":
        if not there:
            fail("NOT_FOUND")
        write({"made": slice_["made"]})
    elif verb == "describe":
        if not there or slice_["kind"] != kind:
            fail(
                f"NOT_FOUND: Resource 'projects/p/locations/z/nodes/{name}' was not found. This command is authenticated as "
                "me@example.com which is the active account specified by the [core/account] property."
            )
        print(slice_["states"][0])
        slice_["states"] = slice_["states"][1:] or slice_["states"]
        write(slice_)
    elif not there or slice_["states"][0] not in ("READY", "ACTIVE"):
        fail("the slice is not ready")
    elif (slice_["nodes"] > 1) != (kind == "queued-resources"):
        fail(f"NOT_FOUND: there is no {name} of this kind")  # the slices are t-0 and t-1
    elif slice_["nodes"] > 1 and "node" not in options:
        fail("this would reach the first slice only")
    elif verb == "scp":
        source, (target, file) = name, arguments[5].split(":")
        assert target == "t", target
        for home in workers():
            shutil.copy(source, home / file)
    elif verb == "ssh":
        command = options["command"]
        number = "worker" if slice_["nodes"] == 1 else "node"
        chosen = workers() if options[number] == "all" else [workers()[int(options[number])]]
        if slice_.get("preempted") and "worker.sh status" not in command:
            slice_["states"] = [(ROOT / "gone").read_text()]
            write(slice_)
            fail("connection refused")
        codes = []
        for home in chosen:
            environment = {**os.environ, "HOME": str(home), "WORKER": home.name}
            codes.append(subprocess.run(["bash", "-c", command], env=environment, cwd=home).returncode)
        if "worker.sh status" in command and all((home / "titok_run/pid").exists() for home in workers()):
            slice_["looks"] += 1
            write(slice_)
            if slice_["made"] == 1 and slice_["looks"] == int((ROOT / "preempt").read_text()):
                (maintain if (ROOT / "gone").read_text() == "REPAIRING" else preempt)(slice_)
        sys.exit(max(codes))
    else:
        fail(f"unknown call {arguments}")


main()
