"""One asynchronous save of one rank: what the call does of it, and what its threads do.

The phases are those of ``save``. The call looks at the state (capture.py), and copies what nothing
guards; a thread opens, plans, stages, writes and commits. Only where there is much to copy in the
call, or DCP has to plan, does the call open the save itself."""

import contextlib
import logging
import threading
import traceback
from typing import Any

import torch

from ... import _C
from ...common.gate import Gate, find_guarded
from ...errors import CheckpointError
from ..snapshot.device_copy import DeviceCopy, SnapshotCopy
from ..snapshot.staged import check_sources
from ..stateful import values_of
from .async_phases import (
    AsyncRequest,
    AsyncSave,
    Call,
    CallCaptured,
    CallFailed,
    CallStaged,
    LateCopy,
    Ready,
    SnapshotMode,
)
from .capture import Captured, capture
from .commit import commit
from .late_copy import PlacedRecords, copies_of, other_tensors, place_records
from .open import Opened, PreparedState, open_save, prepare_state
from .plan import plan, plan_kept
from .result import SavedMetadata
from .stage import Staged, stage_copies, stage_image
from .write import Written, write

_logger = logging.getLogger(__name__)

# What can't be copied late is copied whole if it is no more than this, so that the call need not
# ask the peers which part of it is this rank's.
_COPIED_WHOLE = 1 << 20
_GIVEN_UP = 'given up for a later one with in_flight="replace"'


class Job:
    """One save in flight. :meth:`prepare` and :meth:`go_on` are the call; the save itself runs on
    threads of the job, and ends with ``future``.

    What has to end before the state may change, and the completion of ``staging_completion`` last,
    stands on one stack, ``_until_copied``: whoever closes it opens the gate."""

    def __init__(self, request: AsyncRequest) -> None:
        self.future = AsyncSave()
        self.future.set_running_or_notify_cancel()
        self.path = request.save.writer.path
        self._request = request
        self._given_up: CheckpointError | None = None
        # Held while the thread is started: one that runs Python code meanwhile keeps the call
        # waiting for the interpreter's lock, 5 ms each time.
        self._call_lock = threading.Lock()
        self._calls: list[Call] = []  # what the call hands to the thread, which takes it out
        # The thread's too: a new one's is 0, where each rank would take some hundred MiB beside the
        # rank that trains there.
        on_device = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._device = torch.cuda.current_device() if on_device else None
        self._until_copied = contextlib.ExitStack()
        self._until_copied.callback(self.future.staging_completion.set_result, None)

    # -- the call

    def prepare(self, state_dict: dict[str, Any]) -> Call:
        """All that the call does itself. Raises only what every rank raises."""
        try:
            return self._prepare(state_dict)
        except BaseException:
            self._until_copied.close()
            raise

    def _prepare(self, state_dict: dict[str, Any]) -> Call:
        request = self._request
        captured: Captured | None = None
        gate: Gate | None = None
        eager: list[int] = []
        eager_bytes = 0
        try:
            values, failure = values_of(state_dict)
            if failure is not None:
                raise failure
            if request.mode != "copy":
                captured = capture(request.save, values, request.planner)
            if captured is not None:
                self._until_copied.callback(captured.drop)
                captured.freeze_objects()
                gate, eager, eager_bytes = self._guard(captured)
        except BaseException as error:
            return CallFailed(None, error)
        opened = None
        # Much to copy: agreed with the ranks first, so that it is 1/R of it.
        if captured is None:
            opened = open_save(
                request.save, lambda: prepare_state(request.save, values, request.planner)
            )
        elif eager_bytes > _COPIED_WHOLE:
            opened = open_save(request.save, captured.prepare)
        try:
            if opened is not None and (captured is None or not opened.comparison.agreed):
                return self._stage_now(opened, gate)
            assert captured is not None
            if opened is None:
                return self._freeze(captured, gate, eager)
            return self._copy_now(opened, captured, gate, eager)
        except BaseException as error:
            self._until_copied.close()
            return CallFailed(opened, error)

    def _guard(self, captured: Captured) -> tuple[Gate | None, list[int], int]:
        """The gate, if it guards anything; the tensors that it does not, and their bytes."""
        guarded = find_guarded(captured.live)
        eager, eager_bytes = guarded.unguarded, guarded.unguarded_bytes
        if len(guarded.watch) == 0:
            return None, eager, eager_bytes
        gate = Gate(guarded.watch, captured.name, self.future.add_step_wait)
        self._until_copied.callback(gate.close)
        return gate, eager, eager_bytes

    def _stage_now(self, opened: Opened, gate: Gate | None) -> CallStaged:
        copied = stage_copies(plan(opened), self._request.limits)
        self.future.staged_bytes = copied.copied_bytes
        waits = copied.staged.reads_state
        if not waits:
            self._until_copied.close()
        return CallStaged(opened, copied.staged, gate, waits)

    def _freeze(self, captured: Captured, gate: Gate | None, eager: list[int]) -> CallCaptured:
        """Copies what nobody guards whole, in place of the tensors: a thread copies on from
        there."""
        # Before the devices' copies are made, which read what is frozen too.
        captured.freeze_tensors(eager)
        return CallCaptured(
            opened=None,
            captured=captured,
            gate=gate,
            late=other_tensors(captured, ()),
            device=self._device_copy(captured),
        )

    def _copy_now(
        self, opened: Opened, captured: Captured, gate: Gate | None, eager: list[int]
    ) -> CallCaptured:
        """Copies this rank's part of what nobody guards."""
        captured.freeze_tensors([i for i in eager if not captured.live.address(i)])
        device = self._device_copy(captured)
        late = other_tensors(captured, eager)
        if not eager:
            return CallCaptured(opened, captured, gate, late, device)
        placed = self._place(captured)
        copies = copies_of(captured, placed, eager)
        copies.host.finish()
        if copies.sources:
            copies.start(device)
            assert device is not None
            device.synchronize()
            device = self._device_copy(captured)
        live = captured.structure.chunks[: placed.live]
        return CallCaptured(
            opened=opened,
            captured=captured,
            gate=gate,
            late=late,
            device=device,
            placed=placed,
            copies=[copies.host],
            waits=not {chunk.tensor for chunk in live}.isdisjoint(eager),
        )

    def _device_copy(self, captured: Captured) -> DeviceCopy | None:
        devices = captured.structure.devices
        if not devices:
            return None
        copy = DeviceCopy(devices)
        self._until_copied.callback(copy.close)
        return copy

    def _place(self, captured: Captured) -> PlacedRecords:
        placed = place_records(self._request.save, captured, self._request.limits)
        self._until_copied.callback(placed.image.close)
        self.future.staged_bytes = placed.copied_bytes
        return placed

    def go_on(self, call: Call) -> None:
        """Hands the save to a thread. Raises Ctrl-C alone, of which the peers are told."""
        interrupt = None
        if isinstance(call, CallFailed) and not isinstance(call.error, Exception):
            interrupt = call.error
            told = CheckpointError(
                f"{self.path}: the call was interrupted ({type(interrupt).__name__})"
            )
            call = CallFailed(call.opened, told)
        waits = call.waits
        self._calls.append(call)
        del call  # the thread lets go of it when it can
        self._start_thread()
        if waits:
            self._wait_until_copied()
        if interrupt is not None:
            raise interrupt

    def _start_thread(self) -> None:
        # Not a daemon: the interpreter waits for it at exit, so that a save that was begun is
        # finished.
        try:
            with self._call_lock:
                threading.Thread(
                    target=self._run, name="torch_hsdp_ckpt_async_save", daemon=False
                ).start()
        except BaseException as error:
            # No thread is to be had, or Ctrl-C came before it ran: then here and now, since the
            # peers wait for this rank.
            self._run()
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

    # -- the threads

    def _run(self) -> None:
        with self._call_lock:
            calls, self._calls = self._calls, []
        if not calls:
            return
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)
            metadata = self._save(calls.pop())
        except BaseException as failure:
            try:
                self._until_copied.close()
                _logger.warning(
                    "an asynchronous save failed; older checkpoints are as they were: %s", failure
                )
            finally:
                _clear_frames(failure)
                self.future.set_exception(failure)
        else:
            self.future.set_result(metadata)

    def _save(self, call: Call) -> SavedMetadata:
        """The phases of a save, as ``save`` has them."""
        # Before the CPU copies anything: a peer on this host that is still in its call loses no
        # time to it. Devices copy meanwhile.
        ready = self._start_copies(call)
        opened = call.opened
        if opened is None:
            opened = open_save(self._request.save, lambda: self._prepared(ready))
        try:
            written = self._write(opened, ready)
            self._until_copied.close()
            return commit(opened, written)
        except BaseException:
            self._until_copied.close()
            opened.unfinished.abandon()
            raise

    def _prepared(self, ready: Ready) -> PreparedState:
        if isinstance(ready, CallFailed):
            raise ready.error
        if self._given_up is not None:
            raise self._given_up
        assert isinstance(ready, LateCopy)
        return ready.call.captured.prepare()

    def _start_copies(self, call: Call) -> Ready:
        """As if the ranks agreed, which they mostly do."""
        if not isinstance(call, CallCaptured):
            return call
        try:
            call.captured.hand_to_planner()
            placed = self._place(call.captured) if call.placed is None else call.placed
            copies = copies_of(call.captured, placed, call.late)
            self._until_copied.callback(_end_copy, copies.host)
            return LateCopy(call, placed, copies.start(call.device))
        except BaseException as error:
            return CallFailed(call.opened, error)

    def _write(self, opened: Opened, ready: Ready) -> Written | BaseException:
        """Stages and writes; what is raised travels with this rank's vote."""
        try:
            if isinstance(ready, CallFailed):
                return ready.error
            if isinstance(ready, CallStaged):
                written = write(ready.staged, lambda: self._settle(ready.staged, ready.gate, None))
            elif opened.comparison.agreed:
                begin_copy(ready, self._request.mode)
                staged = stage_late(opened, ready, self._request.mode)
                gate, copy = ready.call.gate, ready.copy
                written = write(staged, lambda: self._settle(staged, gate, copy))
            else:
                written = self._write_otherwise(opened, ready)
            self.check_given_up()
            return written
        except BaseException as error:
            return error

    def _write_otherwise(self, opened: Opened, late: LateCopy) -> Written:
        """Planned otherwise than this rank has assumed; the gate is still shut."""
        if late.copy.device is not None:
            late.copy.device.wait_ready()
            late.copy.device.synchronize()  # its memory is used again
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
            self._until_copied.close()
        self.check_given_up()

    # -- a later save

    def give_up(self) -> None:
        """Ends the save, on all ranks, unless all of them have voted for it by now. Returns when
        its outcome is known."""
        self._given_up = CheckpointError(f"{self.path}: {_GIVEN_UP}")
        self.future.exception()

    def was_given_up(self, error: BaseException) -> bool:
        # Not where a rank failed for another reason besides.
        return type(error) is CheckpointError and str(error).count(_GIVEN_UP) >= str(error).count(
            "rank "
        )

    def check_given_up(self) -> None:
        if self._given_up is not None:
            raise self._given_up


def begin_copy(late: LateCopy, mode: SnapshotMode) -> None:
    """Shows the copies to who waits at the gate, and starts a thread that makes them."""
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
