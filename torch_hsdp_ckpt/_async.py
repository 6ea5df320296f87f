"""``async_save``: the state is copied, then written and committed in the background."""

import logging
import os
import threading
from concurrent.futures import Future
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.checkpoint.storage import StorageWriter

from ._agreement import agreement_of
from ._save import Save, _global_ranks, _say_once, _who_plans
from ._staging import StagingPool

_logger = logging.getLogger(__name__)


class AsyncSave(Future[Any]):
    """What :func:`async_save` returns: a future of the ``Metadata`` that ``save`` would have returned, or of its exception.

    ``staging_completion`` and ``upload_completion`` are DCP's pair: the state may change after the first (it is done when the
    call returns); the second is this future.
    """

    def __init__(self) -> None:
        super().__init__()
        self.staging_completion: Future[None] = Future()
        self.staging_completion.set_result(None)

    @property
    def upload_completion(self) -> "AsyncSave":
        return self


class _InFlight:
    """The process's save in flight, and the memory that it writes from."""

    def __init__(self) -> None:
        self.pool = StagingPool()
        self.save: AsyncSave | None = None

    def finish(self) -> None:
        """Waits for the save before, if there is one, and raises its exception, once."""
        before, self.save = self.save, None
        if before is not None:
            before.result()


_in_flight = _InFlight()


def _forget_in_child() -> None:
    # A forked data loader has no thread of ours: what the parent waits for would never be done here.
    global _in_flight
    _in_flight = _InFlight()


os.register_at_fork(after_in_child=_forget_in_child)


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
) -> Any:
    """Saves the state at the call while training goes on; ``torch.distributed.checkpoint.async_save``'s arguments.

    Called by all ranks of ``process_group``, whose backend may be any. Copies what this rank will write, 1/R of its shard,
    into host memory that is kept for the next save; when the call returns, the state may change. A thread then writes, votes
    and commits, over a Gloo group of its own, exactly as :func:`save` does. Returns an :class:`AsyncSave`.

    One save is in flight at a time: a further call first waits for it, and raises its exception if it failed, on every rank;
    the call after that saves again. At the end of the process a save in flight is finished.

    ``async_stager``, process mode, and whatever :func:`save` leaves to DCP go to torch's own ``async_save``; the log says so.

    Raises (on all ranks) what :func:`save` raises before the first byte is written; what fails later is on the future.
    """
    reason, writer = _who_plans(storage_writer, checkpoint_id, planner, use_collectives)
    if async_stager is not None:
        reason = "an async_stager was passed"
    elif async_checkpointer_type != AsyncCheckpointerType.THREAD:
        reason = f"async_checkpointer_type is {async_checkpointer_type}"
    _in_flight.finish()
    if writer is None or reason:
        _say_once(f"torch makes this asynchronous save: {reason}")
        options: dict[str, Any] = {} if async_stager is None else {"async_stager": async_stager}
        return dcp.async_save(
            state_dict,
            checkpoint_id=checkpoint_id,
            storage_writer=storage_writer,
            planner=planner,
            process_group=process_group,
            async_checkpointer_type=async_checkpointer_type,
            no_dist=no_dist,
            use_collectives=use_collectives,
            **options,
        )
    if checkpoint_id is not None:
        writer.reset(checkpoint_id)
    state_dict = {k: v.state_dict() if isinstance(v, Stateful) else v for k, v in state_dict.items()}
    agreement = agreement_of(process_group, "async_save", no_dist)
    planner = planner if isinstance(planner, DefaultSavePlanner) else DefaultSavePlanner()
    save = Save(state_dict, writer, planner, agreement, _global_ranks(process_group, no_dist))
    try:
        save.open()
        save.plan()
    except BaseException:
        save.abandon()
        raise
    # Peers have gone on by now: an error here travels with the vote, which makes the save fail on every rank.
    error: BaseException | None = None
    try:
        save.stage(_in_flight.pool)
    except BaseException as caught:
        error = caught
    future = _in_flight.save = AsyncSave()
    future.set_running_or_notify_cancel()
    # Not a daemon: the interpreter waits for it at exit, so that a save that was begun is finished.
    threading.Thread(target=_run, args=(save, error, future), name="torch_hsdp_ckpt_async_save", daemon=False).start()
    if error is not None and not isinstance(error, Exception):
        raise error  # Ctrl-C; the thread tells the peers
    return future


def _run(save: Save, error: BaseException | None, future: AsyncSave) -> None:
    vote = b""
    try:
        try:
            if error is None:
                vote = save.write()
        except BaseException as caught:
            error = caught
        metadata = save.commit(vote, error)
    except BaseException as failure:
        save.abandon()
        _logger.warning("an asynchronous save failed; older checkpoints are as they were: %s", failure)
        future.set_exception(failure)
    else:
        future.set_result(metadata)
