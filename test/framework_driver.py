"""Launches scripts on ranks as torchrun does, from one process that has imported what they need:
each rank is a fork of it, which starts in milliseconds where the imports take seconds.

    python framework_driver.py launches.json

The scripts know nothing of it. What they print goes to a file of each rank; beside it stands which
classes of wrappers there were when the first loss was printed. A launch may be stopped at a loss:
every rank halts there, and once the checkpoint is complete all are killed."""

from __future__ import annotations

import ctypes
import faulthandler
import fcntl
import gc
import io
import json
import os
import re
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

# Where `make frameworks` installs them.
PYTHON = Path(
    os.environ.get(
        "HSDP_TEST_FRAMEWORKS_PYTHON",
        Path(__file__).resolve().parents[1] / ".venv-frameworks" / "bin" / "python",
    )
)
RANKS = 4
LOSS = re.compile(r"^step (\d+) loss ", re.MULTILINE)
WRAPPERS = ("FSDPModule", "FullyShardedDataParallel")


def wrappers() -> list[str]:
    """Whose wrappers this process's modules have: "module.Class" for torch's and for ours."""
    found = set()
    for value in gc.get_objects():
        for base in type(value).__mro__:
            if base.__name__ in WRAPPERS:
                found.add(f"{base.__module__}.{base.__name__}")
    return sorted(found)


class Output(io.TextIOBase):
    """A rank's standard output, which looks at the losses that pass."""

    def __init__(self, logs: Path, rank: int, stop_at: int | None) -> None:
        self.file = (logs / f"{rank}.out").open("w")
        self.report, self.stopped = logs / f"{rank}.wrappers", logs / f"{rank}.stopped"
        self.stop_at = stop_at

    def fileno(self) -> int:
        return self.file.fileno()

    def write(self, text: str) -> int:
        self.file.write(text)
        self.file.flush()
        loss = LOSS.search(text)
        if loss is not None and not self.report.exists():
            self.report.write_text("\n".join(wrappers()))
        if loss is not None and int(loss[1]) == self.stop_at:
            self.stopped.touch()
            while True:
                time.sleep(1)  # until it is killed
        return len(text)


def fork() -> int:
    """os.fork; the child ends with its parent."""
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    return child


def host_store() -> tuple[int, int]:
    """The store that torchrun's agent hosts, in a process of its own. Returns its id and port."""
    receiver, sender = os.pipe()
    agent = fork()
    if agent == 0:
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(sender, str(store.port).encode())
        os.close(sender)
        signal.pause()
    os.close(sender)
    port = int(os.read(receiver, 16))
    os.close(receiver)
    return agent, port


def as_torchrun(rank: int, port: int) -> dict[str, str]:
    """What torchrun puts into a rank's environment."""
    ranks = {f"{name}RANK": str(rank) for name in ("", "LOCAL_", "ROLE_")}
    sizes = {f"{name}WORLD_SIZE": str(RANKS) for name in ("", "LOCAL_", "ROLE_")}
    rest = {"GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    elastic = {"USE_AGENT_STORE": True, "RESTART_COUNT": 0, "MAX_RESTARTS": 0, "RUN_ID": "none"}
    rest |= {f"TORCHELASTIC_{name}": value for name, value in elastic.items()}
    return {**ranks, **sizes, **{name: str(value) for name, value in rest.items()}}


def run_rank(launch: dict[str, Any], rank: int, port: int) -> None:
    """The script, in a process that has just been forked; it ends as the script does."""
    logs = Path(launch["logs"])
    os.dup2(os.open(logs / f"{rank}.err", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    faulthandler.register(signal.SIGUSR1)  # says where it stands
    os.environ.update(as_torchrun(rank, port), **launch["settings"])
    sys.stdout = Output(logs, rank, launch["stop_at"])
    os.dup2(sys.stdout.fileno(), 1)
    script = launch["arguments"][0]
    if launch["ours"]:
        from torch_hsdp_ckpt.compat.__main__ import main

        sys.argv = ["torch_hsdp_ckpt.compat", *launch["arguments"]]
        main()
    else:
        sys.argv = list(launch["arguments"])
        sys.path[0] = os.path.dirname(script)
        runpy.run_path(script, run_name="__main__")


def wait_for(launch: dict[str, Any], ranks: list[int]) -> list[int]:
    """Waits for the ranks' ends, which one that fails, the stop or the time limit bring about for
    all. Returns their statuses."""
    ended: dict[int, int] = {}
    limit = time.monotonic() + launch["seconds"]
    killed = False
    while len(ended) < len(ranks):
        for process in set(ranks) - set(ended):
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                ended[process] = os.waitstatus_to_exitcode(status)
        if any(ended.values()):  # the others get a moment to say what they miss
            limit = min(limit, time.monotonic() + 3)
        is_late = time.monotonic() > limit
        if not killed and (halted(launch) or is_late):
            left = [process for process in ranks if process not in ended]
            if is_late:
                end(left, signal.SIGUSR1)
                time.sleep(1)
            end(left, signal.SIGKILL)
            killed = True
        time.sleep(0.02)
    return [ended[process] for process in ranks]


def end(processes: list[int], by: signal.Signals) -> None:
    for process in processes:
        os.kill(process, by)


def halted(launch: dict[str, Any]) -> bool:
    """Every rank has come to its last loss, and the checkpoint of before is complete."""
    if launch["stop_at"] is None:
        return False
    stopped = len(list(Path(launch["logs"]).glob("*.stopped"))) == launch["printing"]
    return stopped and any(Path(launch["arguments"][1]).glob(launch["complete"]))


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    if spec["ours"]:  # as a user's program does it: before it imports the framework
        from torch_hsdp_ckpt.compat import patch

        patch()
    for name in spec["imports"]:
        __import__(name)
    from ranks import one_gloo_thread

    one_gloo_thread()
    gc.freeze()  # a rank's end would look at each object of the modules, and copy its page
    for launch in spec["launches"]:
        with open(spec["lock"], "w") as lock:  # one launch at a time, of this driver or another
            fcntl.flock(lock, fcntl.LOCK_EX)
            begun = time.monotonic()
            agent, port = host_store()
            ranks = []
            for rank in range(RANKS):
                ranks.append(fork())
                if ranks[-1] == 0:
                    lock.close()
                    return run_rank({**launch, "ours": spec["ours"]}, rank, port)
            statuses = wait_for(launch, ranks)
            end([agent], signal.SIGKILL)
            os.waitpid(agent, 0)
        ended = {"statuses": statuses, "seconds": time.monotonic() - begun}
        (Path(launch["logs"]) / "ended.json").write_text(json.dumps(ended))
        if launch["stop_at"] is None and any(statuses):
            break


if __name__ == "__main__":
    main()
