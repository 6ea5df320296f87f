"""One training job: torchrun and the ranks it starts, and how to freeze, kill and question them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


class JobError(Exception):
    """A training job failed; the message names the rank that failed first and shows its error."""


class Job:
    """A job under torch's launcher with ``ranks`` processes on this host. Its output goes to files
    under ``logs``.

    Use it as a context manager: whatever happens, none of its processes outlives the block.
    """

    def __init__(self, name: str, ranks: int, arguments: Sequence[str], logs: Path) -> None:
        self.name, self.ranks, self._logs = name, ranks, logs
        logs.mkdir(parents=True, exist_ok=True)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(ranks), "--redirects", "3", "--log-dir", str(logs)]
        launcher += ["-m", "examples.demo.train"]
        # One thread a rank: the ranks already fill the cores. cuBLAS needs its setting to give the
        # same bits twice.
        env = {"OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", **os.environ}
        with (logs / "torchrun.log").open("wb") as output:
            self._torchrun = subprocess.Popen(
                [*launcher, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,  # Ctrl-C reaches us alone, and we end the job
            )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    def running(self) -> bool:
        """Says whether the job goes on. Raises JobError if it has failed."""
        code = self._torchrun.poll()
        if code:
            problem = f"the {self.name} run failed (exit code {code}): {self._failure()}"
            raise JobError(f"{problem}\nits logs: {self._logs}")
        return code is None

    def processes(self) -> list[int]:
        """Returns the pids of torchrun and all below it (a rank leads its own process group: one
        killpg would not do)."""
        # Nobody reaps torchrun but us: until poll() has seen its end, its pid and its children's
        # are really its own.
        return _family(self._torchrun.pid) if self._torchrun.poll() is None else []

    def kill(self) -> None:
        """Ends the whole job with SIGKILL, as a host that loses power would, and waits until
        nothing of it is left."""
        family = self.processes()  # listed before anything dies: an orphan has another parent
        send(signal.SIGKILL, family)
        self._torchrun.wait()
        while any(_alive(pid) for pid in family):
            time.sleep(0.005)

    def _failure(self) -> str:
        """Returns what is known of the failure, in lines for the user."""
        failure = self._first_raised() or self._first_died()
        if failure is None:
            return "torchrun itself failed:\n" + _tail(self._logs / "torchrun.log")
        said = f"rank {failure.rank} of {self.ranks} {failure.said}\n"
        stderr = next(self._logs.glob(f"**/{failure.rank}/stderr.log"), None)
        return said if stderr is None else said + _tail(stderr)

    def _first_raised(self) -> _Failure | None:
        """Returns the exception that a rank raised first, which torchrun's `record` has written."""
        raised = []
        for file in self._logs.glob("**/error.json"):
            message = json.loads(file.read_text(encoding="utf-8"))["message"]
            if isinstance(message, dict):
                when = int(message["extraInfo"]["timestamp"])
                rank = int(file.parent.name)
                raised.append(_Failure(when, rank, f"raised {message['message']}"))
        return min(raised, default=None)

    def _first_died(self) -> _Failure | None:
        """Returns the rank that ended first without an exception, as torchrun logs it."""
        text = (self._logs / "torchrun.log").read_text(encoding="utf-8", errors="replace")
        match = re.search(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)", text)
        if match is None:
            return None
        return _Failure(0, int(match[2]), f"ended with exit code {match[1]}")


@dataclass(frozen=True, order=True)
class _Failure:
    """A rank's end: when, in seconds since the epoch, which rank, and how."""

    when: int
    rank: int
    said: str


def _tail(file: Path, lines: int = 15) -> str:
    last = file.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
    return "\n".join("  " + line for line in last)


def _stat(pid: int) -> list[str]:
    """Returns the fields of /proc/PID/stat after the program's name (state, parent, ...); none if
    there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text.rpartition(")")[2].split()


def _alive(pid: int) -> bool:
    return _stat(pid)[:1] not in ([], ["Z"], ["X"])


def _family(root: int) -> list[int]:
    """Returns ``root`` and all its descendants."""
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    children: dict[int, list[int]] = {}
    for pid in pids:
        fields = _stat(pid)
        if fields:
            children.setdefault(int(fields[1]), []).append(pid)
    family = [root]
    for pid in family:  # grows while it is walked
        family += children.get(pid, [])
    return family


def send(number: signal.Signals, pids: Iterable[int]) -> None:
    """Sends a signal to each process that is still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
