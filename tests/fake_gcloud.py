#!/usr/bin/env python3
"""A `gcloud` of one TPU slice with two workers, which are folders of this machine. Used by test_tpu_scripts.py.

In the folder $FAKE_GCLOUD: `calls.jsonl`, every call; `slice.json`, what there is: the kind, the states it still goes
through, and how many have been made; `preempt`, how many looks at the first slice's running workers it takes until it is
preempted (0: never); `gone`, the state of one that is, or `REPAIRING`, from which it comes back by itself; `offline`, to how
many looks at the state there is no answer yet, and the error instead; `worker0` and `worker1`, the workers' home folders.
"""

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
    """The machines lose power and start again: the disks are there, the processes are not."""
    for home in workers():
        os.killpg(int((home / "titok_run/pid").read_text()), signal.SIGKILL)
    slice_["states"] = ["REPAIRING", "REPAIRING", "READY"]
    write(slice_)


def preempt(slice_: dict) -> None:
    """SIGTERM to the runs, as the machine's shutdown gives it. The workers are reached once more before they are gone."""
    for home in workers():
        pid = int((home / "titok_run/pid").read_text())
        os.killpg(pid, signal.SIGTERM)
        while not (home / "titok_run/exit").exists():  # ends: the command of the test obeys
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
        write({"kind": kind, "made": slice_["made"] + 1, "states": STATES[kind], "looks": 0})
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
    elif verb == "scp":
        source, (target, file) = name, arguments[5].split(":")
        assert target == "t", target
        for home in workers():
            shutil.copy(source, home / file)
    elif verb == "ssh":
        command = options["command"]
        chosen = workers() if options["worker"] == "all" else [workers()[int(options["worker"])]]
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
