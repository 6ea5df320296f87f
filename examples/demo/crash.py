"""Kills a training job in the middle of a save, and makes sure that it was the middle."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch_hsdp_ckpt.training import run_directory as checkpoints

from .journal import Tail
from .launch import Job, send


@dataclass(frozen=True)
class Crash:
    """What a dead save left behind: the step it was saving, its data files and their bytes, and no
    ``.metadata``."""

    step: int
    files: int
    bytes: int


def data_files(checkpoint: Path) -> dict[str, int]:
    """Returns the sizes of a checkpoint's files, without ``.metadata`` and what is going to be
    renamed to it."""
    try:
        with os.scandir(checkpoint) as entries:
            sizes = {
                entry.name: entry.stat().st_size
                for entry in entries
                if not entry.name.startswith(".metadata")
            }
    except FileNotFoundError:
        return {}  # the save has not made its directory yet, or renamed a file while we looked
    return sizes


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
            if (
                event["event"] == "save"
                and event["step"] >= first_step
                and _caught(job, checkpoints.path_of(root, event["step"]))
            ):
                job.kill()
                path = checkpoints.path_of(root, event["step"])
                sizes = data_files(path)
                # A rename that was under way in the kernel when the job froze would have been
                # finished.
                return (
                    None
                    if checkpoints.is_committed(path)
                    else Crash(event["step"], len(sizes), sum(sizes.values()))
                )
        time.sleep(0.002)
    return None


def _caught(job: Job, checkpoint: Path) -> bool:
    """Waits for the save's first bytes, then freezes the job. Returns False, and lets it go on, if
    the commit was faster."""
    processes = job.processes()  # looked up ahead: a small save is done in milliseconds
    while not checkpoints.is_committed(checkpoint):
        if any(data_files(checkpoint).values()):
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
