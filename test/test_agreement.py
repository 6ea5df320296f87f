"""The ranks' exchanges: payloads of any length, failures that reach every rank, peers that die or
stop."""

import datetime
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt.common.agreement import Agreement, agreement_of
from torch_hsdp_ckpt.common.meeting import meet_at
from torch_hsdp_ckpt.hsdp.own_groups import GroupRequest, meet


def _fail(error: BaseException) -> bytes:
    raise error


def _exchanges(rank: int) -> None:
    agreement = agreement_of(None, "save")
    assert agreement is agreement_of(dist.group.WORLD, "save")
    assert agreement is not agreement_of(None, "load")
    assert agreement.is_coordinator == (rank == 0)
    for length in (0, 16, 119, 120, 1000):
        payloads = [bytes([r]) * (length + r % 2) for r in range(4)]
        assert agreement.exchange("step", payloads[rank]) == payloads
    for length in (0, 1, 1000):
        payloads = [bytes([r]) * (length * r) for r in range(4)]
        assert agreement.gather("step", payloads[rank]) == (payloads if rank == 0 else [])
        assert agreement.scatter("step", payloads if rank == 0 else []) == payloads[rank]
    with torch.device("meta"):  # where a script's tensors are made is not where messages are
        assert agreement.exchange("step", bytes([rank])) == [b"\0", b"\1", b"\2", b"\3"]
        assert agreement.scatter("step", payloads if rank == 0 else []) == payloads[rank]
        assert agreement.start_min(5 + rank)() == 5
    assert agreement.run("step", lambda: bytes([rank])) == [b"\0", b"\1", b"\2", b"\3"]
    for length in (0, 119, 120, 10000):
        assert agreement.verdict("commit", lambda n=length: b"v" * n) == b"v" * length  # type: ignore[misc]

    with pytest.raises(OSError, match=r"disk on fire .rank 2, step 'write'.") as full:
        agreement.run(
            "write", lambda: _fail(OSError(28, "disk on fire", "/some/file")) if rank == 2 else b""
        )
    assert (full.value.errno, full.value.filename) == (28, "/some/file")
    assert (full.value.__cause__ is not None) == (rank == 2)
    with pytest.raises(h.CorruptCheckpointError, match="rank 1: bad record; rank 3: KeyError: 'w'"):
        errors: dict[int, Exception] = {1: h.CorruptCheckpointError("bad record"), 3: KeyError("w")}
        agreement.exchange("read", error=errors.get(rank))
    with pytest.raises(h.CheckpointError, match="rank 0: ValueError: " + "x" * 4000 + "$"):
        agreement.verdict("commit", lambda: _fail(ValueError("x" * 5000)))
    with pytest.raises(KeyboardInterrupt if rank == 3 else h.CheckpointError):
        agreement.run("write", lambda: _fail(KeyboardInterrupt()) if rank == 3 else b"")
    assert len(agreement.exchange("after failures", b"!")) == 4

    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    half = agreement_of(halves[rank // 2], "save")
    assert half.exchange("half", bytes([rank])) == [
        bytes([rank // 2 * 2]),
        bytes([rank // 2 * 2 + 1]),
    ]
    if rank < 2:  # calls that only one half makes do not disturb what all make later
        odd = dist.new_group([0, 1], use_local_synchronization=True)
        assert len(agreement_of(odd, "save").exchange("odd")) == 2
    else:
        with pytest.raises(h.CheckpointError, match="not in the process group"):
            agreement_of(halves[0], "save")
    assert len(agreement_of(None, "other").exchange("all")) == 4


def test_payloads_failures_and_groups() -> None:
    run_ranks(_exchanges, 4)


def _lost_peer(rank: int, how: str, pids: str) -> None:
    group = dist.new_group(timeout=datetime.timedelta(seconds=2))
    agreement = agreement_of(group, "save")
    (Path(pids) / str(rank)).write_text(str(os.getpid()))
    agreement.exchange("together")
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL if how == "dies" else signal.SIGSTOP)
    with pytest.raises(h.CheckpointError, match=r"step 'write': rank . gets no answer"):
        agreement.exchange("write")
    with pytest.raises(h.CheckpointError, match="lost its peers"):
        agreement.exchange("again")
    if how == "stops":
        (Path(pids) / f"done{rank}").touch()
        if rank == 0:
            while not (Path(pids) / "done1").exists():  # both are through with it
                time.sleep(0.01)
            os.kill(int((Path(pids) / "2").read_text()), signal.SIGCONT)


@pytest.mark.parametrize("how", ["dies", "stops"])
def test_a_lost_peer_is_an_error_within_the_timeout(tmp_path: Path, how: str) -> None:
    run_ranks(_lost_peer, 3, how, str(tmp_path), allow_death=(2,) if how == "dies" else ())


def _life(rank: int, store: str, path: str, life: int) -> None:
    """One of several sets of processes that torchrun starts one after another over one store. The
    default group stands for NCCL's, which leaves no addresses there."""
    from torch.testing._internal.distributed import fake_pg  # noqa: F401 (registers the backend)

    dist.barrier()  # who closes a connection that a peer is still making fails the peer
    dist.destroy_process_group()
    # Each agent counts what it has restarted itself: only rank 0's has seen its process fail.
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(life if rank == 0 else 0)
    dist.init_process_group(
        "fake",
        store=dist.FileStore(store, 99),  # which no life deletes at its end
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=20),
    )
    state = {"w": torch.zeros(3)}
    with h.CheckpointManager(path) as manager:
        assert manager.restore_latest(state) == (life or None)
        manager.save(life + 1, {"w": torch.full((3,), life + 1.0)})
        assert manager.restore_latest(state) == life + 1
    assert state["w"].tolist() == [life + 1.0] * 3
    request = GroupRequest("test", (0, 1), datetime.timedelta(seconds=20))
    group = meet(request, None)
    assert meet(request, group) is group
    another = meet(request, group if rank == 0 else None)  # and kept, as a model keeps it
    assert another.name != group.name
    if life == 0:  # ends while it waits for the other
        missing = ("ranks [1]", "rank 0")[rank]
        with pytest.raises(RuntimeError, match=re.escape(f"has waited 0.2 s for {missing}")):
            meet_at(f"half {rank}", rank, 2, datetime.timedelta(seconds=0.2))
        return
    names = [meet_at(f"half {half}", rank, 2, request.timeout)[0] for half in range(2)]
    agreement = agreement_of(None, "names")
    assert agreement.exchange("names", "/".join(names).encode()) == ["/".join(names).encode()] * 2


def test_the_ranks_meet_again_over_the_store_of_the_life_before(tmp_path: Path) -> None:
    for life in range(2):
        run_ranks(_life, 2, str(tmp_path / "store"), str(tmp_path / "run"), life)
    assert sorted(os.listdir(tmp_path / "run")) == ["step-000001", "step-000002"]


def test_alone_it_needs_no_group() -> None:
    alone: Agreement = agreement_of(None, "save", no_dist=True)
    assert alone.run("step", lambda: b"x") == [b"x"]
    assert alone.verdict("step", lambda: b"y" * 100) == b"y" * 100
    error: Any = ValueError("mine")
    for call in (alone.run, alone.verdict):
        with pytest.raises(h.CheckpointError, match="ValueError: mine") as caught:
            call("step", lambda: _fail(error))
        assert caught.value.__cause__ is error
    with pytest.raises(h.CheckpointError, match="ValueError: mine"):
        alone.exchange("step", error=error)
