"""What a call of ``async_save`` does itself: it looks at the state (capture.py), and copies what
nothing guards.

Only where there is much to copy in the call, or DCP has to plan, does the call open the save. What
it leaves to the save's thread is a ``Call``."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from ... import _C
from ...common.default_device import without_default_device
from ...common.gate import Gate, find_guarded
from ..snapshot.device_copy import DeviceCopy
from ..stateful import values_of
from .async_phases import AsyncRequest, Call, CallCaptured, CallFailed, CallStaged
from .capture import Captured, capture
from .late_copy import PlacedRecords, copies_of, other_tensors, place_records
from .open import Opened, open_save, prepare_state
from .plan import plan
from .stage import stage_copies

# What can't be copied late is copied whole if it is no more than this, so that the call need not
# ask the peers which part of it is this rank's.
_COPIED_WHOLE = 1 << 20


def prepare_call(
    request: AsyncRequest, state_dict: dict[str, Any], refused: Exception | None
) -> Call:
    """All that the call does itself. Raises only what every rank raises; what this rank alone was
    ``refused`` travels with the save."""
    if refused is not None:
        request.until_copied.close()
        return CallFailed(None, refused)
    try:
        return _prepare(request, state_dict)
    except BaseException:
        request.until_copied.close()
        raise


def _prepare(request: AsyncRequest, state_dict: dict[str, Any]) -> Call:
    try:
        values, failure = values_of(state_dict)
        if failure is not None:
            raise failure
    except BaseException as error:
        return CallFailed(None, error)
    with without_default_device():
        return _prepare_values(request, values)


def _prepare_values(request: AsyncRequest, values: dict[str, Any]) -> Call:
    try:
        guarded = _capture(request, values)
    except BaseException as error:
        return CallFailed(None, error)
    if guarded is None:
        opened = open_save(
            request.save, lambda: prepare_state(request.save, values, request.planner)
        )
        return _copy(request, opened, lambda: _stage(request, opened, gate=None))
    if guarded.unguarded_bytes <= _COPIED_WHOLE:
        return _copy(request, None, lambda: _freeze(request, guarded))
    # Much to copy: agreed with the ranks first, so that it is 1/R of it.
    opened = open_save(request.save, guarded.captured.prepare)
    if not opened.as_assumed:
        return _copy(request, opened, lambda: _stage(request, opened, guarded.gate))
    return _copy(request, opened, lambda: _copy_part(request, opened, guarded))


def _copy(request: AsyncRequest, opened: Opened | None, copy: Callable[[], Call]) -> Call:
    """Copies in the call; what is raised travels with the next thing that ranks tell each other."""
    try:
        return copy()
    except BaseException as error:
        request.until_copied.close()
        return CallFailed(opened, error)


@dataclasses.dataclass(frozen=True)
class _Guarded:
    """A captured state; the gate, if it guards any of the tensors; the tensors that it does not
    guard, and their bytes."""

    captured: Captured
    gate: Gate | None
    unguarded: Sequence[int]
    unguarded_bytes: int


def _capture(request: AsyncRequest, values: dict[str, Any]) -> _Guarded | None:
    """None where the state is copied as a whole, or DCP has to plan a part of it."""
    if request.mode == "copy":
        return None
    captured = capture(request.save, values, request.planner)
    if captured is None:
        return None
    request.until_copied.callback(captured.drop)
    captured.freeze_objects()
    found = find_guarded(captured.live)
    gate = _shut_gate(request, captured, found.watch)
    return _Guarded(captured, gate, found.unguarded, found.unguarded_bytes)


def _shut_gate(request: AsyncRequest, captured: Captured, watch: _C.Watch) -> Gate | None:
    if len(watch) == 0:
        return None
    gate = Gate(watch, captured.name, request.future.add_step_wait)
    request.until_copied.callback(gate.close)
    return gate


def _stage(request: AsyncRequest, opened: Opened, gate: Gate | None) -> CallStaged:
    """Copies all that this rank will write, as far as there is room."""
    copied = stage_copies(plan(opened), request.limits)
    request.future.staged_bytes = copied.copied_bytes
    waits = copied.staged.reads_state
    if not waits:
        request.until_copied.close()
    return CallStaged(opened, copied.staged, gate, waits)


def _freeze(request: AsyncRequest, guarded: _Guarded) -> CallCaptured:
    """Copies what nobody guards whole, in place of the tensors: a thread copies on from there."""
    captured = guarded.captured
    # Before the devices' copies are made, which read what is frozen too.
    captured.freeze_tensors(guarded.unguarded)
    return CallCaptured(
        opened=None,
        captured=captured,
        gate=guarded.gate,
        late=other_tensors(captured, ()),
        device=_device_copy(request, captured),
    )


def _copy_part(request: AsyncRequest, opened: Opened, guarded: _Guarded) -> CallCaptured:
    """Copies this rank's part of what nobody guards."""
    captured, unguarded = guarded.captured, guarded.unguarded
    captured.freeze_tensors([i for i in unguarded if not captured.live.address(i)])
    device = _device_copy(request, captured)
    placed = place(request, captured)
    copies = copies_of(captured, placed, unguarded)
    copies.host.finish()
    if copies.on_devices:
        assert device is not None
        copies.start(device)
        device.synchronize()
        device = _device_copy(request, captured)
    chunks_in_place = captured.structure.chunks[: placed.live]
    return CallCaptured(
        opened=opened,
        captured=captured,
        gate=guarded.gate,
        late=other_tensors(captured, unguarded),
        device=device,
        placed=placed,
        copies=[copies.host],
        waits=not {chunk.tensor for chunk in chunks_in_place}.isdisjoint(unguarded),
    )


def _device_copy(request: AsyncRequest, captured: Captured) -> DeviceCopy | None:
    devices = captured.structure.devices
    if not devices:
        return None
    copy = DeviceCopy(devices)
    request.until_copied.callback(copy.close)
    return copy


def place(request: AsyncRequest, captured: Captured) -> PlacedRecords:
    """Places for what this rank will write; the state may change when they are let go of."""
    placed = place_records(request.save, captured, request.limits)
    request.until_copied.callback(placed.image.close)
    request.future.staged_bytes = placed.copied_bytes
    return placed
