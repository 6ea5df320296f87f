"""Last phase of a save: one vote of all ranks, and the coordinator's rename."""

import dataclasses
import itertools
import logging
import os
import pickle
import struct
import time
from collections.abc import Callable, Sequence

from torch.distributed.checkpoint.metadata import Metadata

from ... import _C
from ...errors import CheckpointError
from ..storage.metadata import decode_metadata, read_metadata_bytes
from ..storage.writer import FileWriteResult
from .metadata_build import BuiltMetadata, build_metadata, complete_metadata
from .open import Opened, SaveRequest
from .result import SavedMetadata, SaveResult
from .whole_plan import WholePlan, put_together
from .write import Written

_logger = logging.getLogger(__name__)

# What the ranks tell each other at the end: bytes written, seconds before the first byte and of
# writing. The results of what DCP has planned follow, pickled.
_VOTE = struct.Struct("<Qdd")
_TRAILER_BYTES = 24  # the last bytes of `.metadata`, its checksum among them


@dataclasses.dataclass(frozen=True)
class _Vote:
    """What a rank says of the files that it has written; the coordinator unpickles the results."""

    bytes_written: int
    plan_seconds: float
    write_seconds: float
    pickled_results: bytes  # of what DCP has planned; empty if that is nothing

    def results(self) -> Sequence[FileWriteResult]:
        if not self.pickled_results:
            return []
        results: Sequence[FileWriteResult] = pickle.loads(self.pickled_results)
        return results


def write_and_commit(opened: Opened, write_part: Callable[[], Written]) -> SavedMetadata:
    """Writes this rank's part, by ``write_part``, and makes the save the directory's checkpoint if
    every rank has written its part.

    What ``write_part`` raises fails the save on all ranks. Raises as ``save`` does; nothing is left
    of a save that has failed."""
    try:
        return _write_and_commit(opened, write_part)
    except BaseException:
        opened.unfinished.abandon()
        raise


def _write_and_commit(opened: Opened, write_part: Callable[[], Written]) -> SavedMetadata:
    request, agreement = opened.request, opened.request.agreement
    written, packed_votes = agreement.run_and_tell("write", write_part, _packed_vote)
    whole = _put_together(opened, written)
    # First of all: whatever this rank runs into from here on, the coordinator may commit its files.
    opened.unfinished.keep_files()
    votes = [_unpacked_vote(packed) for packed in packed_votes]
    encoded: list[bytes | memoryview] = []

    def commit_here() -> bytes:
        metadata = _commit_as_coordinator(opened, _built(opened, written, whole), votes)
        encoded.append(metadata)
        return bytes(metadata[-_TRAILER_BYTES:])

    trailer = agreement.verdict("commit", commit_here)
    opened.unfinished.end_threads()
    path = str(request.writer.path)
    result = _result(request, written, votes)
    level = logging.INFO if agreement.is_coordinator else logging.DEBUG
    _logger.log(level, "saved %s: %s", path, result)
    return SavedMetadata.of(lambda: _read_back(path, trailer, encoded), result)


def _put_together(opened: Opened, written: Written) -> WholePlan | None:
    """On the coordinator, what all ranks have written, if they do not hold the same. Raises
    CheckpointError on all ranks, none of which has anything to keep then, for a key under which
    they hold different things."""
    division, agreement = opened.division, opened.request.agreement
    if division.is_alike:
        return None
    packed = agreement.gather("plan", written.role_plan)
    whole: list[WholePlan] = []

    def run() -> bytes:
        whole.append(put_together(division.roles, packed, opened.gathered.held))
        return b""

    agreement.verdict("plan", run)
    return whole[0] if whole else None


def _packed_vote(written: Written) -> bytes:
    head = _VOTE.pack(written.bytes_written, written.plan_seconds, written.write_seconds)
    return head + (pickle.dumps(list(written.results)) if written.results else b"")


def _unpacked_vote(packed: bytes) -> _Vote:
    bytes_written, plan_seconds, write_seconds = _VOTE.unpack_from(packed)
    return _Vote(bytes_written, plan_seconds, write_seconds, packed[_VOTE.size :])


def _built(opened: Opened, written: Written, whole: WholePlan | None) -> BuiltMetadata:
    if whole is not None:
        return build_metadata(opened, whole)
    assert written.metadata is not None
    return written.metadata.result()


def _commit_as_coordinator(
    opened: Opened, built: BuiltMetadata, votes: Sequence[_Vote]
) -> bytes | memoryview:
    """Makes the checkpoint; the bytes of its `.metadata`."""
    files = {name: _C.ExpectedFile(name, size, exact=True) for name, size in built.files}
    results = list(itertools.chain.from_iterable(vote.results() for vote in votes))
    for result in results:
        name = result.storage_data.relative_path
        files[name] = _C.ExpectedFile(name, result.file_size, exact=True)
    metadata = complete_metadata(built, opened.gathered.metadata, results)
    claim = opened.unfinished.take_claim()
    return opened.request.writer._commit(claim, metadata, list(files.values()))


def _result(request: SaveRequest, written: Written, votes: Sequence[_Vote]) -> SaveResult:
    now = time.perf_counter()
    return SaveResult(
        path=str(request.writer.path),
        rank=request.agreement.rank,
        bytes_written=tuple(vote.bytes_written for vote in votes),
        write_seconds=tuple(vote.write_seconds for vote in votes),
        seconds={
            "plan": written.plan_seconds,
            "write": written.write_seconds,
            "commit": now - written.done,
            "total": now - request.started,
        },
    )


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
