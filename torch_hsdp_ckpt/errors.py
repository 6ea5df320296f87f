"""The package's exceptions. A failed system call is Python's own ``OSError`` with ``errno`` and
``filename``.

What ``save`` and ``load`` raise is a ``CheckpointException`` of torch.distributed.checkpoint
besides, for programs that catch what DCP raises."""

import traceback

from torch.distributed.checkpoint.api import WRAPPED_EXCEPTION, CheckpointException


class _Failure(CheckpointException):
    """DCP's exception as a second base, made as Python's own exceptions are."""

    def __init__(self, *arguments: object) -> None:
        BaseException.__init__(self, *arguments)

    @property
    def failures(self) -> dict[int, WRAPPED_EXCEPTION]:
        """The ranks that have failed, each with an exception that says why; of one process, this
        exception itself as rank 0's."""
        kept: dict[int, WRAPPED_EXCEPTION] | None = self.__dict__.get("_failures")
        if kept is None:
            return {0: (self, traceback.extract_tb(self.__traceback__))}
        return kept

    def __str__(self) -> str:
        return BaseException.__str__(self)


class CheckpointError(RuntimeError, _Failure):
    """A checkpoint can't be saved or loaded as asked; the message names file, tensor and rank, and
    what to do."""


class CorruptCheckpointError(CheckpointError):
    """A checkpoint's bytes are not what its format or its checksums say. Nothing of that tensor can
    be trusted."""


class CheckpointOSError(OSError, _Failure):
    """A system call of a save or a load that failed, ``errno`` and ``filename`` set. It is of the
    class, too, that Python has for its errno: ``FileNotFoundError``, ``PermissionError``, ..."""


def _with_failure(base: type[OSError]) -> type[CheckpointOSError]:
    name = f"Checkpoint{base.__name__}"
    made = type(name, (base, CheckpointOSError), {"__module__": __name__, "__doc__": base.__doc__})
    globals()[name] = made  # where pickle finds it
    return made


# The classes that Python makes of an errno.
_OF_OS_ERROR: dict[type[OSError], type[CheckpointOSError]] = {
    base: _with_failure(base)
    for base in (
        BlockingIOError,
        BrokenPipeError,
        ChildProcessError,
        ConnectionAbortedError,
        ConnectionRefusedError,
        ConnectionResetError,
        FileExistsError,
        FileNotFoundError,
        InterruptedError,
        IsADirectoryError,
        NotADirectoryError,
        PermissionError,
        ProcessLookupError,
        TimeoutError,
    )
}


def os_error(errno: int, message: str, filename: str | None) -> CheckpointOSError:
    """The ``OSError`` of a save or a load, of the class that Python has for ``errno``."""
    base = type(OSError(errno, message))
    return _OF_OS_ERROR.get(base, CheckpointOSError)(errno, message, filename)
