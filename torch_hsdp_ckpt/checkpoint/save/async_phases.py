"""What an asynchronous save is asked for, what its call hands to its thread, and the future."""

import contextlib
import dataclasses
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Literal

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from ... import _C
from ...common.gate import Gate
from ..snapshot.device_copy import DeviceCopy, SnapshotCopy
from .capture import Captured
from .late_copy import PlacedRecords
from .open import Opened, SaveRequest
from .stage import Staged, StagingLimits

SnapshotMode = Literal["lazy", "copy", "verify"]


class AsyncSave(Future[Any]):
    """What :func:`async_save` returns: a future of the ``Metadata`` that ``save`` would have
    returned, or of its exception.

    ``staging_completion`` and ``upload_completion`` are DCP's pair: when the first is done, anybody
    may change the state; the second is this future. ``staged_bytes``: what this rank copied, when
    staging is done; ``step_wait_seconds``: what ``optimizer.step()`` and the like waited for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.staging_completion: Future[None] = Future()
        # Nobody can cancel a save, nor what it is written from.
        self.set_running_or_notify_cancel()
        self.staging_completion.set_running_or_notify_cancel()
        self.staged_bytes = 0
        self.step_wait_seconds = 0.0

    def add_step_wait(self, seconds: float) -> None:
        self.step_wait_seconds += seconds

    @property
    def upload_completion(self) -> "AsyncSave":
        return self


@dataclasses.dataclass(frozen=True)
class AsyncRequest:
    """What a call of ``async_save`` asks for, and the future that it returns.

    ``until_copied``: what has to end before the state may change, and the completion of
    ``staging_completion`` last: whoever closes it opens the gate. The call uses it, then the save's
    thread."""

    save: SaveRequest
    planner: DefaultSavePlanner
    mode: SnapshotMode
    limits: StagingLimits
    future: AsyncSave = dataclasses.field(default_factory=AsyncSave)
    until_copied: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)

    def __post_init__(self) -> None:
        self.until_copied.callback(self.future.staging_completion.set_result, None)


@dataclasses.dataclass(frozen=True)
class CallFailed:
    """The call has failed on this rank; the error travels with the next thing that ranks tell each
    other."""

    opened: Opened | None
    error: BaseException
    waits: bool = False


@dataclasses.dataclass(frozen=True)
class CallStaged:
    """The call has opened the save, and copied what finds room. ``waits``: the call returns when
    the thread has read the state."""

    opened: Opened
    staged: Staged
    gate: Gate | None
    waits: bool


@dataclasses.dataclass(frozen=True)
class CallCaptured:
    """The call has looked at the state, and copied what nobody guards; a thread copies the other
    tensors, ``late``.

    ``placed`` and ``copies``: where the call has copied to, and what, if it has opened the save;
    else all that nobody guards is frozen. ``device``: made at the call, of whose state it copies.
    ``waits``: see :class:`CallStaged`."""

    opened: Opened | None
    captured: Captured
    gate: Gate | None
    late: Sequence[int]
    device: DeviceCopy | None
    placed: PlacedRecords | None = None
    copies: Sequence[_C.StagingCopy] = ()
    waits: bool = False


Call = CallFailed | CallStaged | CallCaptured


@dataclasses.dataclass(frozen=True)
class LateCopy:
    """The copies that are made behind the gate: queued on devices, not begun on the CPU."""

    call: CallCaptured
    placed: PlacedRecords
    copy: SnapshotCopy


Ready = CallFailed | CallStaged | LateCopy  # what a thread opens the save with
