"""What a training job loses that is killed, or interrupted, while ``CheckpointManager`` saves in
the background."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from save_faults import pair_mesh, sharded

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt import _C

_EVERY = 2  # steps between saves
_SIZE = 1_000_000


def _state(step: int, mesh: Any = None) -> dict[str, Any]:
    weight = torch.full((_SIZE,), float(step))
    return {"step": step, **({"w": weight} if mesh is None else sharded(weight, mesh))}


def _train(
    rank: int, path: Path, manager: h.CheckpointManager, saves: int, at_the_end: Callable[[], None]
) -> None:
    """For ever; ``at_the_end`` is called before so many saves are made. The log has the steps whose
    ``save`` has returned."""
    log = os.open(path / f"log{rank}", os.O_WRONLY | os.O_CREAT)
    mesh, step = pair_mesh(), 0
    while True:
        step += 1
        dist.barrier()  # as a step's collectives
        if step == saves * _EVERY:
            at_the_end()
        if manager.save(step, lambda step=step: _state(step, mesh)):  # type: ignore[misc]
            os.write(log, f"{step}\n".encode())


def _killed(rank: int, path: Path, seconds: float) -> None:
    manager = h.CheckpointManager(path / "run", save_every=_EVERY, keep_last=2, asynchronous=True)
    # Any thread of the process may be in the midst of anything.
    end = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    try:
        _train(rank, path, manager, 4, end.start)
    except (h.CheckpointError, RuntimeError):
        if not end.is_alive():
            raise
        end.join()  # the peer was first


def _restored(path: Path) -> tuple[int, int]:
    """The step that a new job goes on from, and the last one whose ``save`` had returned on either
    rank."""
    begun = [int(step) for rank in (0, 1) for step in (path / f"log{rank}").read_text().split()]
    target = _state(0)
    restored = h.CheckpointManager(path / "run").restore_latest(target)
    assert restored == target["step"]
    assert torch.equal(target["w"], torch.full((_SIZE,), float(target["step"])))
    return target["step"], max(begun)


def test_a_job_that_is_killed_loses_the_save_in_flight_and_no_more(tmp_path: Path) -> None:
    chance = random.Random(7)
    for number in range(8):
        path = tmp_path / str(number)
        path.mkdir()
        run_ranks(_killed, 2, path, 0.06 * chance.random(), allow_death=(0, 1))
        restored, begun = _restored(path)
        # ``save`` returns for a step when the save before it is committed: that one is never lost.
        assert restored >= begun - _EVERY >= 2 * _EVERY, (number, restored, begun)


def _interrupted(rank: int, path: Path) -> None:
    def slow() -> None:
        assert manager._in_flight is not None
        (before := manager._in_flight).result()
        _C._inject_fault(lambda op, path: time.sleep(0.3) or 0 if op == "pwrite" else 0)  # type: ignore[func-returns-value]

        def interrupt() -> None:
            while manager._in_flight in (before, None):
                time.sleep(0.01)
            time.sleep(0.05)  # the loop has come to the next save, which waits for this one
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # type: ignore[arg-type]

        threading.Thread(target=interrupt, daemon=True).start()

    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the tests were started by
    manager = h.CheckpointManager(path / "run", save_every=_EVERY, keep_last=2, asynchronous=True)
    with pytest.raises(KeyboardInterrupt), manager:
        try:
            _train(rank, path, manager, 3, slow)
        finally:
            assert manager._in_flight is not None
            assert not manager._in_flight.done()
    manager._in_flight.result(60)  # not waited for on the way out, but at the interpreter's end


def test_a_job_that_is_interrupted_loses_no_save_that_was_begun(tmp_path: Path) -> None:
    run_ranks(_interrupted, 2, tmp_path)
    restored, begun = _restored(tmp_path)
    assert restored == begun == 3 * _EVERY
    assert not [
        name
        for name in os.listdir(tmp_path / "run" / f"step-{restored:06d}")
        if name.endswith(".tmp")
    ]
