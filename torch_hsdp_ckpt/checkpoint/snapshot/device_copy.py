"""The copies of one snapshot that are on their way: by the CPU, and from devices."""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch

from ... import _C
from ...common.devices import current_stream, on_stream

# Bytes of one copy: on the way to the host a collective's own transfer waits for no more than this.
# Copies end at its multiples, and so does what is registered (pinned.STEP): the driver refuses one
# from one registration into the next.
_PIECE = 16 << 20
# One stream for each device of the process, kept: streams come from a small pool that all share.
_streams: dict[torch.device, torch.Stream] = {}


class CopyPair(NamedTuple):
    """Tensors of one dimension and of one dtype: one on a device, and the pinned memory that takes
    its elements."""

    source: torch.Tensor
    target: torch.Tensor

    def pieces(self) -> Iterator["CopyPair"]:
        """What is copied at once."""
        address, item = self.target.data_ptr(), self.target.itemsize
        begin, count = 0, self.target.numel()
        while begin < count:
            room = _PIECE - (address + begin * item) % _PIECE
            end = begin + room // item
            yield CopyPair(self.source[begin:end], self.target[begin:end])
            begin = end


class DeviceCopy:
    """Copies from devices into pinned memory, on side streams; made where and when the state
    is to be copied."""

    def __init__(self, devices: Collection[torch.device]) -> None:
        self._ready = {}
        for device in devices:
            self._ready[device] = current_stream(device).record_event()
        self._done: list[torch.Event] = []
        self._pairs: Sequence[CopyPair] = ()

    def start(self, pairs: Sequence[CopyPair]) -> None:
        """Queues the copies; the sources, on any of the devices, are what they were when this
        object was made."""
        self._pairs = pairs
        for device, ready in self._ready.items():
            on_device = [pair for pair in pairs if pair.source.device == device]
            # One event for each device, in the devices' order.
            self._done.append(_queue(device, ready, on_device) if on_device else ready)

    def wait_ready(self) -> None:
        """Returns when the sources are what they were when this object was made."""
        for ready in self._ready.values():
            ready.synchronize()

    def join_streams(self) -> None:
        """What is queued on the devices from here on runs after the copies; the host does not
        wait."""
        for device, done in zip(self._ready, self._done, strict=False):
            current_stream(device).wait_event(done)

    def synchronize(self) -> None:
        """Returns when nothing is copied any more, also of what a failed :meth:`start` has
        queued."""
        for device in self._ready:
            _side_stream(device).synchronize()

    def unchanged(self) -> bool:
        """Whether the sources still are what was copied."""
        self.synchronize()
        return all(
            torch.equal(source, target.to(source.device))
            for pair in self._pairs
            for source, target in pair.pieces()
        )

    def close(self) -> None:
        """Waits for the copies, whose memory the next save uses, and lets go of the tensors."""
        self.synchronize()
        self._pairs = ()


def _queue(device: torch.device, ready: torch.Event, pairs: Sequence[CopyPair]) -> torch.Event:
    """Queues the copies of one device behind ``ready``; the event at their end."""
    stream = _side_stream(device)
    pieces = [piece for pair in pairs for piece in pair.pieces()]
    sources = [piece.source for piece in pieces]
    targets = [piece.target for piece in pieces]
    with on_stream(stream), torch.no_grad():
        stream.wait_event(ready)
        torch._foreach_copy_(targets, sources, non_blocking=True)
    return stream.record_event()


def _side_stream(device: torch.device) -> torch.Stream:
    if device not in _streams:
        _streams[device] = torch.Stream(device)
    return _streams[device]


@dataclasses.dataclass(frozen=True)
class SnapshotCopy:
    """What is copied after a call has returned: what a gate waits for (``PendingCopy`` there)."""

    host: _C.StagingCopy
    device: DeviceCopy | None

    def run(self) -> None:
        """Helps to copy until there is nothing left to take on."""
        self.host.run()

    def finish(self) -> None:
        """Returns when the CPU's copies are done."""
        self.host.finish()

    def join_streams(self) -> None:
        if self.device is not None:
            self.device.join_streams()

    def find_change(self) -> str:
        """See ``PendingCopy``; reads everything."""
        changed = self.host.first_change(2)
        if changed >= 0:
            return f"copied piece {changed}"
        if self.device is not None and not self.device.unchanged():
            return "a tensor on a device"
        return ""
