"""One asynchronous save of one rank, behind its call: a thread goes through the phases of ``save``,
while the gate holds training back from what is still to be copied."""

import logging
import queue
import threading
import traceback
from typing import Any

import torch

from ... import _C
from ...common.gate import Gate
from ...errors import CheckpointError
from ..snapshot.device_copy import SnapshotCopy
from ..snapshot.staged import check_sources
from .async_call import place
from .async_phases import (
    AsyncRequest,
    Call,
    CallCaptured,
    CallFailed,
    CallStaged,
    LateCopy,
    Ready,
    SnapshotMode,
)
from .commit import write_and_commit
from .late_copy import copies_of
from .open import Opened, PreparedState, open_save
from .plan import plan, plan_kept
from .result import SavedMetadata
from .stage import Staged, stage_copies, stage_image
from .write import Written, write

_logger = logging.getLogger(__name__)

_GIVEN_UP = 'given up for a later one with in_flight="replace"'


class Job:
    """One save in flight: :meth:`go_on` hands it to a thread, which ends with the request's future.

    Another thread may give it up meanwhile. All else that the thread works with is handed from
    phase to phase."""

    def __init__(self, request: AsyncRequest) -> None:
        self.future = request.future
        self.path = request.save.writer.path
        self._request = request
        self._given_up: CheckpointError | None = None

    # -- the call

    def go_on(self, call: Call) -> None:
        """Hands the save to a thread. Raises Ctrl-C alone, of which the peers are told."""
        interrupt = None
        if isinstance(call, CallFailed) and not isinstance(call.error, Exception):
            interrupt = call.error
            told = CheckpointError(
                f"{self.path}: the call was interrupted ({type(interrupt).__name__})"
            )
            call = CallFailed(call.opened, told)
        self._start_thread(call)
        if call.waits:
            self._wait_until_copied()
        if interrupt is not None:
            raise interrupt

    def _start_thread(self, call: Call) -> None:
        calls: queue.SimpleQueue[Call] = queue.SimpleQueue()
        calls.put(call)
        # Held while the thread is started: one that runs Python code meanwhile keeps the call
        # waiting for the interpreter's lock, 5 ms each time.
        starting = threading.Lock()
        device = _current_device()

        def run() -> None:
            with starting:
                if calls.empty():
                    return
                taken = calls.get()
            self._run(taken, device)

        # Not a daemon: the interpreter waits for it at exit, so that a save that was begun is
        # finished.
        thread = threading.Thread(target=run, name="torch_hsdp_ckpt_async_save", daemon=False)
        try:
            with starting:
                thread.start()
        except BaseException as error:
            # No thread is to be had, or Ctrl-C came before it ran: then here and now, since the
            # peers wait for this rank.
            run()
            if not isinstance(error, RuntimeError):
                raise

    def _wait_until_copied(self) -> None:
        try:
            self.future.staging_completion.result()
        except BaseException:
            self._given_up = CheckpointError(
                f"{self.path}: interrupted while its state was being copied"
            )
            raise

    # -- the thread

    def _run(self, call: Call, device: int | None) -> None:
        try:
            metadata = self._save(call, device)
        except BaseException as failure:
            del call  # the failure holds this frame
            try:
                _logger.warning(
                    "an asynchronous save failed; older checkpoints are as they were: %s", failure
                )
            finally:
                _clear_frames(failure)
                self.future.set_exception(failure)
        else:
            self.future.set_result(metadata)

    def _save(self, call: Call, device: int | None) -> SavedMetadata:
        """The phases of a save, as ``save`` has them."""
        with self._request.until_copied:
            # Before the CPU copies anything: a peer on this host that is still in its call loses no
            # time to it. Devices copy meanwhile.
            ready = self._start_copies(call, device)
            if call.opened is None:
                opened = open_save(self._request.save, lambda: self._prepared(ready))
            else:
                opened = call.opened
            return write_and_commit(opened, lambda: self._write_part(opened, ready))

    def _start_copies(self, call: Call, device: int | None) -> Ready:
        """As if the ranks agreed, which they mostly do."""
        try:
            if device is not None:
                torch.accelerator.set_device_index(device)
            if not isinstance(call, CallCaptured):
                return call
            call.captured.hand_to_planner()
            placed = place(self._request, call.captured) if call.placed is None else call.placed
            copies = copies_of(call.captured, placed, call.late)
            self._request.until_copied.callback(_end_copy, copies.host)
            return LateCopy(call, placed, copies.start(call.device))
        except BaseException as error:
            return CallFailed(call.opened, error)

    def _prepared(self, ready: Ready) -> PreparedState:
        if isinstance(ready, CallFailed):
            raise ready.error
        if self._given_up is not None:
            raise self._given_up
        assert isinstance(ready, LateCopy)
        return ready.call.captured.prepare()

    def _write_part(self, opened: Opened, ready: Ready) -> Written:
        """Stages and writes; nothing is read of the state any more when this returns or raises."""
        with self._request.until_copied:
            written = self._write(opened, ready)
            self.check_given_up()
        return written

    def _write(self, opened: Opened, ready: Ready) -> Written:
        if isinstance(ready, CallFailed):
            raise ready.error
        if isinstance(ready, CallStaged):
            return write(ready.staged, lambda: self._settle(ready.staged, ready.gate, None))
        if not opened.as_assumed:
            return self._write_otherwise(opened, ready)
        begin_copy(ready, self._request.mode)
        staged = stage_late(opened, ready, self._request.mode)
        return write(staged, lambda: self._settle(staged, ready.call.gate, ready.copy))

    def _write_otherwise(self, opened: Opened, late: LateCopy) -> Written:
        """Planned otherwise than this rank has assumed; the gate is still shut."""
        if late.copy.device is not None:
            late.copy.device.wait_ready()
            late.copy.device.close()
        late.placed.image.close()  # its memory is used again
        gate = late.call.gate
        watch = self._request.mode == "verify" and gate is not None
        copied = stage_copies(plan(opened), self._request.limits, watch)
        self.future.staged_bytes = copied.copied_bytes
        return write(copied.staged, lambda: self._settle(copied.staged, gate, None))

    def _settle(self, staged: Staged, gate: Gate | None, copy: SnapshotCopy | None) -> None:
        """What was to be read in its place has been; waits for the copies, and opens the gate."""
        if not self.future.staging_completion.done():
            if gate is not None:
                verify = self._request.mode == "verify" and copy is not None
                gate.settle(verify, lambda: check_sources(staged.sources))
            elif copy is not None:
                copy.finish()
            if copy is not None and copy.device is not None:
                copy.device.synchronize()
                if gate is not None:
                    gate.check_unless_passed()
            self._request.until_copied.close()
        self.check_given_up()

    # -- a later save

    def give_up(self) -> None:
        """Ends the save, on all ranks, unless all of them have voted for it by now. Returns when
        its outcome is known."""
        self._given_up = CheckpointError(f"{self.path}: {_GIVEN_UP}")
        self.future.exception()

    def check_given_up(self) -> None:
        if self._given_up is not None:
            raise self._given_up


def was_given_up(error: BaseException) -> bool:
    """Whether a save failed since it was given up, and for no other reason on any rank."""
    given_up = str(error).count(_GIVEN_UP)
    return type(error) is CheckpointError and given_up >= str(error).count("rank ")


def begin_copy(late: LateCopy, mode: SnapshotMode) -> None:
    """Shows the copies to whoever waits at the gate, and starts a thread that makes them."""
    if late.call.gate is not None:
        late.call.gate.begin(late.copy, mode == "lazy" and late.placed.live == 0)
    # Beside the save's own thread, which may have to write some in its place first.
    threading.Thread(target=late.copy.run, name="torch_hsdp_ckpt_copy").start()


def stage_late(opened: Opened, late: LateCopy, mode: SnapshotMode) -> Staged:
    """What is written from the copies, which may still be on their way."""
    placed, call = late.placed, late.call
    if placed.live and late.copy.device is not None:
        late.copy.device.wait_ready()
    planned = plan_kept(opened, call.captured.structure.static, placed.objects, placed.files)
    # Without a gate nothing is read again.
    watch = mode == "verify" and call.gate is not None
    return stage_image(planned, placed.staged([*call.copies, late.copy.host]), watch)


def _current_device() -> int | None:
    """The call's device, which is its thread's too: a new thread's is 0, where with CUDA each rank
    would take some hundred MiB beside the rank that trains there. None where no device is in use.
    """
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return None
    module: Any = torch.get_device_module(accelerator)
    # A device that needs no initialisation has no such function.
    is_in_use = getattr(module, "is_initialized", module.is_available)
    return torch.accelerator.current_device_index() if is_in_use() else None


def _end_copy(copy: _C.StagingCopy) -> None:
    """Nothing is read any more when it returns, whether it was copied or not."""
    copy.cancel()
    copy.finish()


def _clear_frames(failure: BaseException) -> None:
    """The caller may keep an exception, whose frames would keep the state of the save alive."""
    error: BaseException | None = failure
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
