"""The gate that holds training back until a state is copied that it must not change before.

Copied late is only what nobody changes but this package and optimizers whose steps torch's global
hook announces: both wait at the gate. Tensors' version counters are compared besides, to find out
what came past it."""

import contextlib
import dataclasses
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from .. import _C
from ..errors import CheckpointError

CHANGED = (
    "it was changed while it was being saved, by something other than a step of its optimizer; "
    "this save fails rather than mix two states. Wait for staging_completion before such a "
    'change, or pass snapshot="copy"'
)

# A process has one set of each of these, since torch's hook is one for all optimizers.
# Units of wrapped modules; they add themselves. Not those with one shard: there the whole parameter
# is the shard's own memory, and a forward that changes it in place (``clamp_`` of a logit scale)
# passes no gate and moves no counter of the shard. By id, and no WeakSet: that can't be listed
# while another thread adds to it.
units: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()
# Optimizers that have made a step which the hook has announced.
_optimizers: "weakref.WeakValueDictionary[int, Optimizer]" = weakref.WeakValueDictionary()
# The gate that training has to wait at. There is one save in flight in a process, so one gate.
_gate: "Gate | None" = None


def wait_at_gate() -> None:
    """Returns when nothing that is being saved has still to be copied. Before anything that writes
    shards in place."""
    if (gate := _gate) is not None:
        gate.wait()


@_disable_dynamo  # part of a compiled step it would be traced, and no step would ever wait again
def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    _optimizers[id(optimizer)] = optimizer
    wait_at_gate()


register_optimizer_step_pre_hook(_before_step)


def find_guarded(live: _C.LiveState) -> _C.Guarded:
    """The tensors that nobody changes without passing the gate, and the others.

    They share their memory with a parameter of one of our units that an announced optimizer
    updates, or with a tensor of such an optimizer's state."""
    sharded = [unit.sharded for unit in _living(units)]
    return live.find_guarded(sharded, _living(_optimizers))


def _living(kept: "weakref.WeakValueDictionary[int, Any]") -> list[Any]:
    # valuerefs() is a copy: another thread may add to it meanwhile.
    objects = [reference() for reference in kept.valuerefs()]
    return [each for each in objects if each is not None]


def forget_in_child() -> None:
    """A forked process has none of the threads that would open the gate."""
    global _gate
    _gate = None


class PendingCopy(Protocol):
    """The copying of a state, done by whichever threads come."""

    def run(self) -> None:
        """Copies until there is nothing left to take on."""

    def finish(self) -> None:
        """Returns when what the CPU copies is copied."""

    def join_streams(self) -> None:
        """Queues what comes later on a device behind the device's copies."""

    def find_change(self) -> str:
        """What is no longer what was copied; an empty string if all is."""


@dataclasses.dataclass(frozen=True)
class _Copying:
    copy: PendingCopy
    is_all: bool  # nothing else is read of the state


class Gate:
    """Holds training back from the part of one save that is copied after the call has returned.

    It is shut when it is made; copying begins with :meth:`begin`; it is open after :meth:`settle`
    or :meth:`release`, and never shut again. ``watch``: the guarded tensors that are read;
    ``name``: what a tensor of the state is called; ``on_wait`` is told the seconds that training
    has waited. The save's thread calls the methods in this order, then :meth:`close`; training
    meets :meth:`wait`, in any number of threads."""

    def __init__(
        self, watch: _C.Watch, name: Callable[[int], str], on_wait: Callable[[float], None]
    ) -> None:
        global _gate
        self._watch: _C.Watch | None = watch
        self._name, self._on_wait = name, on_wait
        self._begun, self._open = threading.Event(), threading.Event()
        self._copying: _Copying | None = None  # set before `_begun` is
        self._error: CheckpointError | None = None
        self._passed = False  # whether training has been here, and may change things now
        _gate = self

    def begin(self, copy: PendingCopy, is_all: bool) -> None:
        """From here on, whoever waits helps to copy. ``is_all``: nothing else is read of the state,
        so that a waiting thread opens the gate itself instead of waiting for the save's own."""
        self._copying = _Copying(copy, is_all)
        self._begun.set()

    def settle(self, verify: bool = False, check_more: Callable[[], None] = lambda: None) -> None:
        """Waits for the CPU's copies, and opens the gate.

        Raises CheckpointError, for all who ask, if a tensor has changed since the call, as far as
        that can be seen by counters, with ``verify`` by reading again, and by ``check_more``."""
        # No lock, though several may come at a time: a signal handler may want to pass in the midst
        # of it.
        if (copying := self._copying) is not None:
            copying.copy.finish()
        try:
            self._check(verify)
            check_more()
        except CheckpointError as error:
            self._error = error
        self.release()
        if self._error is not None:
            raise self._error

    def _check(self, verify: bool) -> None:
        self.check_unless_passed()
        if verify and self._copying is not None:
            changed = self._copying.copy.find_change()
            if changed:
                raise CheckpointError(f"{changed}: {CHANGED}")

    def check_unless_passed(self) -> None:
        """CheckpointError if a counter has moved, unless training has been at the gate, and changed
        things by right."""
        watch = self._watch  # a save that has failed closes while somebody is at the gate
        # Looked at before `_passed`: who passes after it may change things.
        changed = -1 if watch is None else watch.changed()
        if changed >= 0 and not self._passed:
            raise CheckpointError(f"{self._name(changed)}: {CHANGED}")

    def release(self) -> None:
        """Opens the gate: everything is copied, on its way from a device before anything that is
        queued there from now on, or the save has failed."""
        self._begun.set()
        self._open.set()

    def close(self) -> None:
        """Opens the gate and takes it away, when the last copy has arrived."""
        global _gate
        self.release()
        if _gate is self:
            _gate = None
        self._watch, self._copying = None, None

    def wait(self) -> None:
        """Returns when training may change what the save reads; helps to copy meanwhile."""
        begin = time.perf_counter()
        self._begun.wait()
        copying = self._copying  # looked at once: a save that has failed closes at any time
        if copying is not None:
            copying.copy.run()
            if copying.is_all:
                # The save's thread finds a change too, and the save fails.
                with contextlib.suppress(CheckpointError):
                    self.settle()
        self._open.wait()
        in_flight = self._copying  # None once the last copy has arrived
        if in_flight is not None:
            in_flight.copy.join_streams()
        self._passed = True
        self._on_wait(time.perf_counter() - begin)
