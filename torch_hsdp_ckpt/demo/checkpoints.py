"""Which checkpoints a training directory holds, which of them count, and which may go.

A checkpoint counts as committed when its ``.metadata`` is there: that file is renamed into place when all data is on disk.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

_NAME = re.compile(r"step-(\d{6,})")


def path_of(root: Path, step: int) -> Path:
    """Returns the directory of the checkpoint that holds the state after ``step`` steps."""
    return root / f"step-{step:06d}"


def is_committed(checkpoint: Path) -> bool:
    """Says whether the save of this checkpoint came to its end."""
    return (checkpoint / ".metadata").is_file()


def steps_in(root: Path) -> tuple[list[int], list[int]]:
    """Returns the steps of the committed and of the incomplete checkpoints under ``root``, each ascending."""
    committed: list[int] = []
    incomplete: list[int] = []
    for entry in root.iterdir() if root.is_dir() else ():
        match = _NAME.fullmatch(entry.name)
        if match and entry.is_dir():
            (committed if is_committed(entry) else incomplete).append(int(match[1]))
    return sorted(committed), sorted(incomplete)


def prune(root: Path, keep: int) -> list[int]:
    """Deletes all checkpoints older than the newest ``keep`` committed ones and returns their steps.

    Call it on one rank after a save has committed: what is deleted is then never the only good one. ``.metadata`` goes first,
    so that a crash in the middle leaves something plainly incomplete, not something that looks whole.
    """
    committed, incomplete = steps_in(root)
    oldest_kept = committed[-keep:][0] if committed else 0
    gone = [step for step in sorted(committed + incomplete) if step < oldest_kept]
    for step in gone:
        (path_of(root, step) / ".metadata").unlink(missing_ok=True)
        shutil.rmtree(path_of(root, step))
    return gone
