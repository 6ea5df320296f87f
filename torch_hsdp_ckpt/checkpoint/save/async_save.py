"""``async_save``: planned at the call, copied behind a gate, written and committed in the
background."""

import concurrent.futures
import functools
import os
import threading
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.checkpoint.state_dict_saver import async_save as torchs_async_save
from torch.distributed.checkpoint.storage import StorageWriter

from ...common import gate
from ...common.agreement import NestedCallError, agreement_of
from ...errors import CheckpointError, CorruptCheckpointError
from ..storage.staging import StagingPool
from ..storage.writer import FileSystemWriter
from .async_call import prepare_call
from .async_job import Job, was_given_up
from .async_phases import AsyncRequest, AsyncSave, SnapshotMode
from .open import request_of
from .stage import StagingLimits
from .through_dcp import choose_writer, default_planner, say_once, why_dcp_plans

InFlight = Literal["wait", "raise", "replace"]
_P = ParamSpec("_P")
_T = TypeVar("_T")


def _error_of(job: Job, error: Exception) -> Exception:
    """The error of a save, for a caller who may have begun another one since."""
    if isinstance(error, OSError) and error.errno is not None:
        text = f"{error.strerror} (the asynchronous save into {job.path})"
        return OSError(error.errno, text, error.filename)
    kind = CorruptCheckpointError if isinstance(error, CorruptCheckpointError) else CheckpointError
    return kind(f"the asynchronous save into {job.path} has failed: {error}")


class _InFlight:
    """The process's save in flight, and the memory that it writes from."""

    def __init__(self) -> None:
        # A call of another thread would take the memory of a save that has yet to be in flight.
        self.call = threading.RLock()
        self.calling = False
        self.pool = StagingPool()
        self.job: Job | None = None

    @property
    def running(self) -> bool:
        return self.job is not None and not self.job.future.done()

    def finish(self, before: Job | None) -> None:
        """Waits for a save, if there is one, and raises its exception, once."""
        if before is not None:
            try:
                before.future.result()
            except Exception as error:
                raise _error_of(before, error) from error
            finally:
                self._forget(before)

    def _forget(self, job: Job) -> None:
        # Not after Ctrl-C in the wait: the job goes on, and the memory that it writes from is its
        # own until it is done.
        if self.job is job and job.future.done():
            self.job = None

    def replace(self) -> None:
        """Ends the save before, unless it is committed already; raises its exception if it failed
        for another reason."""
        if (before := self.job) is not None:
            try:
                before.give_up()
            finally:
                self._forget(before)
            error = before.future.exception()
            if error is not None and not was_given_up(error):
                raise error


# A process has one save in flight, and one block of memory to write it from.
_in_flight = _InFlight()


def await_save(future: AsyncSave) -> None:
    """Waits for a save and raises its exception, which the next call then does not raise again."""
    job = _in_flight.job
    if job is not None and job.future is future:
        _in_flight.finish(job)
    else:
        future.result()


def wait_for_save_in_flight() -> None:
    """Waits until this process has no save in flight, whoever has begun it; what that raises is
    for him."""
    job = _in_flight.job
    if job is not None:
        concurrent.futures.wait([job.future])


def _forget_in_child() -> None:
    # A forked data loader has no thread of ours: what the parent waits for would never be done
    # here.
    global _in_flight
    _in_flight = _InFlight()
    gate.forget_in_child()


os.register_at_fork(after_in_child=_forget_in_child)


def _one_at_a_time(call: Callable[_P, _T]) -> Callable[_P, _T]:
    @functools.wraps(call)
    def locked(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        in_flight = _in_flight
        with in_flight.call:
            if in_flight.calling:
                raise NestedCallError(
                    "async_save: called within a call of its own, by a signal handler or a "
                    "Stateful object"
                )
            in_flight.calling = True
            try:
                return call(*args, **kwargs)
            finally:
                in_flight.calling = False

    return locked


@_one_at_a_time
def async_save(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    async_checkpointer_type: AsyncCheckpointerType = AsyncCheckpointerType.THREAD,
    async_stager: AsyncStager | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
    snapshot: SnapshotMode = "lazy",
    in_flight: InFlight = "wait",
    max_staging_bytes: int | None = None,
    trust_objects: bool = False,
) -> Any:
    """Saves the state at the call while training goes on;
    ``torch.distributed.checkpoint.async_save``'s arguments and more.

    Called by all ranks of ``process_group``, whose backend may be any, on any thread: several take
    turns. The checkpoint is the state at the call, bit for bit. Each rank copies what it will
    write, 1/R of its shard, into host memory that is kept for the next save. The parameters of this
    package's wrapped modules and the states of optimizers that have made a step are copied while
    training goes on, and the next ``optimizer.step()`` (as our own loading and
    ``summon_full_params``) waits for what is not copied yet; on CUDA its stream does. Everything
    else is copied before the call returns. A thread then writes, votes and commits, over a Gloo
    group of its own, exactly as :func:`save` does. Returns an :class:`AsyncSave`.

    ``async_stager``, process mode, and whatever :func:`save` leaves to DCP go to torch's own
    ``async_save``; the log says so.

    Args:
        snapshot: "lazy": as above. "copy": everything is copied before the call returns.
            "verify": lazy, and before the gate opens everything is read again, and a difference
            fails the save.
        in_flight: what to do if the save before is still in flight, the same on all ranks. "wait":
            wait for it. "raise": CheckpointError on all ranks if it is so on any. "replace": it is
            given up, unless all have voted for it by then.
        max_staging_bytes: host memory (pinned for tensors on devices) that the copies may take
            on this rank. Not counted are up to 64 MiB of the writer's own, and copies of tensors
            that do not lie contiguous. Tensors that do not fit are written first, from where they
            are: the next step waits for that, or this call where nothing guards them. None: all of
            1/R of the shard is copied.
        trust_objects: as :func:`save` has it.

    Raises:
        CheckpointError: on every rank: the save before has failed (once; the next call saves
            again), or there is too much to copy before the call returns for planning alone, and
            planning with the ranks failed. What fails later is on the future.
        OSError: as CheckpointError, where the operating system refused.
        ValueError: ``snapshot`` or ``in_flight`` is none of the above; ``max_staging_bytes`` is
            negative, or set where torch's own code saves, which has no such bound.
        RuntimeError: called within a call of its own, by a signal handler or a ``Stateful`` object.
    """
    _check_options(snapshot, in_flight, max_staging_bytes)
    if not threading.main_thread().is_alive():
        raise CheckpointError(
            "async_save: the interpreter ends (this is an atexit handler), and no thread can be "
            "had any more; save before"
        )
    chosen = choose_writer(storage_writer, checkpoint_id)
    writer = chosen.writer
    reason = _why_torch_saves(
        async_stager, async_checkpointer_type, why_dcp_plans(writer, planner, use_collectives)
    )
    if max_staging_bytes is not None and reason:
        raise ValueError(
            "max_staging_bytes is set, and torch's own code makes this save, without such a "
            f"bound: {reason}"
        )
    _end_save_before(in_flight, process_group, no_dist)
    if chosen.refused is not None and (reason or no_dist or not dist.is_initialized()):
        raise chosen.refused
    if reason:
        say_once(f"torch makes this asynchronous save: {reason}")
        options: dict[str, Any] = {} if async_stager is None else {"async_stager": async_stager}
        return torchs_async_save(
            state_dict,
            checkpoint_id=checkpoint_id,
            storage_writer=writer,
            planner=planner,
            process_group=process_group,
            async_checkpointer_type=async_checkpointer_type,
            no_dist=no_dist,
            use_collectives=use_collectives,
            **options,
        )
    assert isinstance(writer, FileSystemWriter)
    request = AsyncRequest(
        save=request_of(writer, process_group, "async_save", no_dist, trust_objects),
        planner=default_planner(planner),
        mode=snapshot,
        limits=StagingLimits(_in_flight.pool, max_staging_bytes),
    )
    call = prepare_call(request, state_dict, chosen.refused)
    job = _in_flight.job = Job(request)
    job.go_on(call)
    return job.future


def _check_options(
    snapshot: SnapshotMode, in_flight: InFlight, max_staging_bytes: int | None
) -> None:
    if snapshot not in ("lazy", "copy", "verify"):
        raise ValueError(f'snapshot={snapshot!r}: one of "lazy", "copy", "verify"')
    if in_flight not in ("wait", "raise", "replace"):
        raise ValueError(f'in_flight={in_flight!r}: one of "wait", "raise", "replace"')
    if max_staging_bytes is not None and max_staging_bytes < 0:
        raise ValueError(f"max_staging_bytes={max_staging_bytes}: bytes, 0 or more")


def _why_torch_saves(
    async_stager: AsyncStager | None, checkpointer_type: AsyncCheckpointerType, planning: str
) -> str:
    """Why torch's own code makes a save; "" if this package does. ``planning``: what
    ``why_dcp_plans`` says."""
    if async_stager is not None:
        return "an async_stager was passed"
    if checkpointer_type != AsyncCheckpointerType.THREAD:
        return f"async_checkpointer_type is {checkpointer_type}"
    return planning


def _end_save_before(
    in_flight: InFlight, process_group: dist.ProcessGroup | None, no_dist: bool
) -> None:
    """Deals with the save before as the caller wants it; raises its exception, once."""
    if in_flight == "raise":
        agreement = agreement_of(process_group, "async_save in flight", no_dist)
        answers = agreement.exchange("in flight", b"y" if _in_flight.running else b"n")
        if b"y" in answers:
            raise CheckpointError(
                'the asynchronous save before is still in flight, and in_flight="raise"'
            )
    if in_flight == "replace":
        _in_flight.replace()
    _in_flight.finish(_in_flight.job)


__all__ = ["AsyncSave", "async_save"]
