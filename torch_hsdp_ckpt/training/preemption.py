"""SIGTERM, the scheduler's notice: all ranks learn of it at the same step, though it reaches each
at a time of its own."""

import logging
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from ..common.agreement import Agreement

_logger = logging.getLogger(__name__)
_NEVER = 2**62  # milliseconds: no rank has had the signal


class Preemption:
    """Notes SIGTERM and agrees on it. ``deadline``: seconds from the signal in which the last save
    has to be done.

    The agreement costs the training loop no wait: each call of :meth:`remaining` takes the result
    of the small all-reduce that the call before has started, and starts the next one. So all ranks
    see a signal at the same call, one after the first rank that had it has called. A rank that
    calls more often than its peers waits for them.

    Made on the main thread (Python's rule for signal handlers); a handler that was there before is
    called as well. A forked child has the older handler back: it is to end when it is told to."""

    def __init__(self, agreement: Agreement, deadline: float) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise ValueError(
                "sigterm_deadline needs the main thread: Python sets signal handlers there only"
            )
        self._agreement = agreement
        self._deadline = deadline
        self._process = os.getpid()
        self._until: float | None = None  # by this rank's clock; None: no signal has come
        self._result = agreement.start_min(_NEVER)
        self._before: Any = signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        ours = os.getpid() == self._process
        if ours and self._until is None:
            self._until = time.monotonic() + self._deadline
        if callable(self._before):
            self._before(number, frame)
        elif not ours and self._before != signal.SIG_IGN:
            # A forked child with a handler of its own that calls this one.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def remaining(self) -> float | None:
        """Seconds left for the last save, the same on all ranks, once any rank's signal has been
        agreed on; else None.

        Called by all ranks, in step. What is left is counted per rank and agreed as the least, so
        that clocks need not."""
        least = self._result()
        self._result = self._agreement.start_min(self._milliseconds_left())
        return None if least >= _NEVER else least / 1000

    def _milliseconds_left(self) -> int:
        if self._until is None:
            return _NEVER
        return max(0, int(1000 * (self._until - time.monotonic())))

    def close(self) -> None:
        """Puts the older handler back, unless somebody has set another one since."""
        if signal.getsignal(signal.SIGTERM) == self._on_signal:
            before = signal.SIG_DFL if self._before is None else self._before
            signal.signal(signal.SIGTERM, before)


# Of the thread that forks: the signal mask that it had before.
_mask = threading.local()


def _owner_of(handler: Any) -> Preemption | None:
    owner = getattr(handler, "__self__", None)
    return owner if isinstance(owner, Preemption) else None


def _hold_back_for_fork() -> None:
    """A signal that reaches a child before it has the older handler waits for that: Python would
    forget it."""
    if _owner_of(signal.getsignal(signal.SIGTERM)) is not None:
        _mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])


def _let_through() -> None:
    before = vars(_mask).pop("before", None)
    if before is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _give_back_in_child() -> None:
    handler: Any = signal.getsignal(signal.SIGTERM)
    while (owner := _owner_of(handler)) is not None:
        handler = signal.SIG_DFL if owner._before is None else owner._before
        signal.signal(signal.SIGTERM, handler)
    _let_through()


os.register_at_fork(
    before=_hold_back_for_fork,
    after_in_parent=_let_through,
    after_in_child=_give_back_in_child,
)
