"""Saves over an older checkpoint that fail: refused calls, ranks that raise, full and read-only
disks, directories that go."""

import datetime
import errno
import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import run_ranks
from save_faults import (
    OLD,
    at_call,
    calls_of,
    errors_for,
    is_about_older_files,
    loaded,
    no_fault,
    over_an_older_one,
    pair_mesh,
    process_is_as_it_was,
    sharded,
)
from torch.distributed.checkpoint.api import CheckpointException

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt import _C
from torch_hsdp_ckpt.checkpoint.save import commit as _commit
from torch_hsdp_ckpt.checkpoint.save import save as _save


def _refused(rank: int, path: str) -> int:
    """Every call of either rank up to the rename is refused in turn: an error on both ranks that
    names file and cause."""
    old, new, calls = over_an_older_one(path, lambda state: h.save(state, checkpoint_id=path))
    calls[0] = calls[0][: calls[0].index(("rename", "claim")) + 1]
    unchanged = process_is_as_it_was(path)
    dist.barrier()  # the next save's claim is one more file
    for failing in (0, 1):
        for number, (call, error) in enumerate(
            zip(calls[failing], errors_for(calls[failing]), strict=True)
        ):
            if is_about_older_files(calls[failing], number):
                continue
            paths: list[str] = []

            def refuse(path: str, error: int = error, paths: list[str] = paths) -> int:
                paths.append(path)
                return -error

            if rank == failing:
                at_call(number, refuse)
            with pytest.raises(OSError) as caught:
                h.save(new, checkpoint_id=path)
            no_fault()
            dist.broadcast_object_list(paths := paths or [""], src=failing)
            where = (failing, call, errno.errorcode[error])
            assert (caught.value.errno, caught.value.filename) == (error, paths[0]), where
            # An answer that is lost may be a rename that happened: its files stay. Theirs is the
            # only case.
            if call == ("rename", "claim"):
                h.save(old, checkpoint_id=path)
                unchanged = process_is_as_it_was(path)
            dist.barrier()
            assert unchanged(), where
            assert torch.equal(loaded(path), OLD), where
            dist.barrier()
    h.save(new, checkpoint_id=path)
    assert len(os.listdir(path)) == 3
    return sum(map(len, calls))


def _cut_short(rank: int, path: str) -> None:
    """Short and interrupted calls are gone on with; what is short because the disk is full is an
    error."""
    mesh = pair_mesh()
    old, new = sharded(OLD, mesh), sharded(OLD + 1, mesh)
    h.save(old, checkpoint_id=path)
    interrupted: set[tuple[str, str]] = set()

    def interrupt(op: str, about: str) -> int:
        if op == "close" or (op, about) in interrupted:
            return 5000 if op in ("pread", "pwrite") else 0
        interrupted.add((op, about))
        return -errno.EINTR

    _C._inject_fault(interrupt)
    h.save(new, checkpoint_id=path)
    no_fault()
    assert {op for op, _ in interrupted} >= {"open", "pwrite", "fsync", "fallocate", "ftruncate"}
    dist.barrier()
    assert torch.equal(loaded(path), OLD + 1)
    h.save(old, checkpoint_id=path)
    unchanged = process_is_as_it_was(path)
    dist.barrier()
    for failing in (0, 1):
        written: list[str] = []

        def full(op: str, path: str, written: list[str] = written) -> int:
            if op != "pwrite" or not path.endswith(".distcp"):
                return 0
            written.append(path)
            return 4096 if len(written) == 1 else -errno.ENOSPC

        if rank == failing:
            _C._inject_fault(full)
        with pytest.raises(OSError, match=rf"rank {failing}, step 'write'") as caught:
            h.save(new, checkpoint_id=path)
        no_fault()
        assert caught.value.errno == errno.ENOSPC
        assert f"__{failing}_" in caught.value.filename
        dist.barrier()
        assert unchanged()
        assert torch.equal(loaded(path), OLD)
        dist.barrier()


def _vanishing(rank: int, path: str) -> None:
    """The directory goes, with the older checkpoint in it, under a save: before a call of each
    kind, on either rank."""
    old, new, calls = over_an_older_one(path, lambda state: h.save(state, checkpoint_id=path))
    rename = calls[0].index(("rename", "claim"))
    unchanged = process_is_as_it_was()
    for failing, number in [
        (0, 2),
        (0, 3),
        (0, rename - 6),
        (0, rename - 2),
        (0, rename),
        (1, 4),
        (1, len(calls[1]) - 1),
    ]:
        away = f"{path}-{failing}-{number}"
        if rank == failing:
            at_call(number, lambda _, away=away: os.rename(path, away) or 0)  # type: ignore[misc,func-returns-value]
        with pytest.raises(OSError) as caught:
            h.save(new, checkpoint_id=path)
        no_fault()
        assert caught.value.errno == errno.ENOENT, calls[failing][number]
        assert str(caught.value.filename).startswith(path)
        assert unchanged(), calls[failing][number]
        dist.barrier()
        assert torch.equal(loaded(away), OLD), calls[failing][number]
        dist.barrier()
        if rank == 0:
            shutil.rmtree(path, ignore_errors=True)
            os.rename(away, path)
        dist.barrier()
        h.save(
            old, checkpoint_id=path
        )  # what the failed save could not remove is gone: the next one makes the same calls
    # A directory that is gone behind the rename took the new checkpoint with it, whole.
    if rank == 0:
        at_call(rename + 2, lambda _: os.rename(path, path + "-late") or 0)  # type: ignore[func-returns-value]
    h.save(new, checkpoint_id=path)
    no_fault()
    assert torch.equal(loaded(path + "-late"), OLD + 1)


def _under_dcp(rank: int, path: str) -> None:
    """The same through ``dcp.save``, which reports each rank's error."""
    mesh = pair_mesh()
    old, new = sharded(OLD, mesh), sharded(OLD + 1, mesh)
    dcp.save(old, storage_writer=h.FileSystemWriter(path))
    calls: list[Any] = [None, None]
    dist.all_gather_object(
        calls, calls_of(lambda: dcp.save(old, storage_writer=h.FileSystemWriter(path)))
    )
    rename = calls[0].index(("rename", "claim"))
    unchanged = process_is_as_it_was()
    for failing, steps in ((0, range(0, rename + 1, 3)), (1, range(0, len(calls[1]), 2))):
        for number in steps:
            if is_about_older_files(calls[failing], number):
                continue
            if rank == failing:
                at_call(number, lambda _: -errno.EIO)
            with pytest.raises(CheckpointException) as caught:
                dcp.save(new, storage_writer=h.FileSystemWriter(path))
            no_fault()
            error, _ = caught.value.failures[failing]
            assert isinstance(error, OSError)
            assert error.errno == errno.EIO
            assert str(error.filename).startswith(path)
            assert unchanged(), calls[failing][number]
            dist.barrier()
            assert torch.equal(loaded(path), OLD), calls[failing][number]
            dist.barrier()
            # What the other rank had written goes: the next save makes the same calls.
            dcp.save(old, storage_writer=h.FileSystemWriter(path))
    dcp.save(new, storage_writer=h.FileSystemWriter(path))
    assert torch.equal(loaded(path), OLD + 1)
    assert len(os.listdir(path)) == 3


def test_every_refused_call_is_an_error_on_every_rank(tmp_path: Path) -> None:
    assert run_ranks(_refused, 2, str(tmp_path / "checkpoint"))[0] > 20


@pytest.mark.parametrize(
    "case", [_cut_short, _vanishing, _under_dcp], ids=lambda case: case.__name__[1:]
)
def test_files_and_directories_that_misbehave(tmp_path: Path, case: Any) -> None:
    run_ranks(case, 2, str(tmp_path / "checkpoint"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 16 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root may mount a file system")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def _on_a_small_disk(rank: int, path: str, disk: str) -> None:
    mesh = pair_mesh()
    h.save(sharded(OLD, mesh), checkpoint_id=path)
    new = sharded(torch.ones(5_000_000), mesh)
    for error in (errno.ENOSPC, errno.EROFS):
        if error == errno.EROFS and rank == 0:
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        dist.barrier()
        unchanged = process_is_as_it_was(path)
        dist.barrier()
        with pytest.raises(OSError) as caught:
            h.save(new, checkpoint_id=path)
        assert caught.value.errno == error
        assert str(caught.value.filename).startswith(path)
        dist.barrier()
        assert unchanged()
        assert torch.equal(loaded(path), OLD)
        dist.barrier()


def test_a_disk_that_is_full_and_one_that_is_read_only(small_disk: Path) -> None:
    run_ranks(_on_a_small_disk, 2, str(small_disk / "checkpoint"), str(small_disk))


def _raising(rank: int, path: str) -> None:
    """An exception of any kind on one rank, before and after its bytes are written and at the
    commit."""
    mesh = pair_mesh()
    old, new = sharded(OLD, mesh), sharded(OLD + 1, mesh)
    h.save(old, checkpoint_id=path)
    unchanged = process_is_as_it_was(path)
    dist.barrier()
    write, vote, commit = _save.write, _commit._packed_vote, _C.commit_checkpoint

    def raising(*arguments: Any) -> Any:
        raise ValueError("no idea")

    def written(staged: Any) -> Any:
        write(staged)
        raise ValueError("no idea")

    points = ("before", "after", "vote")
    for failing, point in (*itertools.product((0, 1), points), (0, "commit")):
        if rank == failing and point == "commit":
            _C.commit_checkpoint = raising
        elif rank == failing and point == "vote":
            _commit._packed_vote = raising
        elif rank == failing:
            _save.write = raising if point == "before" else written
        with pytest.raises(h.CheckpointError, match=rf"rank {failing}: ValueError: no idea"):
            h.save(new, checkpoint_id=path)
        _save.write, _commit._packed_vote, _C.commit_checkpoint = write, vote, commit
        dist.barrier()
        assert torch.equal(loaded(path), OLD)
        if point == "commit":
            h.save(old, checkpoint_id=path)
            unchanged = process_is_as_it_was(path)
        dist.barrier()
        assert unchanged(), "nothing of the failed save is left"
        dist.barrier()


def test_a_rank_that_raises_fails_the_save_everywhere(tmp_path: Path) -> None:
    run_ranks(_raising, 2, str(tmp_path))


def _dying(rank: int, path: str) -> None:
    group = dist.new_group(timeout=datetime.timedelta(seconds=10))
    h.save({"w": OLD, "v": OLD}, checkpoint_id=path, process_group=group)  # a tensor a rank
    unchanged = process_is_as_it_was()
    write = _save.write

    def written(staged: Any) -> Any:
        vote = write(staged)
        os.kill(os.getpid(), signal.SIGKILL)
        return vote

    if rank == 1:
        _save.write = written
    with pytest.raises(h.CheckpointError, match="gets no answer"):
        h.save({"w": OLD + 1, "v": OLD + 1}, checkpoint_id=path, process_group=group)
    assert unchanged()


def test_a_rank_that_dies_when_all_is_durable_and_it_has_not_voted(tmp_path: Path) -> None:
    run_ranks(_dying, 2, str(tmp_path), allow_death=(1,))
    assert torch.equal(loaded(tmp_path), OLD)
    h.save({"w": OLD + 2}, checkpoint_id=tmp_path, no_dist=True)
    assert len(os.listdir(tmp_path)) == 2, "what the dead save left is gone"


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    import resource

    big = {"w": OLD, "big": torch.ones(3 << 20)}
    h.save({"w": OLD}, checkpoint_id=tmp_path, no_dist=True)
    unchanged = process_is_as_it_was(str(tmp_path))
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
    assert torch.equal(loaded(tmp_path), OLD)


def _address_of_one_rank(rank: int, path: str) -> None:
    state = {"w": torch.arange(2.0)}
    writer = h.FileSystemWriter(path) if rank == 1 else None
    expected = (h.CheckpointError, TypeError) if rank else h.CheckpointError
    for value in ("s3://bucket/c", 5):
        address: Any = value if rank == 1 else path
        for given in (None, writer):
            with pytest.raises(expected, match="" if rank else "rank 1"):
                h.save(state, checkpoint_id=address, storage_writer=given)
    future = h.async_save(state, checkpoint_id="s3://bucket/c" if rank == 1 else path)
    with pytest.raises(h.CheckpointError, match="addresses of object stores"):
        future.result(20)
    h.save(state, checkpoint_id=path)


def test_an_address_that_one_rank_alone_can_not_save_to(tmp_path: Path) -> None:
    """The others do not wait for it, and nothing is left."""
    run_ranks(_address_of_one_rank, 2, str(tmp_path / "c"), timeout=60.0)
    assert os.listdir(tmp_path) == ["c"] and len(os.listdir(tmp_path / "c")) == 2
