"""How a run ends: by SIGTERM, by an exception, with the interpreter; and what is said of a save
that nobody has asked for."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from forks import FORK, in_child, small_state

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt import _C


def test_forked_children_have_the_older_handler_of_sigterm(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with h.CheckpointManager(tmp_path, sigterm_deadline=30) as manager:
        with h.CheckpointManager(tmp_path, sigterm_deadline=30):
            child = FORK.Process(target=time.sleep, args=(60,))
            child.start()
            child.terminate()
            child.join(30)
            assert child.exitcode == -signal.SIGTERM
        ours: Any = signal.getsignal(signal.SIGTERM)

        def chained() -> None:
            signal.signal(signal.SIGTERM, lambda number, frame: ours(number, frame))
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

        assert in_child(chained) == -signal.SIGTERM
        assert not manager.save(1, small_state(1)) or not manager.preempted
    assert signal.getsignal(signal.SIGTERM) == before


def test_leaving_by_an_exception_waits_for_nothing(tmp_path: Path) -> None:
    blocked = tmp_path / "go on"

    def wait(op: str, path: str) -> int:
        while op == "fsync" and path.endswith(".distcp") and not blocked.exists():
            time.sleep(0.01)
        return 0

    _C._inject_fault(wait)
    try:
        with pytest.raises(RuntimeError, match="in the loop"):
            with h.CheckpointManager(tmp_path / "run", asynchronous=True) as manager:
                manager.save(1, small_state(1))
                raise RuntimeError("in the loop")
        assert manager.steps() == []
    finally:
        blocked.touch()
        manager.close()
        _C._inject_fault(None)
    assert manager.steps() == [1]


def test_a_failed_save_that_nobody_has_asked_is_named_later(tmp_path: Path) -> None:
    _C._inject_fault(lambda op, path: -errno.ENOSPC if op == "fsync" and "first" in path else 0)
    future = h.async_save(small_state(1), checkpoint_id=tmp_path / "first")
    assert isinstance(future.exception(60), OSError)
    _C._inject_fault(None)
    with pytest.raises(OSError, match=r"asynchronous save into .*first") as caught:
        h.async_save(small_state(2), checkpoint_id=tmp_path / "second")
    assert caught.value.errno == errno.ENOSPC
    h.async_save(small_state(2), checkpoint_id=tmp_path / "second").result(60)


def test_async_save_at_the_interpreters_end_is_an_error(tmp_path: Path) -> None:
    program = f"""
import atexit, torch, torch_hsdp_ckpt as h
def save():
    try:
        h.async_save({{"w": torch.ones(3)}}, checkpoint_id={str(tmp_path)!r})
    except h.CheckpointError as error:
        print(error)
atexit.register(save)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, "the interpreter ends" in done.stdout) == (0, True), done
