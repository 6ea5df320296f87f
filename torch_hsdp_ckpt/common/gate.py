"""A state that is copied while training goes on, and what holds training back until it is.

The contract is a gate, not a guess: what is copied late is only what is changed by nobody but
optimizers whose steps torch's global hook announces, and by this package. Both wait at the gate.
Version counters are looked at besides."""

import contextlib
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from .. import _C
from ..errors import CheckpointError

# Units of wrapped modules; they add themselves. Not those with one shard: there the whole parameter
# is the shard's own memory, and a forward that changes it in place (``clamp_`` of a logit scale)
# passes no gate and moves no counter of the shard. By id, and no WeakSet: that can't be listed
# while another thread adds to it.
units: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()
_optimizers: "weakref.WeakValueDictionary[int, Optimizer]" = (
    weakref.WeakValueDictionary()
)  # whose steps the hook has announced
_pending: "Snapshot | None" = None  # what training has to wait for; one at a time


def wait_at_gate() -> None:
    """Returns when nothing that is being saved has still to be copied. Before anything that writes
    shards in place."""
    if (pending := _pending) is not None:
        pending.wait_at_gate()


@_disable_dynamo  # part of a compiled step it would be traced, and no step would ever wait again
def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    _optimizers[id(optimizer)] = optimizer
    wait_at_gate()


register_optimizer_step_pre_hook(_before_step)


def find_guarded(live: _C.LiveState) -> tuple[_C.Watch, list[int], int]:
    """The tensors that nobody changes without passing the gate; the others, and their bytes.

    They share their memory with a parameter of one of our units that an announced optimizer
    updates, or with a tensor of such an optimizer's state."""
    sharded = [unit.sharded for ref in units.valuerefs() if (unit := ref()) is not None]
    return live.find_guarded(
        sharded, [it for ref in _optimizers.valuerefs() if (it := ref()) is not None]
    )


def forget_in_child() -> None:
    """A forked process has none of the threads that would open the gate."""
    global _pending
    _pending = None


class Snapshot:
    """The part of one save that is copied after the call has returned.

    ``watch``: the guarded tensors that it reads; ``name``: what a tensor of the state is called. A
    thread calls :meth:`begin`, :meth:`settle` or :meth:`release`, and :meth:`close`, in this order;
    training meets :meth:`wait_at_gate`."""

    def __init__(
        self, watch: _C.Watch, name: Callable[[int], str], on_wait: Callable[[float], None]
    ) -> None:
        global _pending
        self._watch: _C.Watch | None = watch
        self._name = name
        self._begun, self._released = threading.Event(), threading.Event()
        self._copy: _C.StagingCopy | None = None
        self._device_copy: DeviceCopy | None = None
        self._copies_all = False
        self._error: CheckpointError | None = None
        self._on_wait = on_wait  # is told the seconds that training has waited
        self.passed = False  # whether training has been at the gate, and may change things now
        _pending = self

    def begin(
        self, copy: _C.StagingCopy, device_copy: "DeviceCopy | None", copies_all: bool
    ) -> None:
        """From here on, who waits helps to copy. ``copies_all``: nothing else is read of the state,
        so that who waits need not wait for the save's own thread, but opens the gate."""
        self._copy, self._device_copy, self._copies_all = copy, device_copy, copies_all
        self._begun.set()

    def settle(self, verify: bool = False, more: Callable[[], None] = lambda: None) -> None:
        """Waits for the CPU's copies, and opens the gate. CheckpointError, for all who ask, if a
        tensor has changed since the call, as far as that can be seen by counters, with ``verify``
        by reading again, and by ``more``."""
        # No lock, though several may come at a time: a signal handler may want to pass in the midst
        # of it.
        if (copy := self._copy) is not None:
            copy.finish()
        try:
            self._check(verify)
            more()
        except CheckpointError as error:
            self._error = error
        self.release()
        if self._error is not None:
            raise self._error

    def _check(self, verify: bool) -> None:
        self.check_unless_passed()
        if verify and self._copy is not None:
            changed = self._copy.first_change(2)
            if changed >= 0:
                raise CheckpointError(f"copied piece {changed}: {CHANGED}")
        if verify and self._device_copy is not None and not self._device_copy.unchanged():
            raise CheckpointError(f"a tensor on a device: {CHANGED}")

    def check_unless_passed(self) -> None:
        """CheckpointError if a counter has moved, unless training has been at the gate, and changed
        things by right."""
        watch = self._watch  # a save that has failed closes while somebody is at the gate
        changed = (
            watch.changed() if watch is not None else -1
        )  # looked at first: who passes after it may change things
        if changed >= 0 and not self.passed:
            raise CheckpointError(f"{self._name(changed)}: {CHANGED}")

    def release(self) -> None:
        """Opens the gate: everything is copied, on its way from a device before anything that is
        queued there from now on, or the save has failed."""
        self._begun.set()
        self._released.set()

    def close(self) -> None:
        """After :meth:`release`, when the last copy has arrived."""
        global _pending
        if _pending is self:
            _pending = None
        self._watch, self._copy, self._device_copy = None, None, None

    def wait_at_gate(self) -> None:
        begin = time.perf_counter()
        self._begun.wait()
        if (copy := self._copy) is not None:
            copy.run()
        if self._copies_all:
            with contextlib.suppress(
                CheckpointError
            ):  # the save's thread finds it too, and the save fails
                self.settle()
        self._released.wait()
        if (device_copy := self._device_copy) is not None:
            device_copy.join_streams()
        self.passed = True
        self._on_wait(time.perf_counter() - begin)


CHANGED = (
    "it was changed while it was being saved, by something other than a step of its optimizer; "
    "this save fails rather than "
    'mix two states. Wait for staging_completion before such a change, or pass snapshot="copy"'
)


class DeviceCopy:
    """Copies from CUDA devices into pinned memory, on side streams; made where and when the state
    is to be copied."""

    def __init__(self, devices: set[torch.device]) -> None:
        self._ready = {}
        for device in devices:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(device))
            self._ready[device] = event
        self._done: list[torch.cuda.Event] = []
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def start(self, sources: list[torch.Tensor], targets: list[torch.Tensor]) -> None:
        """Queues the copies, of tensors of one dimension; the sources, of any of the devices, are
        what they were when this object was made."""
        self._pairs = list(zip(sources, targets, strict=True))
        for device, ready in self._ready.items():
            pairs = [pair for pair in self._pairs if pair[0].device == device]
            if not pairs:
                self._done.append(ready)  # one for each device
                continue
            stream = _side_stream(device)
            pieces: list[tuple[torch.Tensor, torch.Tensor]] = []
            for source, target in pairs:
                limit = _PIECE // source.itemsize
                pieces += zip(torch.split(source, limit), torch.split(target, limit), strict=True)
            with torch.cuda.stream(stream), torch.no_grad():
                stream.wait_event(ready)
                torch._foreach_copy_(
                    [to for _, to in pieces], [source for source, _ in pieces], non_blocking=True
                )
                done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                done.record(stream)
            self._done.append(done)

    def wait_ready(self) -> None:
        """Returns when the sources are what they were when this object was made."""
        for ready in self._ready.values():
            ready.synchronize()

    def join_streams(self) -> None:
        """What is queued on the devices from here on runs after the copies; the host does not
        wait."""
        for device, done in zip(self._ready, self._done, strict=False):
            torch.cuda.current_stream(device).wait_event(done)

    def synchronize(self) -> None:
        """Returns when nothing is copied any more, also of what a failed :meth:`start` has
        queued."""
        for device in self._ready:
            _side_stream(device).synchronize()

    def unchanged(self) -> bool:
        self.synchronize()
        return all(
            bool(torch.equal(source, target.to(source.device))) for source, target in self._pairs
        )


# Bytes of one copy: on the way to the host a collective's own transfer waits for no more than this.
_PIECE = 16 << 20
_streams: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device, priority=0)  # type: ignore[no-untyped-call]
    return _streams[device]
