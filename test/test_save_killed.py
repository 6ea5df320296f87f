"""Saves that other processes or the power end: SIGKILL at every call, a coordinator that wakes too
late, two saves at once, and the order of the calls that a power loss could cut between."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import run_ranks
from save_faults import (
    OLD,
    Call,
    Scenario,
    about,
    about_to_be_killed,
    at_call,
    calls_of,
    kill_at_every_call,
    loaded,
    no_fault,
)

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt import _C

# More than one block a rank, so that there are calls in the middle of the data.
NEW = torch.arange(2_500_000.0) + 1


def _old(rank: int, path: str) -> None:
    """Older checkpoints, by processes that are gone when others are saved over them."""
    for name in ("old", "watched"):
        h.save({"w": OLD, "v": OLD}, checkpoint_id=f"{path}/{name}")  # a tensor a rank


def _watched(rank: int, path: str) -> list[Call]:
    return calls_of(lambda: h.save({"w": NEW, "v": NEW}, checkpoint_id=f"{path}/watched"))


def _killed(rank: int, root: str, scenarios: list[Scenario]) -> None:
    name, group = about_to_be_killed(rank, scenarios)
    with pytest.raises(h.CheckpointError, match="gets no answer"):
        h.save({"w": NEW, "v": NEW}, checkpoint_id=f"{root}/{name}", process_group=group)


def test_at_every_call_of_either_rank(tmp_path: Path) -> None:
    run_ranks(_old, 2, str(tmp_path))
    calls = run_ranks(_watched, 2, str(tmp_path))
    for each in calls:
        assert each.count(("pwrite", "data")) >= 2
        assert ("fsync", "data") in each
    rename = calls[0].index(("rename", "claim"))
    assert {("open", "claim"), ("fsync", "claim")} <= set(calls[0][:rename])
    assert calls[0][rename + 1] == ("fsync", "directory")
    assert ("unlink", "data") in calls[0][rename:]
    for who, call in kill_at_every_call(tmp_path, calls, _killed):
        where, path = (who, call, calls[who][call]), tmp_path / f"{who}-{call}"
        committed = who == 0 and call > rename
        expected = NEW if committed else OLD
        for name in ("w", "v"):
            assert torch.equal(loaded(path, len(expected), name), expected), where
        h.save({"w": OLD + 2}, checkpoint_id=path, no_dist=True)
        assert torch.equal(loaded(path), OLD + 2), where
        assert len(os.listdir(path)) == 2, f"what the dead save left is gone: {where}"


STOPS: list[Call] = [
    ("stat", "data"),  # 4: the vote is over
    ("open", "claim"),
    ("fsync", "claim"),
    ("rename", "claim"),
    ("fsync", "directory"),  # 7: it has committed, and the other save commits over that
    ("readdir", "directory"),
    ("unlink", "data"),
]


def _older(rank: int, root: str) -> None:
    for name in (*range(len(STOPS)), "watched"):
        h.save({"w": OLD - 1}, checkpoint_id=f"{root}/{name}")


def _alone(rank: int, root: str) -> list[Call]:
    return calls_of(lambda: h.save({"w": OLD - 1}, checkpoint_id=f"{root}/watched"))


def _stopped_and_woken(rank: int, root: str, numbers: list[int]) -> None:
    pair, role = divmod(rank, 2)
    path, pid_file = f"{root}/{pair}", Path(f"{root}/{pair}.pid")
    if role == 0:
        pid_file.write_text(f"{os.getpid()} ")
        at_call(numbers[pair], lambda path: os.kill(os.getpid(), signal.SIGSTOP) or 0)  # type: ignore[func-returns-value]
        if pair <= STOPS.index(("rename", "claim")):
            with pytest.raises(
                h.CheckpointError, match="has taken it over; this one is not committed"
            ):
                h.save({"w": OLD}, checkpoint_id=path, no_dist=True)
        else:
            h.save({"w": OLD}, checkpoint_id=path, no_dist=True)
        return
    while not pid_file.exists() or not pid_file.read_text().endswith(" "):
        time.sleep(0.01)
    pid = int(pid_file.read_text())
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)
    h.save({"w": OLD + 1}, checkpoint_id=path, no_dist=True)
    os.kill(pid, signal.SIGCONT)


def test_a_coordinator_that_wakes_after_the_next_save_takes_nothing_back(tmp_path: Path) -> None:
    # By a process that is gone: its files are nobody's when they are replaced.
    run_ranks(_older, 1, str(tmp_path))
    (calls,) = run_ranks(_alone, 1, str(tmp_path))
    vote = len(calls) - calls[::-1].index(("pwrite", "data"))
    # The last such call of a save: claims open and list before any data is written.
    numbers = [len(calls) - 1 - calls[::-1].index(stop) for stop in STOPS]
    assert min(numbers) > vote
    run_ranks(_stopped_and_woken, 2 * len(STOPS), str(tmp_path), numbers)
    for pair, stop in enumerate(STOPS):
        assert torch.equal(loaded(tmp_path / str(pair)), OLD + 1), stop
        assert len(os.listdir(tmp_path / str(pair))) == 2, stop


def _at_once(rank: int, path: str) -> int:
    """How many of the saves lost."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    h.save(
        {"w": NEW, "v": NEW}, checkpoint_id=f"{path}-{rank // 2}", process_group=groups[rank // 2]
    )
    lost = 0
    for each in range(10):
        values = [NEW + 2 * each, NEW + 2 * each + 1]  # each group's, of this round alone
        mine = {"w": values[rank // 2], "v": -values[rank // 2]}
        error = ""
        dist.barrier()
        try:
            h.save(mine, checkpoint_id=path, process_group=groups[rank // 2])
        except h.CheckpointError as caught:
            error = str(caught)
        errors: list[Any] = [None] * 4
        dist.all_gather_object(errors, error)
        assert bool(errors[0]) == bool(errors[1]), errors
        assert bool(errors[2]) == bool(errors[3]), errors
        winners = [values[group] for group in (0, 1) if not errors[2 * group]]
        assert winners, errors
        assert all("another save" in error for error in errors if error), errors
        lost += 2 - len(winners)
        if rank == 0:
            w, v = loaded(path, len(NEW)), loaded(path, len(NEW), "v")
            # Both have won if one began when the other had committed: then either may have been the
            # first.
            assert any(torch.equal(w, winner) and torch.equal(v, -winner) for winner in winners), (
                errors
            )
            assert len(os.listdir(path)) == 3, "nothing of the loser is left"
    return lost


def test_of_two_saves_at_once_one_wins(tmp_path: Path) -> None:
    assert run_ranks(_at_once, 4, str(tmp_path / "checkpoint"))[0] >= 1


def _logged(path: str, save: Callable[[], Any]) -> None:
    """The order of docs/design/format.md, by number: what a power loss may drop at any call is not
    needed yet, or not any more."""
    before = set(os.listdir(path)) if os.path.exists(path) else set()
    calls: list[tuple[str, str]] = []
    synced: dict[str, bytes] = {}

    def log(op: str, where: str) -> int:
        calls.append((op, where))
        if op == "fsync" and not os.path.isdir(where):
            synced[where] = Path(where).read_bytes()
        return 0

    _C._inject_fault(log)
    save()
    no_fault()

    def indices(op: str, what: str) -> list[int]:
        return [
            n
            for n, (called, where) in enumerate(calls)
            if called == op and (about(where) == what or where == what)
        ]

    if not before:  # 1
        made = [where for op, where in calls if op == "mkdir"]
        assert made == [os.path.dirname(path), path]
        for directory in made:
            mkdir = indices("mkdir", directory)[0]
            assert any(
                mkdir < n < indices("open", "claim")[0]
                for n in indices("fsync", os.path.dirname(directory))
            ), directory
    written = {where for op, where in calls if op in ("pwrite", "ftruncate", "fallocate")}
    assert not before & {os.path.basename(where) for where in written}, (
        "2: nothing that exists is written to"
    )
    data = {where for where in written if about(where) == "data"}
    (claim,) = written - data
    assert about(claim) == "claim"
    assert indices("open", claim)[0] < min(n for where in data for n in indices("open", where))
    last_write = max(
        n
        for where in data
        for op in ("pwrite", "ftruncate", "fallocate")
        for n in indices(op, where)
    )
    for where in data:  # 3
        last = max(n for op in ("pwrite", "ftruncate", "fallocate") for n in indices(op, where))
        assert last < indices("fsync", where)[-1]
        assert synced[where] == Path(where).read_bytes(), (
            "no byte was on its way when it was synced"
        )
    last_sync = max(indices("fsync", "data"))
    directory = next(n for n in indices("fsync", path) if n > max(last_sync, last_write))
    metadata = indices("pwrite", claim)
    for where in data:
        assert any(directory < n < metadata[0] for n in indices("stat", where)), "4"
    (metadata_sync,) = [n for n in indices("fsync", claim) if n > metadata[0]]
    assert directory < metadata[0] <= metadata[-1] < metadata_sync  # 5
    assert synced[claim] == Path(path, ".metadata").read_bytes()
    (rename,) = indices("rename", claim)
    assert metadata_sync < rename  # 6
    assert calls[rename + 1] == ("fsync", path)  # 7
    removed = indices("unlink", "data")
    assert {calls[n][1] for n in removed} == {
        f"{path}/{name}" for name in before if about(name) == "data"
    }
    assert all(rename + 1 < n for n in removed)  # 8
    assert set(os.listdir(path)) == {".metadata", *map(os.path.basename, data)}


def _in_order(rank: int, root: str) -> None:
    state = {"w": NEW, "v": OLD, "words": ["some", "words"]}
    for files in (True, False):

        def writer(path: str, files: bool = files) -> h.FileSystemWriter:
            return h.FileSystemWriter(path, single_file_per_rank=files, thread_count=3)

        saves: dict[str, Callable[[str], Any]] = {
            "save": lambda path: h.save(state, storage_writer=writer(path)),
            "dcp": lambda path: dcp.save(state, storage_writer=writer(path)),
            "async": lambda path: h.async_save(state, storage_writer=writer(path)).result(60),
        }
        for name, save in saves.items():
            path = f"{root}/{name}-{files}/checkpoint"
            for _ in range(2):  # into a directory that isn't there, then over an older checkpoint
                _logged(path, lambda path=path, save=save: save(path))  # type: ignore[misc]


def test_what_a_power_loss_may_drop_is_not_needed(tmp_path: Path) -> None:
    run_ranks(_in_order, 1, str(tmp_path))
