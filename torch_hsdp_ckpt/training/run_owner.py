"""Which job saves into a root: one at a time, as far as that can be seen.

A job claims the root as a save claims its directory (csrc/checkpoint/commit/claim.cpp), for as
long as its manager lives. Who comes later takes the claim over, unless the one before is known to
run."""

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
        if self._claim is None or not (self._root / self._claim).exists():
            self._take_root(job, found.newest.commit)
        self.run = self.run or found.newest.run or secrets.randbits(64) | 1
        self._seen_commit = max(self._seen_commit, found.newest.commit) + 1
        return self._seen_commit

    @property
    def holds_root(self) -> bool:
        """Whether no other job has taken the root over since the last save began."""
        return self._claim is not None and (self._root / self._claim).exists()

    def _take_root(self, job: Sequence[_C.ProcessIdentity], newest: int) -> None:
        _C.make_directories(str(self._root), True)
        for name in os.listdir(self._root):
            owner = _C.owner_of(name) if name.startswith(_CLAIMED) else None
            if owner is not None and owner not in job:
                self._check_other(name, owner, newest)
        self.release()
        save_id = _C.new_save_id(claimed=True)
        claim = _C.claim_directory(encoded(self._root), _CLAIMED, save_id, True)
        self._claim = claim
        self._release = weakref.finalize(self, _release, encoded(self._root), claim, os.getpid())

    def _check_other(self, name: str, owner: _C.ProcessIdentity, newest: int) -> None:
        """Looks at another job's claim. Raises CheckpointError if that job runs."""
        advice = "give each job a root of its own"
        try:
            modified = int((self._root / name).stat().st_mtime)
        except FileNotFoundError:
            return
        is_running = _C.is_running(owner, modified)
        if is_running:
            raise CheckpointError(
                f"{self._root}: another job, process {owner.pid} on this host, saves its "
                f"checkpoints here; end it, or {advice}"
            )
        if is_running is None and (self._claim is not None or newest > self._seen_commit):
            raise CheckpointError(
                f"{self._root}: another job has begun to save its checkpoints here; {advice}"
            )
        if is_running is None:
            _logger.warning(
                "%s: a job on another host, or in another container, has saved its checkpoints "
                "here and has not said that it is done. This job goes on; that one, if it still "
                "runs, gets an error from its next save",
                self._root,
            )

    def release(self) -> None:
        """Gives the root up, for the next job."""
        if self._release is not None:
            self._release()
        self._claim = self._release = None


def _release(root: bytes, claim: str, process: int) -> None:
    if os.getpid() == process:  # a forked child ends with a copy of its parent's manager
        _C.release_claim(root, claim)
