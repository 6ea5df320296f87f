"""The checkpoints of a training run: one directory a step under one root. Which count, which may
go, and in what order.

A checkpoint counts as committed when its ``.metadata`` is there: that file is renamed into place
when all data is on disk. One that a manager has saved has a mark behind it, with the run that it
belongs to and a number that grows with each commit: this, and not the step, says which is newer."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import stat
from collections.abc import Collection, Sequence
from pathlib import Path

from .. import _C
from ..checkpoint.storage.directory import encoded
from ..checkpoint.storage.leftovers import make_room
from ..checkpoint.storage.metadata import read_metadata
from ..errors import CheckpointError

_NAME = re.compile(r"step-(\d{6,})")
# What these errors say of a file is that its bytes can't be had any more: it is missing, it is of
# another kind, or a device or a file system has found it damaged (EBADE: ZFS; EBADMSG and EUCLEAN:
# XFS, ext4; EOPNOTSUPP: no regular file). All others are about the system or this process.
_DAMAGE = frozenset(
    getattr(errno, name)
    for name in (
        "EBADE EBADMSG EIO EISDIR ENAMETOOLONG ENODATA ENOENT ENOTDIR EOPNOTSUPP EREMOTEIO EUCLEAN"
    ).split()
)


@dataclasses.dataclass(frozen=True)
class RunCheckpoint:
    """A committed checkpoint. ``run`` and ``commit`` are 0 for one that no manager has saved, or
    whose mark can't be read; ``failure`` then says why. ``modified``: when ``.metadata`` was
    written, in nanoseconds since the epoch; 0 where that can't be told."""

    step: int
    run: int = 0
    commit: int = 0
    failure: Exception | None = None
    modified: int = 0

    @property
    def order(self) -> tuple[int, int]:
        """Which of two of a kind was committed later: those without a mark go by their steps."""
        return self.commit, self.step


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a root holds by the names of steps.

    ``committed``: the later ones last, see :func:`in_order`. ``incomplete``: steps of which there
    is nothing, or data files alone: their save or their removal did not come to an end.
    ``foreign``: names of directories that hold something else."""

    committed: Sequence[RunCheckpoint]
    incomplete: Sequence[int]
    foreign: Sequence[str]

    @property
    def newest(self) -> RunCheckpoint:
        return self.committed[-1] if self.committed else RunCheckpoint(0)

    @property
    def newest_of_a_run(self) -> RunCheckpoint:
        """The newest that a manager has saved."""
        return max(self.committed, key=lambda found: found.order, default=RunCheckpoint(0))


def owner_of(name: str) -> _C.ProcessIdentity | None:
    """The process in the name of a data file or of a claim, None in any other name; names need not
    be UTF-8."""
    return _C.owner_of(encoded(name))


def path_of(root: Path, step: int) -> Path:
    """Returns the directory of the checkpoint that holds the state after ``step`` steps."""
    return root / f"step-{step:06d}"


def is_damage(error: Exception) -> bool:
    """Whether an error of reading a checkpoint is about its bytes, so that an older one may do."""
    if isinstance(error, OSError):
        return error.errno in _DAMAGE
    return isinstance(error, CheckpointError)


def is_committed(checkpoint: Path) -> bool:
    """Says whether the save of this checkpoint came to its end. Raises OSError where that can't be
    seen."""
    return _mode_of(checkpoint / ".metadata") is not None


def _mode_of(path: Path) -> int | None:
    """The mode of what a path leads to; None if there is nothing. Not Path.is_file, which takes
    every failure for that (Python 3.14)."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def _steps(root: Path) -> list[int]:
    """The steps that directories under ``root`` are named for, ascending."""
    try:
        entries = list(root.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    steps = []
    for entry in entries:
        match = _NAME.fullmatch(entry.name)
        if match and path_of(root, int(match[1])) == entry and stat.S_ISDIR(_mode_of(entry) or 0):
            steps.append(int(match[1]))
    return sorted(steps)


def committed_steps(root: Path) -> list[int]:
    """The steps of the committed checkpoints under ``root``, ascending."""
    return [step for step in _steps(root) if is_committed(path_of(root, step))]


def contents(root: Path) -> Contents:
    """Looks at all checkpoints under ``root``. Raises OSError where ``root`` can't be read."""
    committed: list[RunCheckpoint] = []
    incomplete: list[int] = []
    foreign: list[str] = []
    for step in _steps(root):
        path = path_of(root, step)
        if (found := _look_at(path, step)) is not None:
            committed.append(found)
        elif _holds_data_alone(path):
            incomplete.append(step)
        else:
            foreign.append(path.name)
    return Contents(in_order(committed), incomplete, foreign)


def in_order(committed: Collection[RunCheckpoint]) -> list[RunCheckpoint]:
    """Which come later. Those of managers by their commits; those without a mark, which somebody
    has saved by hand, behind them if they were written later than all of them, else before."""
    last = max((found.modified for found in committed if found.commit), default=0)

    def order(found: RunCheckpoint) -> tuple[bool, int, int]:
        return (not found.commit and found.modified > last, *found.order)

    return sorted(committed, key=order)


def _look_at(path: Path, step: int) -> RunCheckpoint | None:
    """The checkpoint in ``path``; None if none is committed there."""
    try:
        run, commit = _C.read_run_mark(encoded(path)) or (0, 0)
        modified = (path / ".metadata").stat().st_mtime_ns
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (CheckpointError, OSError) as error:
        return RunCheckpoint(step, failure=error)
    return RunCheckpoint(step, run, commit, modified=modified)


def _holds_data_alone(path: Path) -> bool:
    try:
        return all(owner_of(name) is not None for name in os.listdir(path))
    except OSError:
        return False


def why_unwritable(root: Path) -> OSError | None:
    """Why nothing can be made in ``root``, or in the nearest directory above that is there; None if
    nothing is known to be in the way."""
    at = root.absolute()
    while _mode_of(at) is None and at != at.parent:
        at = at.parent
    if not stat.S_ISDIR(_mode_of(at) or 0):
        return NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(at))
    if os.access(at, os.W_OK | os.X_OK, effective_ids=True):
        return None
    number = errno.EROFS if os.statvfs(at).f_flag & os.ST_RDONLY else errno.EACCES
    return OSError(number, os.strerror(number), str(at))


def damage(checkpoint: Path) -> str | None:
    """What can be seen of a committed checkpoint's damage without reading its data: ``.metadata``
    that does not decode, data files that are missing or too short. None if nothing is wrong.

    Raises OSError where the system refuses to look, which says nothing of the checkpoint."""
    try:
        ends = _ends_of_files(checkpoint)
        for name, end in ends.items():
            size = (checkpoint / name).stat().st_size
            if size < end:
                return f"{checkpoint / name} has {size} bytes, its records end at {end}"
    except (OSError, CheckpointError) as error:
        if not is_damage(error):
            raise
        return str(error)
    return None


def _ends_of_files(checkpoint: Path) -> dict[str, int]:
    """Where the last record ends that ``.metadata`` names in each data file, in bytes."""
    ends: dict[str, int] = {}
    for record in (read_metadata(checkpoint / ".metadata").storage_data or {}).values():
        end = record.offset + record.length
        ends[record.relative_path] = max(ends.get(record.relative_path, 0), end)
    return ends


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which checkpoints of a run stay: the newest ``keep_last`` good ones, and the multiples of
    ``keep_every`` (None: no others). ``damaged``: steps that were found out when they were read."""

    run: int
    keep_last: int
    keep_every: int | None = None
    damaged: Collection[int] = ()


def prune(
    root: Path, found: Contents, retention: Retention, spare: Collection[int] = ()
) -> list[int]:
    """Deletes checkpoints of the run that were committed before the newest ``keep_last`` good ones;
    returns their steps. ``found``: what ``root`` holds.

    Good are those that are not ``damaged`` and have none that :func:`damage` sees. Steps in
    ``spare`` stay, and so does whatever is not of this run. Call it on one rank after a save has
    committed."""
    if retention.keep_last < 1:
        raise ValueError(f"at least the newest checkpoint is kept: keep={retention.keep_last}")
    own = [each for each in found.committed if each.run == retention.run]
    good = _newest_good(root, own, retention)
    # As long as there are too few good ones, even a damaged one may be of use to somebody.
    if len(good) < retention.keep_last:
        return []
    stays = {each.step for each in good} | set(spare)
    if retention.keep_every:
        stays.update(each.step for each in own if each.step % retention.keep_every == 0)
    older = [each for each in own if each.order < good[-1].order]
    gone = [each.step for each in older if each.step not in stays]
    for step in gone:
        remove(path_of(root, step))
    return gone


def _newest_good(
    root: Path, own: Sequence[RunCheckpoint], retention: Retention
) -> list[RunCheckpoint]:
    """At most ``keep_last`` checkpoints, the newest first. Only good ones are counted: a damaged
    newest checkpoint must not push out the last good one."""
    good: list[RunCheckpoint] = []
    for found in reversed(own):
        if len(good) == retention.keep_last:
            break
        if found.step not in retention.damaged and damage(path_of(root, found.step)) is None:
            good.append(found)
    return good


def remove(checkpoint: Path) -> None:
    """Deletes a checkpoint so that no crash leaves something that looks whole and is not.

    ``.metadata`` goes first, and that is on disk before a data file is touched: else a power loss
    could bring it back without the files it names. From then on the directory is plainly
    incomplete, which is what an interrupted delete leaves; the next save ends it. What this package
    has not made stays, and the directory with it. A link to a checkpoint goes alone: what it leads
    to is not this run's."""
    if checkpoint.is_symlink():
        checkpoint.unlink()
        return
    files = [name for name in os.listdir(checkpoint) if owner_of(name) is not None]
    (checkpoint / ".metadata").unlink(missing_ok=True)
    _C.sync_directory(encoded(checkpoint))
    for name in files:
        (checkpoint / name).unlink(missing_ok=True)
    _remove_if_empty(checkpoint)


def _remove_if_empty(directory: Path) -> None:
    try:
        directory.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise


def sweep(root: Path, incomplete: Sequence[int], own: Sequence[_C.ProcessIdentity]) -> None:
    """Removes what saves that were killed, and removals that were interrupted, have left under
    ``root``, so that the next save has the room.

    ``incomplete``: the steps. ``own``: the processes of this job, of which no save may be under
    way. What a process may still write stays (see ``make_room``)."""
    for step in incomplete:
        path = path_of(root, step)
        if path.is_symlink() or not os.listdir(path) or _has_save_under_way(path, own):
            continue
        # With the claim, a save of a process that nobody here can see can't commit any more.
        claim = _C.claim_directory(encoded(path), ".metadata", _C.new_save_id(claimed=True), True)
        make_room(path, ".metadata", claim, True, own)
        _C.release_claim(encoded(path), claim)
        _remove_if_empty(path)


def _has_save_under_way(path: Path, own: Sequence[_C.ProcessIdentity]) -> bool:
    """Whether a process that runs here, and is not of this job, has a file in the directory."""
    for name in os.listdir(path):
        owner = owner_of(name)
        if owner is not None and owner not in own and _C.is_running(owner, 0):
            return True
    return False
