"""``save`` over an older checkpoint: ranks that raise or are killed, a full disk, a coordinator that is stopped and woken."""

import datetime
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt import _C, _save

OLD = torch.arange(50000.0)


def _loaded(path: str | Path) -> torch.Tensor:
    like = {"w": torch.zeros(50000)}
    h.load(like, checkpoint_id=path, no_dist=True)
    return like["w"]


def _at(point: str, act: Callable[[], None]) -> None:
    """Calls ``act`` in this process's next save: before or after its bytes are written, or between the vote and the rename."""
    if point == "commit":
        commit = _C.commit_checkpoint

        def stopped(*arguments: Any) -> Any:
            act()
            return commit(*arguments)

        _C.commit_checkpoint = stopped  # type: ignore[assignment]
        return
    write = _save.Save.write

    def written(self: Any) -> bytes:
        if point == "before":
            act()
        vote = write(self)
        if point == "after":
            act()
        return vote

    _save.Save.write = written  # type: ignore[method-assign]


def _raise() -> None:
    raise OSError(28, "disk on fire", "/some/file")


def _failing(rank: int, path: str, action: str, failing: int, point: str) -> None:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    group = dist.new_group(timeout=datetime.timedelta(seconds=10))
    placements = [Replicate(), Shard(0)]
    h.save({"w": distribute_tensor(OLD, mesh, placements)}, checkpoint_id=path, process_group=group)
    state = {"w": distribute_tensor(OLD + 1, mesh, placements)}
    if rank == failing:
        _at(point, _raise if action == "raise" else lambda: os.kill(os.getpid(), signal.SIGKILL))
    start = time.monotonic()
    if action == "raise":
        with pytest.raises(OSError, match=rf"disk on fire .rank {failing}, step") as error:
            h.save(state, checkpoint_id=path, process_group=group)
        assert (error.value.errno, error.value.filename) == (28, "/some/file")
        dist.barrier()
        assert torch.equal(_loaded(path), OLD)
        if point != "commit":
            assert len(os.listdir(path)) == 3, "nothing of the failed save is left"
    else:
        with pytest.raises(h.CheckpointError, match="gets no answer"):
            h.save(state, checkpoint_id=path, process_group=group)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("action", ["raise", "kill"])
@pytest.mark.parametrize("where", ["0 before", "1 before", "0 after", "1 after", "0 commit"])
def test_the_older_checkpoint_survives_and_every_rank_is_told(tmp_path: Path, action: str, where: str) -> None:
    failing, point = where.split()
    died = (int(failing),) if action == "kill" else ()
    run_ranks(_failing, 2, str(tmp_path), action, int(failing), point, allow_death=died)
    assert torch.equal(_loaded(tmp_path), OLD)
    h.save({"w": OLD + 2}, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(_loaded(tmp_path), OLD + 2)
    assert len(os.listdir(tmp_path)) == 2, "what the dead save left is gone"


def _stopped_and_woken(rank: int, path: str) -> None:
    pid_file = Path(path + ".pid")
    if rank == 0:
        _at("commit", lambda: os.kill(os.getpid(), signal.SIGSTOP))
        pid_file.write_text(str(os.getpid()))
        with pytest.raises(h.CheckpointError, match="has taken it over; this one is not committed"):
            h.save({"w": OLD}, checkpoint_id=path, no_dist=True)
        return
    while not pid_file.exists() or not pid_file.read_text():
        time.sleep(0.01)
    pid = int(pid_file.read_text())
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)
    h.save({"w": OLD + 1}, checkpoint_id=path, no_dist=True)
    os.kill(pid, signal.SIGCONT)


def test_a_coordinator_that_wakes_after_the_next_save_does_not_commit(tmp_path: Path) -> None:
    path = str(tmp_path / "checkpoint")
    run_ranks(_stopped_and_woken, 2, path)
    assert torch.equal(_loaded(path), OLD + 1)
    assert len(os.listdir(path)) == 2


def _process_is_as_it_was(path: str) -> Callable[[], bool]:
    """Whether no descriptor and no thread is new (those of earlier tests may go meanwhile), and the directory is the same."""

    def now() -> tuple[set[str], set[str], set[str]]:
        return set(os.listdir("/proc/self/fd")), set(os.listdir("/proc/self/task")), set(os.listdir(path))

    before = now()

    def unchanged() -> bool:
        descriptors, threads, files = now()
        return descriptors <= before[0] and threads <= before[1] and files == before[2]

    return unchanged


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    import resource

    big = {"w": OLD, "big": torch.ones(3 << 20)}
    h.save({"w": OLD}, checkpoint_id=tmp_path, no_dist=True)
    unchanged = _process_is_as_it_was(str(tmp_path))
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(OSError, match="distcp") as error:
            h.save(big, checkpoint_id=tmp_path, no_dist=True)
        assert error.value.errno
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert unchanged()
    assert torch.equal(_loaded(tmp_path), OLD)
