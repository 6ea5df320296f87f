"""The checkpoints of a training run: one directory a step under one root. Which count, which may
go, and in what order.

A checkpoint counts as committed when its ``.metadata`` is there: that file is renamed into place
when all data is on disk."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from pathlib import Path

from .. import _C
from ..checkpoint.storage.metadata import read_metadata
from ..errors import CheckpointError

_NAME = re.compile(r"step-(\d{6,})")


def path_of(root: Path, step: int) -> Path:
    """Returns the directory of the checkpoint that holds the state after ``step`` steps."""
    return root / f"step-{step:06d}"


def is_committed(checkpoint: Path) -> bool:
    """Says whether the save of this checkpoint came to its end."""
    return (checkpoint / ".metadata").is_file()


def steps_in(root: Path) -> tuple[list[int], list[int]]:
    """Returns the steps of the committed and of the incomplete checkpoints under ``root``, each
    ascending."""
    committed: list[int] = []
    incomplete: list[int] = []
    for entry in root.iterdir() if root.is_dir() else ():
        match = _NAME.fullmatch(entry.name)
        if not match or not entry.is_dir():
            continue
        step = int(match[1])
        if path_of(root, step) != entry:
            continue
        if is_committed(entry):
            committed.append(step)
        else:
            incomplete.append(step)
    return sorted(committed), sorted(incomplete)


def damage(checkpoint: Path) -> str | None:
    """What can be seen of a committed checkpoint's damage without reading its data: ``.metadata``
    that does not decode, data files that are missing or too short. None if nothing is wrong."""
    try:
        ends = _ends_of_files(checkpoint)
        for name, end in ends.items():
            size = (checkpoint / name).stat().st_size
            if size < end:
                return f"{checkpoint / name} has {size} bytes, its records end at {end}"
    except (OSError, CheckpointError) as error:
        return str(error)
    return None


def _ends_of_files(checkpoint: Path) -> dict[str, int]:
    """Where the last record ends that ``.metadata`` names in each data file, in bytes."""
    ends: dict[str, int] = {}
    for record in (read_metadata(checkpoint / ".metadata").storage_data or {}).values():
        end = record.offset + record.length
        ends[record.relative_path] = max(ends.get(record.relative_path, 0), end)
    return ends


def prune(
    root: Path,
    keep: int,
    keep_every: int | None = None,
    spare: Collection[int] = (),
    damaged: Collection[int] = (),
) -> list[int]:
    """Deletes checkpoints that are older than the newest ``keep`` good ones; returns their steps.

    Good are the committed ones that are not among ``damaged`` and have none that :func:`damage`
    sees. Steps in ``spare`` and multiples of ``keep_every`` stay. Incomplete ones stay while they
    are newer than the oldest kept one: a save may be on its way there. Call it on one rank after a
    save has committed."""
    if keep < 1:
        raise ValueError(f"at least the newest checkpoint is kept: keep={keep}")
    committed, incomplete = steps_in(root)
    good = _newest_good(root, committed, keep, damaged)
    if not good:
        return []
    stays = {*good, *spare}
    if keep_every:
        stays.update(step for step in committed if step % keep_every == 0)
    if len(good) < keep:
        # As long as there are too few good ones, even a damaged one may be of use to somebody.
        stays.update(committed)
    oldest_good = good[-1]
    gone = [
        step for step in sorted(committed + incomplete) if step < oldest_good and step not in stays
    ]
    for step in gone:
        remove(path_of(root, step))
    return gone


def _newest_good(
    root: Path, committed: list[int], keep: int, damaged: Collection[int]
) -> list[int]:
    """At most ``keep`` steps, the newest first. Only good ones are counted: a damaged newest
    checkpoint must not push out the last good one."""
    good: list[int] = []
    for step in reversed(committed):
        if len(good) == keep:
            break
        if step not in damaged and damage(path_of(root, step)) is None:
            good.append(step)
    return good


def remove(checkpoint: Path) -> None:
    """Deletes a checkpoint so that no crash leaves something that looks whole and is not.

    ``.metadata`` goes first, and that is on disk before a data file is touched: else a power loss
    could bring it back without the files it names. From then on the directory is plainly
    incomplete, which is what an interrupted delete leaves; the next prune ends it. A link to a
    checkpoint goes alone: what it leads to is not this run's."""
    if checkpoint.is_symlink():
        checkpoint.unlink()
        return
    metadata = checkpoint / ".metadata"
    if metadata.exists():
        metadata.unlink()
        _C.sync_directory(str(checkpoint))
    shutil.rmtree(checkpoint)
