"""Kills a training job in the middle of a save, and makes sure that it was the middle."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import checkpoints
from .journal import Tail
from .launch import Job, send


@dataclass(frozen=True)
class Crash:
    """What a dead save left behind: the step it was saving, its data files and their bytes, and no
    ``.metadata``."""

    step: int
    files: int
    bytes: int


def kill_in_save(
    job: Job, root: Path, tail: Tail, first_step: int, seen: Callable[[dict[str, Any]], None]
) -> Crash | None:
    """Kills ``job`` in its first save at or after ``first_step`` whose data is partly there and
    whose ``.metadata`` is not.

    ``seen`` gets the job's events. Where a save commits before we could stop it, the next save is
    tried. Returns None if the job came to its end alive. Raises JobError if it failed."""
    while job.running():
        for event in tail.new():
            seen(event)
            due = event["event"] == "save" and event["step"] >= first_step
            if due and _freeze_in_save(job, checkpoints.path_of(root, event["step"])):
                job.kill()
                return _left_behind(root, event["step"])
        time.sleep(0.002)
    return None


def _freeze_in_save(job: Job, checkpoint: Path) -> bool:
    """Waits for the save's first bytes, then freezes the job. Returns False, and lets it go on, if
    the commit was faster."""
    processes = job.processes()  # looked up ahead: a small save is done in milliseconds
    while not checkpoints.is_committed(checkpoint):
        if any(checkpoints.data_files(checkpoint).values()):
            # Frozen, nothing moves between our look and the kill.
            send(signal.SIGSTOP, processes)
            if not checkpoints.is_committed(checkpoint):
                return True
            send(signal.SIGCONT, processes)
            return False
        if not job.running():
            return False
        time.sleep(0.0002)
    return False


def _left_behind(root: Path, step: int) -> Crash | None:
    """Returns what the killed save of ``step`` left. None where it is committed after all: a rename
    that was under way in the kernel when the job froze has come to its end."""
    checkpoint = checkpoints.path_of(root, step)
    if checkpoints.is_committed(checkpoint):
        return None
    sizes = checkpoints.data_files(checkpoint)
    return Crash(step, len(sizes), sum(sizes.values()))
