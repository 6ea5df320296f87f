"""One rank's exception as plain data, and the error that all ranks raise when some have failed."""

from collections.abc import Sequence
from typing import NamedTuple

from ..errors import CheckpointError, CorruptCheckpointError

_MESSAGE_LIMIT = 4000  # characters of one rank's error that travel
_NAMED_RANKS = 8  # failed ranks whose messages are repeated in the error


class RankFailure(NamedTuple):
    """What travels of an exception: the exception itself may hold tensors, or be of a class that
    peers do not have."""

    rank: int
    kind: str  # "os", "corrupt", "checkpoint" or the name of any other class
    message: str
    errno: int = 0
    filename: str = ""

    @staticmethod
    def of(rank: int, error: BaseException) -> "RankFailure":
        """Describes ``error``, which was raised on ``rank``."""
        if isinstance(error, OSError) and error.errno is not None:
            message = str(error.strerror)[:_MESSAGE_LIMIT]
            return RankFailure(rank, "os", message, error.errno, str(error.filename or ""))
        message = str(error)[:_MESSAGE_LIMIT]
        if isinstance(error, CorruptCheckpointError):
            return RankFailure(rank, "corrupt", message)
        if isinstance(error, CheckpointError):
            return RankFailure(rank, "checkpoint", message)
        return RankFailure(rank, type(error).__name__, message)

    def __str__(self) -> str:
        if self.kind == "os":
            file = f": {self.filename!r}" if self.filename else ""
            return f"[Errno {self.errno}] {self.message}{file}"
        if self.kind in ("corrupt", "checkpoint"):
            return self.message
        return f"{self.kind}: {self.message}"


def raise_failures(
    step: str, failures: Sequence[RankFailure], this_ranks_error: BaseException | None
) -> None:
    """Raises the first failed rank's error, with what the others say behind it, if any rank has
    failed; this rank's own exception is the cause.

    An ``OSError`` stays one with its errno and filename, damage stays ``CorruptCheckpointError``,
    and everything else becomes ``CheckpointError``. Ctrl-C and exits of this rank go on as they
    are: the peers have been told."""
    if not failures:
        return
    if this_ranks_error is not None and not isinstance(this_ranks_error, Exception):
        raise this_ranks_error
    first = failures[0]
    texts = [f"rank {failure.rank}: {failure}" for failure in failures[:_NAMED_RANKS]]
    if len(failures) > _NAMED_RANKS:
        texts.append(f"and {len(failures) - _NAMED_RANKS} more ranks")
    if first.kind == "os":
        others = "".join(f"; {text}" for text in texts[1:])
        message = f"{first.message} (rank {first.rank}, step {step!r}){others}"
        raise OSError(first.errno, message, first.filename or None) from this_ranks_error
    error_class = CorruptCheckpointError if first.kind == "corrupt" else CheckpointError
    raise error_class(f"step {step!r} failed: " + "; ".join(texts)) from this_ranks_error
