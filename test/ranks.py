"""Real ranks for the tests: processes, Gloo, a file rendezvous, a time limit.

A fork server imports torch and the package once (2 s); each rank is a fork of it and starts in
milliseconds. What torch imports late is imported there too: its optimizers bring in torch._dynamo,
which costs each rank a second."""

import ctypes
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "torch",
        "torch.distributed.tensor",
        "torch.distributed.fsdp",
        "torch._dynamo",
        "torch_hsdp_ckpt",
        "pytest",
    ]
)


def one_gloo_thread() -> None:
    """Gives the Gloo groups of this process one worker thread instead of torch's two.

    The two write the name of the last collective that ended into one string without a lock
    (``ProcessGroupGloo::runLoop``, torch 2.11 to 2.15). Names of more than 15 characters lie on the
    heap, which that ruins: a thousand all-gathers of ``DTensor.full_tensor`` in a row, or FSDP2's
    reduce-scatters, may end a rank, with torch alone too. The wrapper's and the engine's own
    collectives have short names."""
    from torch.distributed.distributed_c10d import ProcessGroupGloo

    made = ProcessGroupGloo.__init__

    def make(self: Any, store: Any, rank: int, size: int, timeout: Any = None, **rest: Any) -> None:
        options = ProcessGroupGloo._Options()
        options._devices = [ProcessGroupGloo.create_default_device()]
        options._threads = 1
        if timeout is not None:
            options._timeout = timeout
        made(self, store, rank, size, options)

    ProcessGroupGloo.__init__ = make


class RankError(AssertionError):
    """A rank raised, died or ran out of time; the message holds every rank's traceback."""


def _rank(
    call: bytes, rank: int, world_size: int, store: str, backend: str, sender: Connection
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    one_gloo_thread()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    try:
        if (
            "cuda" in backend or "nccl" in backend
        ):  # before a mesh takes LOCAL_RANK's, of which there may be fewer than ranks
            torch.cuda.set_device(rank % torch.cuda.device_count())
        fn, args = pickle.loads(call)
        dist.init_process_group(
            backend, store=dist.FileStore(store, world_size), rank=rank, world_size=world_size
        )
        outcome = (True, fn(rank, *args))
    except BaseException:
        outcome = (False, traceback.format_exc())
    sender.send_bytes(pickle.dumps(outcome))
    sender.close()
    os._exit(
        0
    )  # a peer that failed may never come to a collective that tearing down would wait for


def process_memory(key: str) -> int:
    """Bytes of one line of ``/proc/self/status``, such as VmRSS, VmHWM or RssFile."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)
    )
    return int(line.split()[1]) << 10


def memory_of(call: Callable[[], Any]) -> int:
    """Bytes that this process takes at the height of a call, on top of what is resting, memory
    shared with others included."""
    # What malloc kept of the work before would be used again, and hide some of what the call takes.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    resting, mapped = process_memory("VmRSS"), process_memory("RssFile")
    call()
    # Pages of libraries that are touched for the first time are no memory that the call takes.
    return process_memory("VmHWM") - resting - max(0, process_memory("RssFile") - mapped)


def run_ranks(
    fn: Callable[..., Any],
    world_size: int = 4,
    *args: Any,
    backend: str = "gloo",
    timeout: float = 120.0,
    allow_death: tuple[int, ...] = (),
) -> list[Any]:
    """Calls ``fn(rank, *args)`` in ``world_size`` processes with a default process group and
    returns what each returned.

    ``fn`` is a module-level function. Raises RankError if a rank raises, dies (unless it is in
    ``allow_death``; its result is then None) or is not done after ``timeout`` seconds."""
    # Plain bytes both ways: torch's own pickling for processes would send tensors as files in
    # shared memory.
    call = pickle.dumps((fn, args))
    with tempfile.TemporaryDirectory() as scratch:
        ranks, receivers = [], []
        for rank in range(world_size):
            receiver, sender = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_rank,
                args=(call, rank, world_size, f"{scratch}/store", backend, sender),
                daemon=True,
            )
            process.start()
            sender.close()
            ranks.append(process)
            receivers.append(receiver)
        outcomes: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout
        waiting = dict(zip(receivers, range(world_size), strict=True))
        failed_at = None
        while waiting:
            # Once a rank has failed, the others get a moment to say why they fail too, then they
            # are ended.
            limit = deadline if failed_at is None else min(deadline, failed_at + 3)
            ready = wait(list(waiting), timeout=max(0.0, limit - time.monotonic()))
            if not ready:
                break
            for receiver in ready:
                rank = waiting.pop(receiver)
                try:
                    outcomes[rank] = pickle.loads(receiver.recv_bytes())
                except EOFError:
                    ranks[rank].join()
                    died = f"died with exit code {ranks[rank].exitcode}"
                    outcomes[rank] = (True, None) if rank in allow_death else (False, died)
                if not outcomes[rank][0] and failed_at is None:
                    failed_at = time.monotonic()
        for rank in waiting.values():
            os.kill(ranks[rank].pid, signal.SIGKILL)
            outcomes[rank] = (
                False,
                f"was not done after {timeout:.0f} s"
                if failed_at is None
                else "ended: a peer failed",
            )
        for process in ranks:
            process.join()
    failures = [
        f"--- rank {rank}: {outcomes[rank][1]}"
        for rank in range(world_size)
        if not outcomes[rank][0]
    ]
    if failures:
        raise RankError("\n".join(["ranks failed:", *failures]))
    return [outcomes[rank][1] for rank in range(world_size)]


def _one_after_another(rank: int, checks: Sequence[Callable[[int], None]]) -> None:
    for check in checks:
        try:
            check(rank)
        except BaseException as error:
            raise AssertionError(f"in {check.__name__}") from error


def run_checks(world_size: int, *checks: Callable[[int], None], timeout: float = 120.0) -> None:
    """``run_ranks`` for several functions in the same processes, one after another: starting ranks
    costs. The error names the one that raised."""
    run_ranks(_one_after_another, world_size, checks, timeout=timeout)
