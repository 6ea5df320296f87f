"""SIGKILL at every call that a save over an older checkpoint makes, and a coordinator stopped there that wakes too late."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from save_faults import OLD, Call, Scenario, about_to_be_killed, at_call, calls_of, kill_at_every_call, loaded

import torch_hsdp_ckpt as h

# More than one block a rank, so that there are calls in the middle of the data.
NEW = torch.arange(2_500_000.0) + 1


def _watched(rank: int, path: str) -> list[Call]:
    """What a save calls; the older checkpoint that the others go over is in ``path``/old."""
    for name in ("old", "watched"):
        h.save({"w": OLD, "v": OLD}, checkpoint_id=f"{path}/{name}")  # a tensor a rank
    return calls_of(lambda: h.save({"w": NEW, "v": NEW}, checkpoint_id=f"{path}/watched"))


def _killed(rank: int, root: str, scenarios: list[Scenario]) -> None:
    name, group = about_to_be_killed(rank, scenarios)
    with pytest.raises(h.CheckpointError, match="gets no answer"):
        h.save({"w": NEW, "v": NEW}, checkpoint_id=f"{root}/{name}", process_group=group)


def test_at_every_call_of_either_rank(tmp_path: Path) -> None:
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


def _older(rank: int, root: str) -> list[Call]:
    for pair in range(len(STOPS)):
        h.save({"w": OLD - 1}, checkpoint_id=f"{root}/{pair}")
    return calls_of(lambda: h.save({"w": OLD - 1}, checkpoint_id=f"{root}/0"))


def _stopped_and_woken(rank: int, root: str, numbers: list[int]) -> None:
    pair, role = divmod(rank, 2)
    path, pid_file = f"{root}/{pair}", Path(f"{root}/{pair}.pid")
    if role == 0:
        pid_file.write_text(f"{os.getpid()} ")
        at_call(numbers[pair], lambda path: os.kill(os.getpid(), signal.SIGSTOP) or 0)  # type: ignore[func-returns-value]
        if pair <= STOPS.index(("rename", "claim")):
            with pytest.raises(h.CheckpointError, match="has taken it over; this one is not committed"):
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
    (calls,) = run_ranks(_older, 1, str(tmp_path))  # by a process that is gone: its files are nobody's when they are replaced
    vote = len(calls) - calls[::-1].index(("pwrite", "data"))
    # The last such call of a save: claims open and list before any data is written.
    numbers = [len(calls) - 1 - calls[::-1].index(stop) for stop in STOPS]
    assert min(numbers) > vote
    run_ranks(_stopped_and_woken, 2 * len(STOPS), str(tmp_path), numbers)
    for pair, stop in enumerate(STOPS):
        assert torch.equal(loaded(tmp_path / str(pair)), OLD + 1), stop
        assert len(os.listdir(tmp_path / str(pair))) == 2, stop
