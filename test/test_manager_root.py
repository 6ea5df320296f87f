"""A manager's root: what in it is the run's, in which order its checkpoints came, which job saves
there, and what killed saves leave."""

import errno
import logging
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from forks import in_child, small_state

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt import _C
from torch_hsdp_ckpt.training import run_directory


def _steps(root: Path) -> list[str]:
    return sorted(name for name in os.listdir(root) if not name.startswith(".manager"))


def _save(root: Path, *steps: int, keep_last: int = 9) -> None:
    with h.CheckpointManager(root, keep_last=keep_last) as manager:
        for step in steps:
            manager.save(step, small_state(step))


def _restored(root: Path, **options: Any) -> tuple[int | None, int]:
    """The step that is restored, and the value in it."""
    state = small_state(0)
    with h.CheckpointManager(root, **options) as manager:
        return manager.restore_latest(state), state["value"]


def _die_at_the_first_synced_data_file() -> None:
    def kill(op: str, path: str) -> int:
        if op == "fsync" and path.endswith(".distcp"):
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    _C._inject_fault(kill)


def _killed_save(root: Path, step: int) -> None:
    _die_at_the_first_synced_data_file()
    _save(root, step)


def _leave_root_claimed(root: Path, step: int) -> None:
    """A job that ends without a word."""
    manager = h.CheckpointManager(root)
    manager.save(step, small_state(step))
    os._exit(0)


# ---- what is the run's


def test_only_what_the_run_has_saved_is_ever_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "run"
    for step in (100, 200):
        (root / f"step-{step:06d}").mkdir(parents=True)
        torch.save(small_state(0), root / f"step-{step:06d}" / "model.pt")
    h.save(small_state(0), checkpoint_id=root / "step-000300")
    dcp.save(small_state(0), checkpoint_id=root / "step-000400", no_dist=True)
    h.save(small_state(0), checkpoint_id=root / "step-000500", use_collectives=False)
    (root / "step-000600").mkdir()
    _save(tmp_path / "other", 700)
    _save(root, 1000)
    shutil.copytree(tmp_path / "other" / "step-000700", root / "step-000700")
    foreign = [f"step-000{hundreds}00" for hundreds in range(1, 8)]
    caplog.clear()  # each manager says it once
    with caplog.at_level(logging.WARNING, "torch_hsdp_ckpt"):
        with h.CheckpointManager(root, keep_last=1) as manager:
            state = small_state(0)
            # By the order of commits, the copy and this run's first one came first.
            assert manager.restore_latest(state) == 1000
            for step in (1100, 1200):
                manager.save(step, small_state(step))
            assert manager.steps() == [300, 400, 700, 1200]
    assert _steps(root) == [*foreign, "step-001200"]
    said = [line for line in caplog.messages if "not saved by this run's manager" in line]
    for name in foreign:
        if name != "step-000600":  # of nothing there is nothing to say
            assert sum(name in line for line in said) == 1, (name, said)


def test_what_somebody_has_put_into_a_checkpoint_stays(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    (tmp_path / "step-000001" / "notes.txt").write_text("mine")
    _save(tmp_path, 2, 3, keep_last=1)
    assert os.listdir(tmp_path / "step-000001") == ["notes.txt"]
    assert _steps(tmp_path) == ["step-000001", "step-000003"]


# ---- the order of commits


def test_after_going_back_the_new_branch_is_kept_and_restored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with h.CheckpointManager(tmp_path, keep_last=3, keep_every=500) as manager:
        for step in range(100, 1001, 100):
            manager.save(step, small_state(step))
    with h.CheckpointManager(tmp_path, keep_last=3, keep_every=500) as manager:
        with caplog.at_level(logging.WARNING, "torch_hsdp_ckpt"):
            for step in (600, 650, 700, 750):
                manager.save(step, small_state(-step))
                assert step in manager.steps(), "what was saved last is there"
        assert manager.steps() == [500, 650, 700, 750, 1000]
    (said,) = [line for line in caplog.messages if "newer by number only" in line]
    assert "step 600 is saved" in said and "steps [800, 900, 1000]" in said
    caplog.clear()
    with caplog.at_level(logging.WARNING, "torch_hsdp_ckpt"):
        assert _restored(tmp_path) == (750, -750)
    assert any("steps [1000] are newer by number only" in line for line in caplog.messages)
    # A step of the left branch that is saved over is the newest.
    _save(tmp_path, 1000)
    assert _restored(tmp_path) == (1000, 1000)


def test_checkpoints_without_a_mark_come_before_all_others(tmp_path: Path) -> None:
    for step in (20, 10):
        h.save(small_state(step), checkpoint_id=tmp_path / f"step-{step:06d}")
    assert _restored(tmp_path) == (20, 20)
    _save(tmp_path, 5)
    assert _restored(tmp_path) == (5, 5)


def test_a_checkpoint_saved_by_hand_after_all_others_is_the_newest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _save(tmp_path, 1, 2)
    by_hand = tmp_path / "step-000005"
    h.save(small_state(5), checkpoint_id=by_hand)
    os.utime(by_hand / ".metadata", (time.time() + 1,) * 2)
    with caplog.at_level(logging.WARNING, "torch_hsdp_ckpt"):
        assert _restored(tmp_path) == (5, 5)
    assert any("step 5 comes first: no manager has saved it" in line for line in caplog.messages)
    _save(tmp_path, 6)  # goes on with the run's numbers
    assert [_C.read_run_mark(str(tmp_path / f"step-{n:06d}"))[1] for n in (1, 2, 6)] == [1, 2, 3]  # type: ignore[index]
    os.utime(tmp_path / "step-000006" / ".metadata", (time.time() + 2,) * 2)
    assert _restored(tmp_path) == (6, 6)


def test_stock_torch_reads_a_checkpoint_with_a_mark(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    assert _C.read_run_mark(str(tmp_path / "step-000001"))[1] == 1  # type: ignore[index]
    state = small_state(0)
    dcp.load(state, checkpoint_id=tmp_path / "step-000001", no_dist=True)
    assert torch.equal(state["w"], small_state(1)["w"])
    assert h.verify(tmp_path / "step-000001").ok


def test_names_that_are_not_utf_8(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = Path(os.fsdecode(bytes(tmp_path) + b"/run\xff"))
    _save(root, 1)
    notes = os.fsdecode(b"notes\xff")
    (root / "step-000001" / notes).write_text("mine")
    (root / os.fsdecode(b".manager.metadata\xff.tmp")).write_text("somebody's")
    (root / "step-000009").mkdir()
    (root / "step-000009" / notes).write_text("mine")
    _save(root, 2, 3, keep_last=1)
    assert os.listdir(root / "step-000001") == [notes]
    assert _steps(root) == ["step-000001", "step-000003", "step-000009"]
    (old,) = (root / "step-000003").glob("*.distcp")
    old.unlink()
    old.mkdir()  # which can't be removed as a file
    with caplog.at_level(logging.WARNING, "torch_hsdp_ckpt"):
        h.save(small_state(4), checkpoint_id=root / "step-000003")
    assert any("run\\xff" in line and "could not be removed" in line for line in caplog.messages)


# ---- which job saves


def test_of_two_jobs_the_second_is_told_at_its_first_save(tmp_path: Path) -> None:
    first = h.CheckpointManager(tmp_path)
    first.save(1000, small_state(1000))

    def second() -> None:
        with h.CheckpointManager(tmp_path, keep_last=1) as manager:
            assert manager.restore_latest(small_state(0)) == 1000  # reading is nobody's business
            for step in (10, 20):
                with pytest.raises(h.CheckpointError, match="another job, process"):
                    manager.save(step, small_state(step))

    assert in_child(second) == 0
    first.save(1001, small_state(1001))
    assert first.steps() == [1000, 1001]
    first.close()
    assert in_child(lambda: _save(tmp_path, 20)) == 0
    assert _restored(tmp_path) == (20, 20)


def test_a_job_on_another_host_is_taken_over_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody can see whether it runs: a restart in another pod must go on."""
    assert in_child(lambda: _leave_root_claimed(tmp_path, 1), "another") == 0
    first = h.CheckpointManager(tmp_path)
    with caplog.at_level(logging.WARNING, "torch_hsdp_ckpt"):
        first.save(2, small_state(2))
        first.save(3, small_state(3))
    assert sum("has not said that it is done" in line for line in caplog.messages) == 1
    assert in_child(lambda: _leave_root_claimed(tmp_path, 4), "third") == 0
    (claim,) = tmp_path.glob(".manager*")
    with pytest.raises(h.CheckpointError, match="another job has begun to save"):
        first.save(5, small_state(5))
    claim.unlink()
    late = h.CheckpointManager(tmp_path)
    assert in_child(lambda: _leave_root_claimed(tmp_path, 6), "fourth") == 0
    with pytest.raises(h.CheckpointError, match="another job has begun to save"):
        late.save(7, small_state(7))  # a commit that came after it was made


def test_a_job_that_stood_still_does_not_take_its_root_back(tmp_path: Path) -> None:
    """Another one has taken it over meanwhile, and has ended; what it saved would be deleted."""
    stalled = h.CheckpointManager(tmp_path, keep_last=1)
    stalled.save(1, small_state(1))
    with pytest.raises(OSError, match="No space"):
        _C._inject_fault(lambda op, path: -errno.ENOSPC if path.endswith(".distcp") else 0)
        stalled.save(2, small_state(2))  # its number is the one that the other job's first gets
    _C._inject_fault(None)
    assert in_child(lambda: _save(tmp_path, 3), "another") == 0
    assert not list(tmp_path.glob(".manager*"))
    for step in (4, 5):
        with pytest.raises(h.CheckpointError, match="another job has begun to save"):
            stalled.save(step, small_state(step))
    late = h.CheckpointManager(tmp_path)
    late.save(6, small_state(6))  # made since: it has seen what is there
    assert late.steps() == [1, 3, 6]
    with pytest.raises(h.CheckpointError, match="another job has begun to save"):
        stalled.save(7, small_state(7))
    stalled.close()
    late.close()
    unsaved = h.CheckpointManager(tmp_path)
    assert in_child(lambda: _save(tmp_path, 8), "another") == 0
    with pytest.raises(h.CheckpointError, match="another job has begun to save"):
        unsaved.save(9, small_state(9))


def test_another_managers_save_in_flight_is_no_leftover(tmp_path: Path) -> None:
    go_on = threading.Event()

    def wait(op: str, path: str) -> int:
        if op == "fsync" and path.endswith(".distcp"):
            go_on.wait(20)
        return 0

    with h.CheckpointManager(tmp_path, asynchronous=True) as first:
        second = h.CheckpointManager(tmp_path)
        for call in (
            lambda: second.save(2, small_state(2)),
            lambda: second.restore_latest(small_state(0)),
        ):
            go_on.clear()
            _C._inject_fault(wait)
            first.save(len(second.steps()) + 1, small_state(1))
            threading.Timer(0.5, go_on.set).start()
            try:
                outcome = call()
            finally:
                go_on.set()
                _C._inject_fault(None)
        assert (outcome, second.steps()) == (3, [1, 2, 3])
        second.close()


def test_one_process_may_have_many_managers(tmp_path: Path) -> None:
    first, second = h.CheckpointManager(tmp_path), h.CheckpointManager(tmp_path)
    for step in range(1, 7, 2):
        first.save(step, small_state(step))
        second.save(step + 1, small_state(step + 1))
    assert first.steps() == [4, 5, 6]
    second.close()
    first.close()
    assert not list(tmp_path.glob(".manager*"))


# ---- what killed saves leave


def test_leftovers_go_before_the_save_needs_the_room(tmp_path: Path) -> None:
    """Two saves were killed, one removal was interrupted; what they left is gone when the next save
    opens its first data file."""
    root = tmp_path / "run"
    _save(root, 10, 20)
    for step, host in ((30, None), (40, "another")):
        assert in_child(lambda step=step: _killed_save(root, step), host) == -signal.SIGKILL  # type: ignore[misc]
        assert list((root / f"step-{step:06d}").glob("*.distcp"))
    assert in_child(lambda: _save(root, 50)) == 0
    (root / "step-000050" / ".metadata").unlink()
    seen: list[list[str]] = []

    def look(op: str, path: str) -> int:
        if op == "open" and path.endswith(".distcp"):
            seen.append(_steps(root))
        return 0

    with h.CheckpointManager(root) as manager:
        assert manager.restore_latest(small_state(0)) == 20
        _C._inject_fault(look)
        manager.save(60, small_state(60))
        _C._inject_fault(None)
    assert seen[0] == ["step-000010", "step-000020", "step-000060"]


def test_what_a_job_that_was_killed_had_still_to_delete_goes_first(tmp_path: Path) -> None:
    _save(tmp_path, 10, 20, 30)  # as by a job that keeps two, and was killed behind its last commit
    room = []
    with h.CheckpointManager(tmp_path, keep_last=2) as manager:
        assert manager.restore_latest(small_state(0)) == 30
        assert manager.steps() == [10, 20, 30]
        _C._inject_fault(lambda op, path: room.append(_steps(tmp_path)) or 0)  # type: ignore[func-returns-value]
        manager.save(40, small_state(40))
        _C._inject_fault(None)
        assert manager.steps() == [30, 40]
    assert ["step-000020", "step-000030", "step-000040"] in room
    assert not any({"step-000010", "step-000040"} <= set(steps) for steps in room)


def test_leftovers_in_one_directory_do_not_pile_up(tmp_path: Path) -> None:
    """Of saves into one checkpoint, on hosts of other names too."""
    for host in (None, "another"):
        path = tmp_path / f"checkpoint-{host}"
        h.save(small_state(0), checkpoint_id=path)
        for value in range(3):

            def killed(path: Path = path, value: int = value) -> None:
                _die_at_the_first_synced_data_file()
                h.save(small_state(value), checkpoint_id=path)

            assert in_child(killed, host) == -signal.SIGKILL
            assert h.verify(path).ok and len(h.verify(path).leftovers) == 1, value
        h.save(small_state(5), checkpoint_id=path)
        assert len(os.listdir(path)) == 2


# ---- what the system says


@pytest.mark.parametrize(
    ("number", "is_damage"),
    [
        (errno.EIO, True),
        (errno.ENODATA, True),
        (errno.EUCLEAN, True),
        (errno.EBADMSG, True),
        (errno.EACCES, False),
        (errno.ETIMEDOUT, False),
        (errno.ESTALE, False),
        (errno.ENOMEM, False),
        (errno.EMFILE, False),
    ],
)
def test_only_damage_passes_over_a_checkpoint(tmp_path: Path, number: int, is_damage: bool) -> None:
    _save(tmp_path, 1, 2)
    for name in (".metadata", ".distcp"):
        manager = h.CheckpointManager(tmp_path)
        _C._inject_fault(
            lambda op, path, name=name: (  # type: ignore[misc]
                -number if op == "open" and "step-000002" in path and path.endswith(name) else 0
            )
        )
        try:
            if is_damage:
                assert manager.restore_latest(small_state(0)) == 1
            else:
                with pytest.raises(OSError, match="step-000002") as caught:
                    manager.restore_latest(small_state(0))
                assert caught.value.errno == number
        finally:
            _C._inject_fault(None)
    assert run_directory.is_damage(OSError(number, "")) is is_damage


def test_a_checkpoint_that_breaks_while_it_is_looked_at_stops_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def truncate(op: str, path: str) -> int:
        if op == "pread" and path.endswith("step-000001/.metadata"):
            os.truncate(path, 10)
        return 0

    with h.CheckpointManager(tmp_path, keep_last=1) as manager:
        manager.save(1, small_state(1))
        _C._inject_fault(truncate)
        try:
            manager.save(2, small_state(2))
        finally:
            _C._inject_fault(None)
        assert manager.steps() == [1, 2]  # what can't be told to be the run's stays

        def broken(*arguments: Any) -> None:
            raise TypeError("a defect of the deletion")

        monkeypatch.setattr(run_directory, "prune", broken)
        with caplog.at_level(logging.WARNING, "torch_hsdp_ckpt"):
            assert manager.save(3, small_state(3))
    assert any("step 3 is saved" in line and "a defect" in line for line in caplog.messages)


def test_a_link_that_is_not_followed_is_no_damage(tmp_path: Path) -> None:
    """What it leads to may be as good as new: falling back would lose the steps since."""
    _save(tmp_path / "run", 1, 2)
    metadata = tmp_path / "run" / "step-000002" / ".metadata"
    metadata.rename(tmp_path / "moved")
    metadata.symlink_to(tmp_path / "moved")
    with h.CheckpointManager(tmp_path / "run") as manager:
        with pytest.raises(OSError, match="step-000002") as caught:
            manager.restore_latest(small_state(0))
    assert caught.value.errno == errno.ELOOP


def test_a_root_that_cant_be_written_is_found_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        h.CheckpointManager(tmp_path / "file" / "run")
    _save(tmp_path / "run", 1)
    monkeypatch.setattr(os, "access", lambda path, mode, effective_ids: False)
    with pytest.raises(PermissionError, match=str(tmp_path)):
        h.CheckpointManager(tmp_path / "new" / "run")
    with caplog.at_level(logging.WARNING, "torch_hsdp_ckpt"):
        assert _restored(tmp_path / "run") == (1, 1)
    assert any("none be saved" in line for line in caplog.messages)
