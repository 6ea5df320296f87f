"""The checkpoints that a ``CheckpointManager`` makes: one directory a step under one root.

A checkpoint is committed when its ``.metadata`` is there: that file is renamed into place when all
data is on disk."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Steps:
    """The steps that have a directory, each list ascending."""

    committed: list[int]
    incomplete: list[int]


def path_of(root: Path, step: int) -> Path:
    """Returns the directory of the checkpoint that holds the state after ``step`` steps."""
    return root / f"step-{step:06d}"


def is_committed(checkpoint: Path) -> bool:
    """Says whether the save of this checkpoint came to its end."""
    return (checkpoint / ".metadata").is_file()


def steps_in(root: Path) -> Steps:
    """Returns the steps of the checkpoints under ``root``."""
    found = Steps([], [])
    for entry in sorted(root.iterdir()) if root.is_dir() else ():
        match = _NAME.fullmatch(entry.name)
        if match and entry.is_dir():
            steps = found.committed if is_committed(entry) else found.incomplete
            steps.append(int(match[1]))
    return found


def data_files(checkpoint: Path) -> dict[str, int]:
    """Returns the sizes in bytes of a checkpoint's files, without ``.metadata`` and what is going
    to be renamed to it."""
    try:
        with os.scandir(checkpoint) as entries:
            return {
                entry.name: entry.stat().st_size
                for entry in entries
                if not entry.name.startswith(".metadata")
            }
    except FileNotFoundError:
        # The save has not made its directory yet, or renamed a file while we looked.
        return {}
