"""Which patches are in force, and whether torch's own code has the word."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol


class InForce(Protocol):
    """A patch that nobody has undone yet."""

    strict: bool

    def undo(self) -> None: ...


# The last one decides how strict it is; names go back to torch with the last one to be undone.
in_force: list[InForce] = []
lock = threading.RLock()
_torchs_turn: ContextVar[bool] = ContextVar("torchs_turn", default=False)


def is_torchs_turn() -> bool:
    """Whether a call means torch's own: no patch is in force, or torch's own code makes it."""
    return not in_force or _torchs_turn.get()


def is_strict() -> bool:
    """Of the patch that came last."""
    return any(patch.strict for patch in in_force[-1:])


@contextmanager
def torchs_turn() -> Iterator[None]:
    """Within the block, in this thread, what torch makes is torch's too."""
    token = _torchs_turn.set(True)
    try:
        yield
    finally:
        _torchs_turn.reset(token)
