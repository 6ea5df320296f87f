"""One asynchronous save of one rank: what the call does of it, and what its threads do."""

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Literal

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from ... import _C
from ...common.agreement import Agreement
from ...common.gate import DeviceCopy, Snapshot, find_guarded
from ...common.tensors import local_of
from ...errors import CheckpointError
from ..snapshot.staged import Objects, Staged
from ..stateful import values_of
from ..storage.data_file import StagedRecord
from ..storage.staging import Image, Layout, StagingPool
from ..storage.writer import FileSystemWriter
from .capture import Captured, Part
from .save import Save, pickled

_logger = logging.getLogger(__name__)
SnapshotMode = Literal["lazy", "copy", "verify"]

# What can't be copied late is copied whole if it is no more than this, so that the call need not
# ask the peers which part of it is this rank's.
_COPIED_WHOLE = 1 << 20
_GIVEN_UP = 'given up for a later one with in_flight="replace"'


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
        # nobody can cancel what the save is written from
        self.staging_completion.set_running_or_notify_cancel()
        self.staged_bytes = 0
        self.step_wait_seconds = 0.0

    def add_step_wait(self, seconds: float) -> None:
        self.step_wait_seconds += seconds

    @property
    def upload_completion(self) -> "AsyncSave":
        return self


class Job:
    """See the module. :meth:`start` is the call; everything after it happens on threads of the
    job."""

    def __init__(
        self,
        writer: FileSystemWriter,
        planner: DefaultSavePlanner,
        agreement: Agreement,
        global_ranks: Sequence[int],
        mode: SnapshotMode,
        pool: StagingPool,
        limit: int | None = None,
    ) -> None:
        self.future = AsyncSave()
        self.future.set_running_or_notify_cancel()
        self.started = False  # whether the future will be done
        self._writer, self._planner, self._agreement, self._global_ranks = (
            writer,
            planner,
            agreement,
            global_ranks,
        )
        self._mode, self._pool, self._limit = mode, pool, limit
        self._error: BaseException | None = (
            None  # of this rank; travels with the next thing that the ranks tell each other
        )
        self._given_up: CheckpointError | None = None
        # Held while the thread is started: one that runs Python code meanwhile keeps the call
        # waiting for the interpreter's lock, 5 ms each time.
        self._call = threading.Lock()
        self._running = False
        # The thread's too: a new one's is 0, where each rank would take some hundred MiB beside the
        # rank that trains there.
        on_device = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._device = torch.cuda.current_device() if on_device else None
        self._opened = self._staged = False
        # for the gate: what must be copied before the call returns has no place in memory
        self._call_waits = False
        self._captured: Captured | None = (
            None  # where nothing but the ranks' agreement is needed to plan
        )
        self._snapshot: Snapshot | None = None
        self._device_copy: DeviceCopy | None = None
        self._copy: _C.StagingCopy | None = None
        self._summed: list[_C.StagingCopy] = []  # the call's, and that one
        self._eager: list[int] = []  # tensors that have to be copied before the call returns
        self._eager_bytes = 0
        self._records: list[StagedRecord | torch.Tensor] = []
        self._objects: Objects = []
        self._image: Image | None = None
        # records, the first ones, that have no place in it: they are written from the tensors
        # themselves
        self._in_place = 0

    # -- the call

    def start(self, state_dict: dict[str, Any]) -> None:
        """Raises only what every rank raises, and Ctrl-C."""
        try:
            interrupt = self._prepare(state_dict)
            self.started = True
        finally:
            if not self.started:
                self._open_gate()
                if self._opened:
                    self._save.abandon()
        # Not a daemon: the interpreter waits for it at exit, so that a save that was begun is
        # finished.
        try:
            with self._call:
                threading.Thread(
                    target=self._run, name="torch_hsdp_ckpt_async_save", daemon=False
                ).start()
        except BaseException as error:
            # No thread is to be had, or Ctrl-C came before it ran: then here and now, since the
            # peers wait for this rank.
            self._run()
            if not isinstance(error, RuntimeError):
                raise
        if self._call_waits:
            try:
                self.future.staging_completion.result()
            except BaseException:
                self._given_up = CheckpointError(
                    f"{self._writer.path}: interrupted while its state was being copied"
                )
                raise
        if interrupt is not None:
            raise interrupt

    def _prepare(self, state_dict: dict[str, Any]) -> BaseException | None:
        """All that the call does itself. Returns Ctrl-C, for the caller; the peers, and the next
        call, are told of it."""
        agreement = self._agreement
        try:
            state_dict, failure = values_of(state_dict)
            if failure is not None:
                raise failure
            if self._mode != "copy":
                captured = Captured(
                    state_dict,
                    self._planner,
                    agreement.rank,
                    self._global_ranks,
                    agreement.is_coordinator,
                )
                if captured.structure is not None:
                    self._captured = captured
                    self._split(captured)
        except BaseException as error:
            self._error = error
        self._save = Save(
            state_dict, self._writer, self._planner, agreement, self._global_ranks, self._captured
        )
        if self._error is None:
            # Much to copy: agreed with the ranks first, so that it is 1/R of it.
            if self._captured is None or self._eager_bytes > _COPIED_WHOLE:
                try:
                    self._open()
                except BaseException:
                    self._save.abandon()
                    raise
            try:
                self._copy_now()
            except BaseException as error:
                self._error = error
                self._open_gate()
        if self._error is None or isinstance(self._error, Exception):
            return None
        interrupt = self._error
        self._error = CheckpointError(
            f"{self._writer.path}: the call was interrupted ({type(interrupt).__name__})"
        )
        return interrupt

    def _split(self, captured: Captured) -> None:
        """Which tensors have to be copied now; the gate for the others. Objects are copied."""
        captured.freeze_objects()
        watch, self._eager, self._eager_bytes = find_guarded(captured.live)
        if len(watch) > 0:
            self._snapshot = Snapshot(watch, captured.name, self.future.add_step_wait)

    def _open(self) -> None:
        self._save.open()
        self._save.plan()
        self._opened = True

    def _copy_now(self) -> None:
        captured = self._captured
        if captured is None or (self._opened and not self._save.agreed):
            staged = self._save.stage(self._pool, self._limit)
            self.future.staged_bytes, self._staged = staged.copied_bytes, True
            self._call_waits = staged.reads_state
            if not self._call_waits:
                self._open_gate()
            return
        # Before the device's copies are made, which read what is frozen too.
        captured.freeze_tensors(
            [i for i in self._eager if not (self._opened and captured.live.address(i))]
        )
        if not self._opened:
            self._eager.clear()
        assert captured.structure is not None
        devices = captured.structure.devices
        if devices:
            self._device_copy = DeviceCopy(devices)
        if self._eager:
            self._make_image(captured)
            eager = set(self._eager)
            self._call_waits = any(
                part.tensor in eager for part in captured.structure.parts[: self._in_place]
            )
            copy, sources, targets = self._copies(captured, now=True)
            copy.finish()
            self._summed.append(copy)
            if sources:
                assert self._device_copy is not None
                self._device_copy.start(sources, targets)
                self._device_copy.synchronize()
                self._device_copy = DeviceCopy(devices)

    def _make_image(self, captured: Captured) -> None:
        """Places for what this rank will write, in the memory that is kept for it; from the end, if
        it may not hold all."""
        assert captured.structure is not None
        parts, static, live = captured.structure.parts, captured.structure.static, captured.live
        if self._agreement.is_coordinator:
            self._objects = pickled(static.objects, captured.planner.state_dict)
        lengths = [len(data) for _, data in self._objects]
        files = static.plan.layout(static.pieces, lengths, self._writer.single_file_per_rank)
        layout = Layout(files, len(lengths), self._limit)
        self._image = self._pool.image(layout, self._device_copy is not None, self._limit)
        self._in_place = layout.first - len(lengths)
        for i, part in enumerate(parts):
            if i >= self._in_place:
                address = self._image.base + layout.payloads[len(lengths) + i]
            elif (local := local_of(live.tensor(part.tensor))).is_cuda:
                self._records.append(_slice(local, part).view(part.shape))
                continue
            else:
                address = live.address(part.tensor) + part.first
            self._records.append(StagedRecord(part.kind, part.shape, address, part.size))
        self.future.staged_bytes = sum(part.size for part in parts[self._in_place :])

    def _copies(
        self, captured: Captured, now: bool
    ) -> tuple[_C.StagingCopy, list[torch.Tensor], list[torch.Tensor]]:
        """The copying of what the call copies, or of the rest: what the CPU does, and what devices
        do, from where to where."""
        assert captured.structure is not None
        structure, live = captured.structure, captured.live
        sources: list[torch.Tensor] = []
        targets: list[torch.Tensor] = []
        assert self._image is not None
        image, eager, places = (
            self._image,
            set(self._eager),
            self._image.layout.payloads[len(self._objects) :],
        )
        for i, part in enumerate(structure.parts if structure.devices else ()):
            local = local_of(live.tensor(part.tensor))
            if (
                local.is_cuda
                and i >= self._in_place
                and part.size
                and (part.tensor in eager) == now
            ):
                sources.append(_slice(local, part))
                targets.append(image.view(len(self._objects) + i, sources[-1]))
        copy = live.copies(
            structure.copied, self._in_place, image.base, places, self._eager, not now
        )
        return copy, sources, targets

    # -- the threads

    def _run(self) -> None:
        with self._call:
            if self._running:
                return
            self._running = True
        vote = b""
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)
            # Before the CPU copies anything: a peer on this host that is still in its call loses no
            # time to it. Devices copy meanwhile.
            self._prepare_copies()
            if not self._opened:
                self._save.failed_before = self._error or self._given_up
                self._open()
            try:
                if self._error is None:
                    if not self._staged:
                        if self._captured is not None and self._save.agreed:
                            self._begin_copy()
                        self._stage()
                    vote = self._save.write(self._finish_copy)
                    self._check_given_up()
            except BaseException as caught:
                self._error = caught
            self._open_gate()
            metadata = self._save.commit(vote, self._error)
        except BaseException as failure:
            self._open_gate()
            try:
                self._save.abandon()
                _logger.warning(
                    "an asynchronous save failed; older checkpoints are as they were: %s", failure
                )
            finally:
                self.future.set_exception(failure)
        else:
            self.future.set_result(metadata)

    def _prepare_copies(self) -> None:
        """As if the ranks agreed, which they mostly do."""
        captured = self._captured
        if self._error is not None or self._staged or captured is None:
            return
        try:
            captured.hand_to_planner()
            if self._image is None:
                self._make_image(captured)
            self._copy, sources, targets = self._copies(captured, now=False)
            self._summed.append(self._copy)
            if self._device_copy is not None:
                self._device_copy.start(sources, targets)
        except BaseException as error:
            self._error = error

    def _begin_copy(self) -> None:
        assert self._copy is not None
        if self._snapshot is not None:
            self._snapshot.begin(
                self._copy, self._device_copy, self._mode == "lazy" and self._in_place == 0
            )
        # Beside this one, which may have to write some in its place first.
        threading.Thread(target=self._copy.run, name="torch_hsdp_ckpt_copy").start()

    def _stage(self) -> None:
        verify = (
            self._mode == "verify" and self._snapshot is not None
        )  # else there is no gate, and nothing is read again
        if self._save.agreed:
            assert self._image is not None
            if self._in_place and self._device_copy is not None:
                self._device_copy.wait_ready()
            staged = Staged(self._records, self._image, self._in_place, copies=self._summed)
            self._save.stage_captured(staged, self._objects, verify)
        else:  # planned otherwise than this rank has assumed; the gate is still shut
            if self._device_copy is not None:
                self._device_copy.wait_ready()
                self._device_copy.synchronize()  # its memory is used again
            self._copy = self._device_copy = self._image = None
            self.future.staged_bytes = self._save.stage(
                self._pool, self._limit, verify
            ).copied_bytes

    def _finish_copy(self) -> None:
        """What was to be read in its place has been; waits for the copies, and opens the gate."""
        if not self.future.staging_completion.done():
            if self._snapshot is not None:
                self._snapshot.settle(
                    self._mode == "verify" and self._copy is not None, self._save.check_sources
                )
            elif self._copy is not None:
                self._copy.finish()
            if self._device_copy is not None:
                self._device_copy.synchronize()
                if self._snapshot is not None:
                    self._snapshot.check_unless_passed()
            self._open_gate()
        self._check_given_up()

    def _open_gate(self) -> None:
        """Everything is copied, or will not be."""
        if self._copy is not None:
            self._copy.cancel()
            self._copy.finish()
        if self._device_copy is not None:
            self._device_copy.synchronize()  # the next save uses the same memory
        if self._snapshot is not None:
            self._snapshot.release()
            self._snapshot.close()
        if self._captured is not None:
            self._captured.drop()
        self._copy = self._snapshot = self._captured = self._device_copy = self._image = None
        self._records, self._objects = [], []
        if not self.future.staging_completion.done():
            self.future.staging_completion.set_result(None)

    # -- a later save

    def give_up(self) -> None:
        """Ends the save, on all ranks, unless all of them have voted for it by now. Returns when
        its outcome is known."""
        self._given_up = CheckpointError(f"{self._writer.path}: {_GIVEN_UP}")
        self.future.exception()

    def was_given_up(self, error: BaseException) -> bool:
        # Not where a rank failed for another reason besides.
        return type(error) is CheckpointError and str(error).count(_GIVEN_UP) >= str(error).count(
            "rank "
        )

    def _check_given_up(self) -> None:
        if self._given_up is not None:
            raise self._given_up


def _slice(local: torch.Tensor, part: Part) -> torch.Tensor:
    """A record's elements, on the device."""
    first = part.first // local.itemsize
    return local.detach().view(-1)[first : first + part.size // local.itemsize]
