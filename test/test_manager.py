"""CheckpointManager: which checkpoints are made, kept, deleted and gone on from, and what SIGTERM
does."""

import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import batch, even_net
from ranks import run_ranks
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from training import loss_of, wrap

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt import _C
from torch_hsdp_ckpt.training import run_directory as _checkpoints


class Counter:
    """A Stateful object: counts what is asked of it."""

    def __init__(self) -> None:
        self.value, self.loads = 0, 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.loads = state["value"], self.loads + 1


def _state(value: int) -> dict[str, Any]:
    counter = Counter()
    counter.value = value
    return {
        "weight": torch.full((300_000,), float(value)),
        "counter": counter,
        "note": f"step {value}",
    }


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _data_file(checkpoint: Path) -> Path:
    return next(checkpoint.glob("__*.distcp"))


def _steps_there(root: Path) -> list[str]:
    return sorted(name for name in os.listdir(root) if not name.startswith(".manager"))


def test_saves_when_due_and_keeps_the_newest_and_every_nth(tmp_path: Path) -> None:
    manager = h.CheckpointManager(tmp_path / "run", save_every=2, keep_last=2, keep_every=6)
    made = []
    for step in range(1, 14):
        assert manager.save(step, lambda step=step: made.append(step) or _state(step)) == (
            step % 2 == 0
        )  # type: ignore[misc]
    assert made == [2, 4, 6, 8, 10, 12]
    assert manager.steps() == [6, 10, 12]
    assert not manager.save(12, _state(0))  # twice is once
    target = _state(0)
    assert manager.restore_latest(target) == 12
    assert target["weight"].unique().tolist() == [12.0]
    assert (target["counter"].value, target["counter"].loads, target["note"]) == (12, 1, "step 12")
    for arguments in ({"save_every": 0}, {"keep_last": 0}, {"keep_every": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be at least 1, got 0"):
            h.CheckpointManager(tmp_path, **arguments)
    for limit, asynchronous, says in (
        (-1, True, "0 or more"),
        (-1, False, "0 or more"),
        (0, False, "asynchronous=True"),
    ):
        with pytest.raises(ValueError, match=f"max_staging_bytes={limit}: .*{says}"):
            h.CheckpointManager(tmp_path, asynchronous=asynchronous, max_staging_bytes=limit)


def test_an_asynchronous_save_asks_stateful_objects_in_the_call(tmp_path: Path) -> None:
    with h.CheckpointManager(tmp_path, asynchronous=True) as manager:
        state = _state(1)
        for step in (1, 2):
            state["counter"].value = 10 * step
            assert manager.save(step, state)
            state["counter"].value = -1
    target = _state(0)
    for step in (2, 1):
        assert manager.restore_latest(target) == step
        assert (target["counter"].value, target["counter"].loads) == (10 * step, 3 - step)
        (tmp_path / f"step-{step:06d}" / ".metadata").unlink()


def test_goes_on_from_the_newest_good_one_and_says_what_it_skips(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manager = h.CheckpointManager(tmp_path, keep_last=9)
    assert manager.restore_latest(_state(0)) is None
    for step in range(1, 7):
        manager.save(step, _state(step))
    (tmp_path / "step-000006" / ".metadata").unlink()
    _flip(_data_file(tmp_path / "step-000005"))
    _data_file(tmp_path / "step-000004").unlink()
    _flip(tmp_path / "step-000003" / ".metadata")
    target = _state(0)
    with caplog.at_level(logging.WARNING, "torch_hsdp_ckpt"):
        assert manager.restore_latest(target) == 2
    assert target["weight"].unique().tolist() == [2.0]
    assert (target["counter"].value, target["counter"].loads, target["note"]) == (2, 1, "step 2")
    for step, says in (
        (6, "did not come to an end"),
        (5, "damaged"),
        (4, "No such file"),
        (3, "checksum"),
    ):
        assert [m for m in caplog.messages if f"step-{step:06d}" in m and says in m], (
            step,
            caplog.messages,
        )

    with pytest.raises(h.CheckpointError, match="weight"):  # a state that does not fit is no damage
        manager.restore_latest({**_state(0), "weight": torch.zeros(7)})
    for step in (1, 2):
        _flip(_data_file(tmp_path / f"step-{step:06d}"))
    with pytest.raises(
        h.CheckpointError,
        match=r"none of the committed checkpoints .steps \[1, 2, 3, 4, 5\]. can be read",
    ):
        manager.restore_latest(_state(0))


def test_a_damaged_newest_checkpoint_does_not_push_out_the_good_ones(tmp_path: Path) -> None:
    first = h.CheckpointManager(tmp_path, keep_last=1)
    for step in (10, 20):
        first.save(step, _state(step))
    assert first.steps() == [20]
    keeper = h.CheckpointManager(tmp_path, keep_last=2)
    keeper.save(30, _state(30))
    _flip(_data_file(tmp_path / "step-000030"))  # found out by its checksums only
    second = h.CheckpointManager(tmp_path, keep_last=1)
    target = _state(0)
    assert second.restore_latest(target) == 20
    second.save(21, _state(21))
    assert second.steps() == [21]  # saved after the damaged one
    _flip(_data_file(tmp_path / "step-000021"))
    assert h.CheckpointManager(tmp_path).root == tmp_path
    assert second.save(30, _state(31))
    assert second.steps() == [30]
    assert h.CheckpointManager(tmp_path).restore_latest(target) == 30
    assert target["note"] == "step 31"


def test_metadata_is_gone_for_good_before_any_data_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every state that a crash in a delete can leave is either complete or plainly incomplete, and
    the next prune ends it."""
    manager = h.CheckpointManager(tmp_path, keep_last=1)
    manager.save(1, _state(1))
    order: list[str] = []
    unlink, sync = Path.unlink, _C.sync_directory

    def seen_sync(path: bytes) -> None:
        files = Path(os.fsdecode(path)).iterdir()
        order.append("sync " + ",".join(sorted(p.suffix or p.name for p in files)))
        sync(path)

    def seen_unlink(path: Path, missing_ok: bool = False) -> None:
        order.append(f"unlink {path.suffix or path.name}")
        if path.suffix == ".distcp":
            raise OSError(5, "died here", str(path))
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(_checkpoints._C, "sync_directory", seen_sync)
        patch.setattr(Path, "unlink", seen_unlink)
        with pytest.raises(OSError, match="died here"):
            _checkpoints.remove(tmp_path / "step-000001")
    assert order == ["unlink .metadata", "sync .distcp", "unlink .distcp"]
    assert manager.restore_latest(_state(0)) is None
    manager.save(2, _state(2))
    assert _steps_there(tmp_path) == ["step-000002"]


def test_what_a_link_leads_to_is_not_deleted(tmp_path: Path) -> None:
    """Somebody has moved a checkpoint to another disk; and other things lie in the root."""
    manager = h.CheckpointManager(tmp_path / "run", keep_last=1)
    manager.save(1, _state(1))
    (tmp_path / "run" / "step-000001").rename(tmp_path / "archive")
    (tmp_path / "run" / "step-000001").symlink_to(tmp_path / "archive")
    for name in ("step-1", "step-0000002", "step-000003x", "notes"):
        (tmp_path / "run" / name).mkdir()
    (tmp_path / "run" / "step-000004").write_text("a file")
    assert manager.steps() == [1]
    target = _state(0)
    assert manager.restore_latest(target) == 1
    manager.save(5, _state(5))
    assert manager.steps() == [5]
    left = ["notes", "step-000003x", "step-000004", "step-0000002", "step-000005", "step-1"]
    assert _steps_there(tmp_path / "run") == sorted(left)
    h.load(target, checkpoint_id=tmp_path / "archive")
    assert target["note"] == "step 1"


def _run(rank: int, root: Path, asynchronous: bool) -> None:
    shape = (2, 2)
    model = wrap(even_net(), shape)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    net = even_net()

    def state() -> dict[str, Any]:
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optim": moments}

    def train(step: int) -> float:
        loss = loss_of(model, batch(net, step, rank))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    manager = h.CheckpointManager(root, save_every=3, keep_last=2, asynchronous=asynchronous)
    losses = {}
    for step in range(1, 11):
        losses[step] = train(step)
        manager.save(step, state)
    manager.close()
    dist.barrier()
    assert manager.steps() == [6, 9]
    dist.barrier()
    if rank == 0:
        _flip(_data_file(root / "step-000009"))
    dist.barrier()
    saved = state()
    assert manager.restore_latest(saved) == 6
    set_state_dict(
        model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optim"]
    )
    assert [train(step) for step in range(7, 11)] == [losses[step] for step in range(7, 11)]

    # SIGTERM reaches one rank before it calls, another later: all save at one step, and only once.
    before: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: before.append(number))
    with h.CheckpointManager(
        root, save_every=1000, sigterm_deadline=60.0, asynchronous=asynchronous
    ) as manager:
        saves = []
        for step in range(11, 16):
            if rank == 2 and step == 12:
                os.kill(os.getpid(), signal.SIGTERM)
            if rank == 0 and step == 13:
                os.kill(os.getpid(), signal.SIGTERM)
            saves += [step] if manager.save(step, state) else []
        assert manager.preempted
        assert saves == [13]
    assert before == ([signal.SIGTERM] if rank in (0, 2) else [])
    assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, None)
    dist.barrier()
    assert 13 in manager.steps()

    # A deadline that has passed: nothing is begun, on any rank.
    with h.CheckpointManager(
        root, save_every=1000, sigterm_deadline=0.05, asynchronous=asynchronous
    ) as manager:
        if rank == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        assert [manager.save(step, state) for step in (21, 22, 23)] == [False] * 3
        assert manager.preempted
    assert 22 not in manager.steps()

    # What fails in the background is raised by the next save that is due, or by close, on every
    # rank.
    if asynchronous:
        manager = h.CheckpointManager(root / "failing", asynchronous=True)
        manager.save(1, state)
        manager.close()
        if rank == 2:
            _C._inject_fault(
                lambda op, path: -28 if op == "fsync" and path.endswith(".distcp") else 0
            )
        manager.save(2, state)
        with pytest.raises(OSError, match="rank 2"):
            manager.close()
        _C._inject_fault(None)
        manager.save(2, state)
        manager.close()
        dist.barrier()
        assert manager.steps() == [1, 2]
        # With SIGTERM the last step is saved first, since the process is to end.
        with h.CheckpointManager(
            root / "failing", save_every=2, sigterm_deadline=60.0, asynchronous=True
        ) as manager:
            if rank == 2:
                _C._inject_fault(
                    lambda op, path: -28 if op == "fsync" and path.endswith(".distcp") else 0
                )
            assert manager.save(4, state)
            assert manager._in_flight is not None
            assert isinstance(manager._in_flight.exception(60), OSError)
            _C._inject_fault(None)
            if rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            assert not manager.save(5, state)
            with pytest.raises(OSError, match="rank 2"):
                manager.save(7, state)
            assert manager.preempted
            assert manager.steps() == [1, 2, 7]
            assert not manager.save(9, state)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_four_ranks_save_prune_fall_back_and_obey_sigterm(
    tmp_path: Path, asynchronous: bool
) -> None:
    run_ranks(_run, 4, tmp_path, asynchronous)
