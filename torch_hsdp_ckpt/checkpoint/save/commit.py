"""Last phase of a save: one vote of all ranks, and the coordinator's rename."""

import dataclasses
import logging
import os
import pickle
import struct
import time
from collections.abc import Sequence

from torch.distributed.checkpoint.metadata import Metadata

from ... import _C
from ...errors import CheckpointError
from ..storage.metadata import decode_metadata, read_metadata_bytes
from ..storage.writer import FileWriteResult
from .metadata_build import complete_metadata
from .open import Opened
from .result import SavedMetadata, SaveResult
from .write import Written

_logger = logging.getLogger(__name__)

# What the ranks tell each other at the end: bytes written, seconds before the first byte and of
# writing. The results of what DCP has planned follow, pickled.
_VOTE = struct.Struct("<Qdd")
_TRAILER_BYTES = 24  # the last bytes of `.metadata`, its checksum among them


@dataclasses.dataclass(frozen=True)
class _Vote:
    bytes_written: int
    plan_seconds: float
    write_seconds: float
    results: Sequence[FileWriteResult]


def commit(opened: Opened, written: Written | BaseException) -> SavedMetadata:
    """Makes the save the directory's checkpoint if every rank has written its part.

    ``written``: an exception of this rank fails the save on all ranks. Raises as ``save`` does;
    ``opened.unfinished`` is still to be abandoned then."""
    begin = time.perf_counter()
    request, agreement = opened.request, opened.request.agreement
    if isinstance(written, BaseException):
        agreement.exchange("write", error=written)  # raises, on every rank
        raise written
    ballots = agreement.exchange("write", _pack_vote(written))
    votes = [_unpack_vote(ballot) for ballot in ballots]
    opened.unfinished.keep_files()
    encoded: list[bytes | memoryview] = []

    def commit_here() -> bytes:
        metadata = _commit_as_coordinator(opened, written, votes)
        encoded.append(metadata)
        return bytes(metadata[-_TRAILER_BYTES:])

    trailer = agreement.verdict("commit", commit_here)
    opened.unfinished.end_threads()
    end = time.perf_counter()
    path = str(request.writer.path)
    result = SaveResult(
        path=path,
        rank=agreement.rank,
        bytes_written=tuple(vote.bytes_written for vote in votes),
        write_seconds=tuple(vote.write_seconds for vote in votes),
        seconds={
            "plan": written.plan_seconds,
            "write": written.write_seconds,
            "commit": end - begin,
            "total": end - request.started,
        },
    )
    level = logging.INFO if agreement.is_coordinator else logging.DEBUG
    _logger.log(level, "saved %s: %s", path, result)
    return SavedMetadata.lazy(lambda: _read_back(path, trailer, encoded), result)


def _pack_vote(written: Written) -> bytes:
    head = _VOTE.pack(written.bytes_written, written.plan_seconds, written.write_seconds)
    return head + (pickle.dumps(list(written.results)) if written.results else b"")


def _unpack_vote(ballot: bytes) -> _Vote:
    pickled_results = ballot[_VOTE.size :]
    results = pickle.loads(pickled_results) if pickled_results else []
    size, plan_seconds, write_seconds = _VOTE.unpack(ballot[: _VOTE.size])
    return _Vote(size, plan_seconds, write_seconds, results)


def _commit_as_coordinator(
    opened: Opened, written: Written, votes: Sequence[_Vote]
) -> bytes | memoryview:
    """Makes the checkpoint; the bytes of its `.metadata`."""
    assert written.metadata is not None
    built = written.metadata.result()
    files = {name: _C.ExpectedFile(name, size, exact=True) for name, size in built.files}
    results = [result for vote in votes for result in vote.results]
    for result in results:
        name = result.storage_data.relative_path
        files[name] = _C.ExpectedFile(name, result.file_size, exact=True)
    metadata = complete_metadata(built, opened.gathered.metadata, results)
    claim = opened.unfinished.take_claim()
    opened.request.writer._commit(claim, metadata, list(files.values()))
    return metadata


def _read_back(path: str, trailer: bytes, encoded: Sequence[bytes | memoryview]) -> Metadata:
    """The metadata that was committed: the coordinator has it, other ranks read it."""
    if encoded:
        return decode_metadata(encoded[0], path)
    data = read_metadata_bytes(os.path.join(path, ".metadata"))
    if data[-_TRAILER_BYTES:] != trailer:
        raise CheckpointError(
            f"{path}/.metadata: a later save has replaced the checkpoint whose metadata this was"
        )
    return decode_metadata(data, path)
