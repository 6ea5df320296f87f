"""Asynchronous saves that fail: every call refused, SIGKILL at every call, exceptions, forks and
spawns, hundreds in a row."""

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from device import DEVICE
from ranks import process_memory, run_ranks
from save_faults import (
    OLD,
    Scenario,
    about_to_be_killed,
    at_call,
    calls_of,
    errors_for,
    is_about_older_files,
    kill_at_every_call,
    loaded,
    no_fault,
    over_an_older_one,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt import _C
from torch_hsdp_ckpt.checkpoint.save import async_job, async_save

NEW = torch.arange(100_000.0) + 1


def _refused(rank: int, path: str) -> None:
    """Every call of either rank up to the rename is refused in turn: on the future, and at the next
    call, of both ranks."""
    old, new, calls = over_an_older_one(
        path, lambda state: h.async_save(state, checkpoint_id=path).result()
    )
    calls[0] = calls[0][: calls[0].index(("rename", "claim"))]
    files = sorted(os.listdir(path))
    for failing in (0, 1):
        for number, (call, error) in enumerate(
            zip(calls[failing], errors_for(calls[failing]), strict=True)
        ):
            if is_about_older_files(calls[failing], number):
                continue
            if rank == failing:
                at_call(number, lambda path, error=error: -error)  # type: ignore[misc]
            future = h.async_save(new, checkpoint_id=path)
            failure = future.exception(60)
            no_fault()
            where = (failing, call, errno.errorcode[error])
            assert isinstance(failure, OSError), where
            assert failure.errno == error, where
            with pytest.raises(OSError, match=f"rank {failing}"):
                h.async_save(old, checkpoint_id=path)
            dist.barrier()
            assert sorted(os.listdir(path)) == files, where
            assert torch.equal(loaded(path), OLD), where
            dist.barrier()
    h.async_save(new, checkpoint_id=path).result(60)
    dist.barrier()
    assert torch.equal(loaded(path), OLD + 1)


def test_every_call_refused(tmp_path: Path) -> None:
    run_ranks(_refused, 2, str(tmp_path / "c"))


def _old(rank: int, path: str) -> None:
    """Older checkpoints, by processes that are gone when others are saved over them."""
    for name in ("old", "watched"):
        h.save({"w": OLD}, checkpoint_id=f"{path}/{name}")


def _watched(rank: int, path: str) -> list[Any]:
    return calls_of(lambda: h.async_save({"w": NEW}, checkpoint_id=f"{path}/watched").result())


def _killed(rank: int, root: str, scenarios: list[Scenario]) -> None:
    name, group = about_to_be_killed(rank, scenarios)
    future = h.async_save({"w": NEW}, checkpoint_id=f"{root}/{name}", process_group=group)
    with pytest.raises(h.CheckpointError, match="gets no answer"):
        future.result(60)


def test_killed_at_every_call_of_either_rank(tmp_path: Path) -> None:
    run_ranks(_old, 2, str(tmp_path))
    calls = run_ranks(_watched, 2, str(tmp_path))
    rename = calls[0].index(("rename", "claim"))
    for who, call in kill_at_every_call(tmp_path, calls, _killed):
        path = tmp_path / f"{who}-{call}"
        expected = NEW if who == 0 and call > rename else OLD
        assert torch.equal(loaded(path, len(expected)), expected), (who, call, calls[who][call])


class _Numbers(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> int:
        return index


def _in_a_row(path: Path) -> None:
    """200 saves back to back with changing shapes, while forked and spawned workers live: no
    memory, no thread is left."""
    resting = 0
    forked = torch.utils.data.DataLoader(
        _Numbers(), num_workers=1, multiprocessing_context="fork", persistent_workers=True
    )
    spawned = torch.utils.data.DataLoader(
        _Numbers(), num_workers=1, multiprocessing_context="spawn", persistent_workers=True
    )
    h.async_save({"w": torch.ones(500_000)}, checkpoint_id=path)
    loaders = [iter(forked), iter(spawned)]  # begun while a save is in flight
    for i in range(200):
        size = 300_000 + 1000 * (i * 37 % 200)
        future = h.async_save({"w": torch.full((size,), float(i)), "n": i}, checkpoint_id=path)
        if i % 10 == 0:
            assert [int(next(loader)) for loader in loaders] == [i // 10] * 2
        if i == 60:
            resting = process_memory("VmRSS")
    assert process_memory("VmRSS") < resting + (32 << 20)
    future.result(60)
    assert torch.equal(loaded(path, size), torch.full((size,), 199.0))
    assert not _threads_that_stay(), "each save's threads end with it"


def _threads_that_stay() -> list[str]:
    ours = [each for each in threading.enumerate() if each.name.startswith("torch_hsdp_ckpt")]
    for thread in ours:
        thread.join(10)
    return [thread.name for thread in ours if thread.is_alive()]


def _forked_during_a_save(path: Path) -> None:
    """The forked child of a rank with a save in flight has none, and steps freely."""
    future = h.async_save({"w": torch.ones(500_000)}, checkpoint_id=path)
    child = os.fork()
    if child == 0:
        p = torch.nn.Parameter(torch.ones(2))
        p.grad = torch.ones(2)
        torch.optim.SGD([p], lr=0.1).step()
        os._exit(0 if async_save._in_flight.job is None else 1)
    assert os.waitpid(child, 0)[1] == 0
    future.result(60)


def _run_in_a_process_of_its_own(function: Callable[[Path], None], path: Path) -> None:
    """Not in one that pytest has started: what is spawned there imports the main module again."""
    code = (
        "import pathlib, sys; sys.path.insert(0, sys.argv[1]); import test_async_faults as t; "
        f"t.{function.__name__}(pathlib.Path(sys.argv[2])); print('came to its end')"
    )
    main = path.parent / "main.py"
    main.write_text(f"if __name__ == '__main__':\n    {code}\n")
    command = [sys.executable, str(main), str(Path(__file__).parent), str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0 and "came to its end" in ended.stdout, ended.stderr


def test_hundreds_in_a_row_with_workers_alive(tmp_path: Path) -> None:
    _run_in_a_process_of_its_own(_in_a_row, tmp_path / "c")


def test_a_process_that_is_forked_while_a_save_is_in_flight(tmp_path: Path) -> None:
    _run_in_a_process_of_its_own(_forked_during_a_save, tmp_path / "c")


@pytest.mark.parametrize(
    "end", ["raise ValueError('the end')", "os.kill(os.getpid(), signal.SIGINT); time.sleep(9)"]
)
def test_a_save_is_finished_when_the_program_fails(tmp_path: Path, end: str) -> None:
    code = (
        "import os, signal, time, torch, torch_hsdp_ckpt as h\n"
        # whatever the tests were started by
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"h.async_save({{'w': torch.arange(1e7)}}, checkpoint_id={str(tmp_path / 'c')!r})\n{end}"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], timeout=120, stderr=subprocess.PIPE, text=True, check=False
    )
    assert ended.returncode != 0
    assert ("the end" if "raise" in end else "KeyboardInterrupt") in ended.stderr
    assert torch.equal(loaded(tmp_path / "c", 10**7), torch.arange(1e7))


def test_a_call_interrupted_while_it_waits_leaves_the_save_before_alone(tmp_path: Path) -> None:
    writing, go_on = threading.Event(), threading.Event()

    def slow(op: str, path: str) -> int:
        if op == "pwrite" and path.startswith(str(tmp_path / "one")) and not writing.is_set():
            writing.set()
            go_on.wait(60)
        return 0

    _C._inject_fault(slow)
    handler = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # background jobs are started without
    try:
        first = h.async_save(
            {"w": torch.full((3 << 20,), 1.0)}, checkpoint_id=tmp_path / "one", snapshot="copy"
        )
        assert writing.wait(60)
        threading.Timer(
            0.3, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)
        ).start()
        with pytest.raises(KeyboardInterrupt):
            h.async_save(
                {"w": torch.full((3 << 20,), 2.0)}, checkpoint_id=tmp_path / "two", snapshot="copy"
            )
        threading.Timer(0.3, go_on.set).start()
        second = h.async_save(
            {"w": torch.full((3 << 20,), 3.0)}, checkpoint_id=tmp_path / "two", snapshot="copy"
        )
        assert first.done(), (
            "the memory that the first one writes from was the second one's too early"
        )
        second.result()
    finally:
        _C._inject_fault(None)
        signal.signal(signal.SIGINT, handler)
    for name, value in (("one", 1.0), ("two", 3.0)):
        assert torch.equal(loaded(tmp_path / name, 3 << 20), torch.full((3 << 20,), value))


class _Interrupting:
    def state_dict(self) -> dict[str, Any]:
        raise KeyboardInterrupt

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def _interrupted_call(rank: int, path: str) -> None:
    """Ctrl-C in one rank's call is raised there, and fails the save on every rank; nothing hangs,
    nothing stays shut."""
    parameter = nn.Parameter(torch.ones(10))
    optimizer = torch.optim.SGD([parameter], lr=1.0, momentum=0.9)
    for value in (1.0, 2.0):
        parameter.grad = torch.ones(10)
        optimizer.step()
        state = {"w": torch.full((50_000,), value), "optim": optimizer.state_dict()}
        h.async_save(state, checkpoint_id=path).result(60)
        if rank == 1:
            with pytest.raises(KeyboardInterrupt):
                h.async_save(state | {"it": _Interrupting()}, checkpoint_id=path)
        else:
            future = h.async_save(state | {"it": 1}, checkpoint_id=path)
            assert isinstance(future.exception(60), h.CheckpointError)
        optimizer.step()
        with pytest.raises(
            h.CheckpointError, match=r"rank 1: .*the call was interrupted \(KeyboardInterrupt\)"
        ):
            h.async_save(state, checkpoint_id=path)
        assert torch.equal(loaded(path), torch.full((50_000,), value))
        dist.barrier()


def test_a_call_that_is_interrupted_on_one_rank(tmp_path: Path) -> None:
    run_ranks(_interrupted_call, 2, str(tmp_path / "c"))


def test_calls_of_several_threads_take_turns(tmp_path: Path) -> None:
    """They share the memory that is written from."""
    wrong: list[Any] = []

    def save(number: int) -> None:
        for i in range(10):
            value, path = float(100 * number + i), tmp_path / f"{number}-{i}"
            h.async_save({"w": torch.full((2_000_000,), value)}, checkpoint_id=path).result(60)
            if not torch.equal(loaded(path, 2_000_000), torch.full((2_000_000,), value)):
                wrong.append(value)

    threads = [threading.Thread(target=save, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(os.listdir(tmp_path)) == 30


def test_optimizers_that_are_new_while_a_save_asks_for_all_of_them(tmp_path: Path) -> None:
    made: list[torch.optim.Optimizer] = []
    stop, interval = threading.Event(), sys.getswitchinterval()

    def train() -> None:
        while not stop.is_set():
            parameter = nn.Parameter(torch.ones(2))
            parameter.grad = torch.ones(2)
            made.append(torch.optim.SGD([parameter], lr=0.1, momentum=0.9))
            made[-1].step()
            del made[:-1000]

    thread = threading.Thread(target=train)
    sys.setswitchinterval(1e-5)
    try:
        thread.start()
        for i in range(50):
            h.async_save({"n": i}, checkpoint_id=tmp_path / "c").result(60)
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)


class _Clamped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.scale = nn.Parameter(torch.full((4,), 5.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.scale.clamp_(max=1.0)
        return self.linear(x).sum() * self.scale.sum()


def _in_place_in_forward(rank: int, path: str) -> None:
    """With one shard the full parameter is the shard's own memory, so that a forward may change
    it."""
    model = h.FullyShardedDataParallel(
        _Clamped(),
        device_mesh=init_device_mesh(DEVICE, (1, 1)),
        sharding_strategy=h.ShardingStrategy.NO_SHARD,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model(torch.ones(2, 64)).backward()
    optimizer.step()
    scale = model.state_dict()["scale"]
    scale._local_tensor.fill_(7.0)
    begin, passed = async_job.begin_copy, threading.Event()
    async_job.begin_copy = lambda *a: (passed.wait(60), begin(*a))[1]  # type: ignore[func-returns-value]
    saving = h.async_save({"scale": scale}, checkpoint_id=path)
    model(torch.ones(2, 64))
    assert (scale._local_tensor == 1.0).all()
    passed.set()
    saving.result()
    assert torch.equal(loaded(Path(path), 4, "scale"), torch.full((4,), 7.0))


def test_a_forward_that_changes_a_whole_shard_in_place(tmp_path: Path) -> None:
    run_ranks(_in_place_in_forward, 1, str(tmp_path / "c"))
