"""``verify``: whether a checkpoint is all there, and as it was written."""

import os

from ... import _C
from ..._C import VerifyProblem, VerifyReport
from .directory import directory_of, encoded

__all__ = ["VerifyProblem", "VerifyReport", "verify"]


def verify(checkpoint_id: str | os.PathLike[str], *, threads: int | None = None) -> VerifyReport:
    """Reads all of a checkpoint, this package's or stock torch's, and says what is wrong with it.
    Needs no model and no process group, and the memory of the largest object and a few MiB a
    thread. ``hsdp-ckpt verify DIR`` does the same without Python.

    Args:
        checkpoint_id: the directory.
        threads: how many read and check; by default one a core, at most 8.

    Returns:
        A report: ``ok``; ``problems``, each with ``file`` (relative), ``record`` (a tensor's
        or object's name, or "") and ``message``; ``unchecked``, records that have no checksum
        (stock torch's objects in other formats, and what extensions wrote); ``leftovers``, data
        files that ``.metadata`` does not name: of saves that did not end, or of older ones; and the
        numbers of ``files``, ``tensors``, ``objects`` and ``bytes`` read. Damage is reported, not
        raised. A checkpoint that is saved over meanwhile is looked at again, ten times at most.
    """
    cores = len(os.sched_getaffinity(0))
    return _C.verify(encoded(directory_of(checkpoint_id)), threads or max(2, min(8, cores)))
