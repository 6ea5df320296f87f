"""Real ranks for the tests: processes, Gloo, a file rendezvous, a time limit.

A fork server imports torch and the package once (2 s); each rank is a fork of it and starts in
milliseconds. What torch imports late is imported there too: its optimizers bring in torch._dynamo,
which costs each rank a second."""

from __future__ import annotations

import ctypes
import importlib
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from device import BACKEND, DEVICE, use_device

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

    def make(
        self: Any, store: Any, rank: int, size: int, timeout: Any = None, **other: Any
    ) -> None:
        options = ProcessGroupGloo._Options()
        options._devices = [ProcessGroupGloo.create_default_device()]
        options._threads = 1
        if timeout is not None:
            options._timeout = timeout
        made(self, store, rank, size, options)

    ProcessGroupGloo.__init__ = make


@dataclass(frozen=True)
class _Outcome:
    """What a rank's function returned, or how it failed."""

    value: Any = None
    failure: str | None = None


@dataclass(frozen=True)
class _Started:
    """A rank's process, and the pipe that its outcome comes through."""

    rank: int
    process: Any
    receiver: Connection


class RankError(AssertionError):
    """A rank raised, died or ran out of time; the message holds every rank's traceback."""


def _rank(
    call: bytes,
    rank: int,
    world_size: int,
    store: str,
    backend: str,
    settings: Mapping[str, str],
    sender: Connection,
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    one_gloo_thread()
    tolerate_torchs_wrapper()
    os.environ.update(settings, RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    if SIMULATED or "simulated" in backend:  # where the collectives of these ranks meet
        os.environ["SIMGPU_DIR"] = os.path.dirname(store)
    try:
        if "simulated" in backend:
            importlib.import_module("simgpu.python.simulated_accelerator").set_device(rank)
        if "cuda" in backend or "nccl" in backend:
            # Before a mesh takes LOCAL_RANK's, of which there may be fewer than ranks.
            torch.cuda.set_device(rank % torch.cuda.device_count())
        use_device(rank)
        fn, args = pickle.loads(call)
        dist.init_process_group(
            backend, store=dist.FileStore(store, world_size), rank=rank, world_size=world_size
        )
        value = fn(rank, *args)
        if torch.cuda.is_initialized() or "simulated" in backend:
            torch.accelerator.synchronize()  # peers may need this rank's part of what is queued yet
        outcome = _Outcome(value, findings_of_simulated_gpu() or None)
    except BaseException:
        outcome = _Outcome(failure=traceback.format_exc())
    sender.send_bytes(pickle.dumps(outcome))
    sender.close()
    # A peer that failed may never come to a collective that tearing down would wait for.
    os._exit(0)


SIMULATED = "SIMGPU_DIR" in os.environ  # whether CUDA devices are simulated ones (simgpu/)


def _simulator() -> Any:
    """What simulates this process's devices: GPUs, or those of an accelerator of its own."""
    return sys.modules.get("simgpu_aten") or sys.modules.get("simgpu_accelerator")


def tolerate_torchs_wrapper() -> None:
    """Torch's fully_shard frees gradients that another of its streams still reads, which harms
    nobody as long as their memory is not given out again: a rank that uses it does not take that
    for a fault from there on."""
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    made = FSDPParamGroup.__init__

    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        simulator = _simulator()
        if simulator is not None:
            simulator.poison_frees(False)
        made(self, *args, **kwargs)

    FSDPParamGroup.__init__ = make


def findings_of_simulated_gpu() -> str:
    """What the simulated GPU (``simgpu/``) has found wrong in this process since it was asked last;
    "" without one."""
    simulator = _simulator()
    if simulator is None:
        return ""
    text: str = simulator.findings_text()
    simulator.clear_findings()
    return text


class Messages(logging.Handler):
    """What a logger says within a rank, where pytest's ``caplog`` does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def process_memory(key: str) -> int:
    """Bytes of one line of ``/proc/self/status``, such as VmRSS, VmHWM or RssFile."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = next(line.split()[1] for line in lines if line.startswith(key))
    return int(kib) << 10


def memory_on_device_of(call: Callable[[], Any]) -> int:
    """Bytes that a call takes at its height, on top of what is resting, of the memory of the device
    that the tests run on."""
    if DEVICE == "cpu":
        return memory_of(call)
    import torch

    torch.cuda.synchronize()
    resting = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - resting


def memory_of(call: Callable[[], Any]) -> int:
    """Bytes of the host's memory that this process takes at the height of a call, on top of what is
    resting, memory shared with others included."""
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
    backend: str = BACKEND,
    timeout: float = 120.0,
    allow_death: tuple[int, ...] = (),
    settings: Mapping[str, str] = MappingProxyType({}),
) -> list[Any]:
    """Calls ``fn(rank, *args)`` in ``world_size`` processes with a default process group and
    returns what each returned.

    ``fn`` is a module-level function; ``settings`` are environment variables. Raises RankError if a
    rank raises, dies (unless it is in ``allow_death``; its result is then None) or is not done
    after ``timeout`` seconds."""
    # Plain bytes both ways: torch's own pickling for processes would send tensors as files in
    # shared memory.
    call = pickle.dumps((fn, args))
    with tempfile.TemporaryDirectory() as scratch:
        ranks = [
            _start(call, rank, world_size, f"{scratch}/store", backend, dict(settings))
            for rank in range(world_size)
        ]
        outcomes = _collect(ranks, timeout, allow_death)
    failures = [
        f"--- rank {rank}: {outcomes[rank].failure}"
        for rank in range(world_size)
        if outcomes[rank].failure is not None
    ]
    if failures:
        raise RankError("\n".join(["ranks failed:", *failures]))
    return [outcomes[rank].value for rank in range(world_size)]


def _start(
    call: bytes, rank: int, world_size: int, store: str, backend: str, settings: dict[str, str]
) -> _Started:
    receiver, sender = _context.Pipe(duplex=False)
    arguments = (call, rank, world_size, store, backend, settings, sender)
    process = _context.Process(target=_rank, args=arguments, daemon=True)
    process.start()
    sender.close()
    return _Started(rank, process, receiver)


def _collect(
    ranks: list[_Started], timeout: float, allow_death: tuple[int, ...]
) -> dict[int, _Outcome]:
    """Waits for every rank, ends those that are late, and returns each rank's outcome.

    Once a rank has failed, the others get a moment to say why they fail too, then they are
    ended."""
    outcomes: dict[int, _Outcome] = {}
    limit = time.monotonic() + timeout
    late = f"was not done after {timeout:.0f} s"
    waiting = {started.receiver: started for started in ranks}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, limit - time.monotonic()))
        if not ready:
            break
        for receiver in ready:
            started = waiting.pop(receiver)
            outcome = _received(started, started.rank in allow_death)
            outcomes[started.rank] = outcome
            if outcome.failure is not None:
                limit = min(limit, time.monotonic() + 3)
                late = "ended: a peer failed"
    for started in waiting.values():
        os.kill(started.process.pid, signal.SIGKILL)
        outcomes[started.rank] = _Outcome(failure=late)
    for started in ranks:
        started.process.join()
    return outcomes


def _received(started: _Started, may_die: bool) -> _Outcome:
    """Reads what a rank has sent, or how it ended without."""
    try:
        return pickle.loads(started.receiver.recv_bytes())
    except EOFError:
        started.process.join()
    if may_die:
        return _Outcome()
    return _Outcome(failure=f"died with exit code {started.process.exitcode}")


def _one_after_another(rank: int, checks: Sequence[Callable[[int], None]]) -> None:
    for check in checks:
        try:
            check(rank)
        except pytest.skip.Exception:
            continue
        except BaseException as error:
            raise AssertionError(f"in {check.__name__}") from error


def run_checks(world_size: int, *checks: Callable[[int], None], timeout: float = 120.0) -> None:
    """``run_ranks`` for several functions in the same processes, one after another: starting ranks
    costs. The error names the one that raised."""
    run_ranks(_one_after_another, world_size, checks, timeout=timeout)
