"""What a save has begun, and has to end if it fails."""

import threading

from ... import _C
from ...common.agreement import Agreement
from ...errors import CheckpointError
from ..storage.directory import encoded
from ..storage.leftovers import remove_quietly
from ..storage.writer import FileSystemWriter


class Unfinished:
    """The one owner of what a rank's save may leave behind: the coordinator's claim on the
    directory, this rank's data files, and the thread that builds the metadata.

    It belongs to one save and is used by one thread at a time. :meth:`abandon` may be called at
    any time, and more than once."""

    def __init__(self, writer: FileSystemWriter, agreement: Agreement) -> None:
        self._writer, self._agreement = writer, agreement
        self._claim: str | None = None
        self._files: list[str] = []
        self._threads: list[threading.Thread] = []

    def claim_directory(self) -> int:
        """Makes this the save that may commit into the directory; returns the id of the save."""
        save_id, self._claim = self._writer._claim_for_save()
        return save_id

    def take_claim(self) -> str:
        """The claim, for the commit, which cleans up after itself from here on."""
        claim, self._claim = self._claim, None
        if claim is None:
            raise CheckpointError(f"{self._writer.path}: this save has no claim to commit with")
        return claim

    def add_file(self, name: str) -> None:
        """A data file that is written, and of no use if the save fails."""
        self._files.append(name)

    def keep_files(self) -> None:
        """All ranks have voted: the files may be committed from here on."""
        self._files.clear()

    def add_thread(self, thread: threading.Thread) -> None:
        """A thread that has been started and ends by itself."""
        self._threads.append(thread)

    def end_threads(self) -> None:
        while self._threads:
            self._threads.pop().join()

    def abandon(self) -> None:
        """After an exception: gives up the claim and removes this rank's files, unless they may
        still be committed."""
        self.end_threads()
        claim, self._claim = self._claim, None
        if claim is not None:
            _C.release_claim(encoded(self._writer.path), claim)
        # Without an answer from the peers nobody knows but the coordinator, who alone commits.
        if not self._agreement.broken or self._agreement.is_coordinator:
            remove_quietly(self._writer.path, self._files)
        self._files.clear()
