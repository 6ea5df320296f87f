"""One rank's exception as plain data, and the error that all ranks raise when some have failed."""

import contextlib
from collections.abc import Iterator, Sequence
from traceback import StackSummary
from typing import NamedTuple, NoReturn

from torch.distributed.checkpoint.api import CheckpointException

from ..errors import CheckpointError, CheckpointOSError, CorruptCheckpointError, os_error

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

    def exception(self) -> CheckpointError | CheckpointOSError:
        """An exception that says what the message says."""
        if self.kind == "os":
            return os_error(self.errno, self.message, self.filename or None)
        return (CorruptCheckpointError if self.kind == "corrupt" else CheckpointError)(str(self))

    def __str__(self) -> str:
        if self.kind == "os":
            file = f": {self.filename!r}" if self.filename else ""
            return f"[Errno {self.errno}] {self.message}{file}"
        if self.kind in ("corrupt", "checkpoint"):
            return self.message
        return f"{self.kind}: {self.message}"


@contextlib.contextmanager
def own_error_of(refused: Exception | None) -> Iterator[None]:
    """Around what tells the ranks of ``refused``, what is wrong with this rank's arguments: its
    caller gets the error that Python has for it, not the one that all ranks raise."""
    try:
        yield
    except CheckpointError:
        if refused is not None:
            raise refused from None
        raise


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
    first, texts = failures[0], _texts(failures)
    if first.kind == "os":
        others = "".join(f"; {text}" for text in texts[1:])
        message = f"{first.message} (rank {first.rank}, step {step!r}){others}"
        error: Exception = os_error(first.errno, message, first.filename or None)
    else:
        error_class = CorruptCheckpointError if first.kind == "corrupt" else CheckpointError
        error = error_class(f"step {step!r} failed: " + "; ".join(texts))
    # By rank, as DCP has it; the exceptions themselves are the ranks' own.
    error._failures = {  # type: ignore[attr-defined]
        failure.rank: (failure.exception(), StackSummary()) for failure in failures
    }
    raise error from this_ranks_error


def raise_alone(error: BaseException) -> NoReturn:
    """Raises what a process without peers has run into, as one of the classes that ranks raise.
    What is no failure (Ctrl-C) goes on as it is."""
    if isinstance(error, CheckpointException) or not isinstance(error, Exception):
        raise error
    raise RankFailure.of(0, error).exception() from error


def raise_of_dcp(step: str, error: CheckpointException) -> NoReturn:
    """Raises what DCP reports of the ranks as one of the classes that ranks raise."""
    failed = sorted(error.failures.items())
    failures = [RankFailure.of(rank, caught) for rank, (caught, _) in failed]
    raise_failures(step, failures, None)
    raise error


def _texts(failures: Sequence[RankFailure]) -> list[str]:
    texts = [f"rank {failure.rank}: {failure}" for failure in failures[:_NAMED_RANKS]]
    if len(failures) > _NAMED_RANKS:
        texts.append(f"and {len(failures) - _NAMED_RANKS} more ranks")
    return texts
