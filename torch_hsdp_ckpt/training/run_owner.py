"""Which job saves into a root: one at a time, as far as that can be seen.

A job claims the root as a save claims its directory (csrc/checkpoint/commit/claim.cpp), for as
long as its manager lives. Who comes later takes the claim over, unless the one before is known to
run."""

import dataclasses
import logging
import os
import secrets
import weakref
from collections.abc import Sequence
from pathlib import Path

from .. import _C
from ..checkpoint.storage.directory import encoded
from ..errors import CheckpointError
from . import run_directory

_logger = logging.getLogger(__name__)
# As a metadata's name, so that the claim is one; no such metadata is ever made.
_CLAIMED = ".manager.metadata"
_ADVICE = "give each job a root of its own"


@dataclasses.dataclass
class _OfProcess:
    """What the managers of one process have of a root together: they take it from each other."""

    claim: str | None = None  # the last that one of them has made, and not given up
    handed_on: set[str] = dataclasses.field(default_factory=set)  # claims, from one to the next
    commit: int = 0  # the last that one of them has begun


# By process as well: a forked child's managers are another job.
_of_processes: dict[tuple[int, Path], _OfProcess] = {}


class RunOwner:
    """The coordinator's part of a manager: the claim on the root, and what the directory has said.

    ``run``: of the checkpoints here, 0 until the first save. Not thread-safe."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._claim: str | None = None
        self._seen_commit = 0
        self._release: weakref.finalize[..., RunOwner] | None = None
        self.run = 0

    def look(self, found: run_directory.Contents) -> None:
        """Notes the newest checkpoint: one that comes later and is not this job's is another's."""
        self._seen_commit = max(self._seen_commit, found.newest_of_a_run.commit)

    def begin_save(self, found: run_directory.Contents, job: Sequence[_C.ProcessIdentity]) -> int:
        """Makes sure that this job, whose processes are ``job``, saves into the root, which holds
        ``found``; returns the number of the next commit.

        Raises CheckpointError if another job does."""
        newest = found.newest_of_a_run
        if not self.holds_root:
            self._take_root(job, newest.commit)
        self.run = self.run or newest.run or secrets.randbits(64) | 1
        self._seen_commit = max(self._seen_commit, newest.commit) + 1
        ours = self._of_process
        ours.commit = max(ours.commit, self._seen_commit)
        return self._seen_commit

    @property
    def _of_process(self) -> _OfProcess:
        return _of_processes.setdefault((os.getpid(), self._root), _OfProcess())

    @property
    def holds_root(self) -> bool:
        """Whether no other job has taken the root over since the last save began."""
        return self._claim is not None and (self._root / self._claim).exists()

    def _take_root(self, job: Sequence[_C.ProcessIdentity], newest: int) -> None:
        _C.make_directories(encoded(self._root), True)
        unseen = False
        for name in os.listdir(self._root):
            owner = run_directory.owner_of(name) if name.startswith(_CLAIMED) else None
            if owner is not None and owner not in job:
                unseen = self._may_run(name, owner) or unseen
        self._check_not_taken_over(newest)
        if unseen:
            _logger.warning(
                "%s: a job on another host, or in another container, has saved its checkpoints "
                "here and has not said that it is done. This job goes on; that one, if it still "
                "runs, gets an error from its next save",
                self._root,
            )
        ours = self._of_process
        if ours.claim is not None and (self._root / ours.claim).exists():
            ours.handed_on.add(ours.claim)
        self.release()
        save_id = _C.new_save_id(claimed=True)
        claim = _C.claim_directory(encoded(self._root), _CLAIMED, save_id, True)
        self._claim = ours.claim = claim
        key = os.getpid(), self._root
        self._release = weakref.finalize(self, _release, key, claim)

    def _may_run(self, name: str, owner: _C.ProcessIdentity) -> bool:
        """Whether nothing can be seen of another job, whose claim this is. Raises CheckpointError
        if it runs."""
        try:
            modified = int((self._root / name).stat().st_mtime)
        except FileNotFoundError:
            return False
        is_running = _C.is_running(owner, modified)
        if is_running:
            raise CheckpointError(
                f"{self._root}: another job, process {owner.pid} on this host, saves its "
                f"checkpoints here; end it, or {_ADVICE}"
            )
        return is_running is None

    def _check_not_taken_over(self, newest: int) -> None:
        """Raises CheckpointError if another job has saved here meanwhile, though it may have ended
        since: this one would go on from an older state, and delete what that one has saved.

        It has taken this manager's claim, which is not there any more, or has committed. Both are
        asked: a save that this job had begun and that one's may have the same number."""
        ours = self._of_process
        is_robbed = self._claim is not None and self._claim not in ours.handed_on
        if is_robbed or newest > max(self._seen_commit, ours.commit):
            raise CheckpointError(
                f"{self._root}: another job has begun to save its checkpoints here; {_ADVICE}"
            )

    def release(self) -> None:
        """Gives the root up, for the next job."""
        if self._release is not None:
            self._release()
        self._claim = self._release = None


def _release(key: tuple[int, Path], claim: str) -> None:
    process, root = key
    if os.getpid() != process:  # a forked child ends with a copy of its parent's manager
        return
    _C.release_claim(encoded(root), claim)
    if (ours := _of_processes.get(key)) is not None and ours.claim == claim:
        ours.claim = None
