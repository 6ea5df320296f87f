"""Opened: what `.metadata` says, read once a host and the same on all ranks."""

import dataclasses
import errno
import hashlib
import os
from typing import NamedTuple

from ...errors import CheckpointError, os_error
from ..storage.reader import FileSystemReader
from .ranks import LoadRanks

# A directory that is saved over faster than that is nothing that can be loaded.
ATTEMPTS = 5
_PER_RANK = b"per rank"


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint whose `.metadata`, in bytes, all ranks have and agree on."""

    reader: FileSystemReader
    ranks: LoadRanks
    metadata: bytes


def open_checkpoint(reader: FileSystemReader, ranks: LoadRanks) -> Opened | None:
    """None for a checkpoint that was saved without collectives: each rank has metadata of its own.

    Raises FileNotFoundError where there is no checkpoint, CheckpointError where hosts keep reading
    different files."""
    for _ in range(ATTEMPTS):
        found, digests = ranks.agreement.run_and_tell(
            "metadata",
            lambda: _read_metadata(reader, ranks),
            lambda found: found.digest,
        )
        if len(set(digests)) > 1:  # a save came between two hosts' reads
            continue
        if found.is_per_rank:
            return None
        if not found.file:
            message = "there is no checkpoint here (rank 0, step 'metadata')"
            raise os_error(errno.ENOENT, message, str(reader._get_metadata_path()))
        return Opened(reader, ranks, found.file)
    raise CheckpointError(
        f"{reader.path}/.metadata: hosts read different files; is it one directory on all of them?"
    )


class _FoundMetadata(NamedTuple):
    file: bytes  # empty if there is none
    is_per_rank: bool

    @property
    def digest(self) -> bytes:
        return _PER_RANK if self.is_per_rank else hashlib.sha256(self.file).digest()


def _read_metadata(reader: FileSystemReader, ranks: LoadRanks) -> _FoundMetadata:
    """Called by all ranks: the first one of each host reads the file, and hands it on."""

    def read() -> bytes:
        try:
            return reader.read_metadata_file()
        except FileNotFoundError:
            return b""

    host = ranks.subgroup(ranks.on_this_host())
    file = host.verdict("metadata", read)
    own_path = reader._get_metadata_path(ranks.agreement.rank)
    return _FoundMetadata(file, is_per_rank=not file and os.path.exists(own_path))
