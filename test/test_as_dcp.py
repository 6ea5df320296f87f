"""What programs written for DCP do with ``save`` and ``load``: storages by position, planners that
are looked at afterwards, ``except CheckpointException``."""

import errno
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from device import DEVICE
from ranks import run_ranks
from torch import nn
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner
from training import mesh_of

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt import _C


def test_a_storage_by_position(tmp_path: Path) -> None:
    for side in (dcp, h):
        path = tmp_path / side.__name__
        with pytest.warns(FutureWarning if side is h else UserWarning):
            side.save({"a": torch.ones(4)}, side.FileSystemWriter(path))
        target = {"a": torch.zeros(4)}
        with pytest.warns(FutureWarning if side is h else UserWarning):
            side.load(target, side.FileSystemReader(path))
        assert torch.equal(target["a"], torch.ones(4))
    with pytest.raises(TypeError):
        h.save({}, h.FileSystemWriter(tmp_path), None)  # type: ignore[call-arg]


def test_the_planner_has_the_metadata(tmp_path: Path) -> None:
    h.save({"a": torch.ones(4), "b": {"c": 1}}, checkpoint_id=tmp_path)
    found = []
    for side in (dcp, h):
        planner = DefaultLoadPlanner()
        side.load({"a": torch.zeros(4)}, checkpoint_id=tmp_path, planner=planner)
        found.append(planner.metadata)
    theirs, ours = found
    assert list(ours.state_dict_metadata) == ["a", "b.c"]
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert pickle.loads(pickle.dumps(ours)).planner_data == theirs.planner_data


class _Refuses:
    def state_dict(self) -> dict[str, Any]:
        raise KeyError("mine")

    def load_state_dict(self, state: Any) -> None: ...


def _fails(path: Path) -> None:
    """Every failure is one of three classes, and DCP's."""
    with pytest.raises(CheckpointException) as missing:
        h.load({"a": torch.zeros(4)}, checkpoint_id=path / "none")
    assert isinstance(missing.value, FileNotFoundError)
    assert missing.value.errno == errno.ENOENT
    h.save({"a": torch.ones(4)}, checkpoint_id=path / "c")
    with pytest.raises(CheckpointException, match="Missing key") as key:
        h.load({"b": torch.zeros(4)}, checkpoint_id=path / "c")
    assert isinstance(key.value, h.CheckpointError)
    assert "Missing key" in str(key.value.failures[0][0])
    with pytest.raises(h.CheckpointError, match=r"KeyError: 'mine'") as refused:
        h.save({"s": _Refuses()}, checkpoint_id=path / "c")
    assert isinstance(refused.value, CheckpointException)
    with pytest.raises(h.CheckpointError, match="pickle"):
        h.save({"o": (x for x in ())}, checkpoint_id=path / "c")
    _C._inject_fault(lambda op, path: -errno.EACCES if op == "pwrite" else 0)
    try:
        with pytest.raises(PermissionError) as denied:
            h.save({"a": torch.ones(4)}, checkpoint_id=path / "c")
    finally:
        _C._inject_fault(None)
    assert isinstance(denied.value, CheckpointException)
    assert denied.value.filename is not None
    again = pickle.loads(pickle.dumps(denied.value))
    assert (type(again), again.errno) == (type(denied.value), errno.EACCES)

    class Planner(dcp.DefaultSavePlanner):
        def create_local_plan(self) -> Any:
            raise ValueError("no plan")

    # DCP plans these, and raises what is no Exception.
    with pytest.raises(h.CheckpointError, match="no plan"):
        h.save({"a": torch.ones(4)}, checkpoint_id=path / "c", planner=Planner())


def _fails_on_ranks(rank: int, path: str) -> None:
    _fails(Path(path))


def test_what_is_raised(tmp_path: Path) -> None:
    _fails(tmp_path / "alone")
    (tmp_path / "two").mkdir()
    run_ranks(_fails_on_ranks, 2, str(tmp_path / "two"))


def test_what_a_save_returns_is_short_on_the_screen(tmp_path: Path) -> None:
    saved = h.save({f"w{i}": torch.ones(1) for i in range(500)}, checkpoint_id=tmp_path)
    assert len(str(saved)) < 400
    assert len(repr(saved)) < 400
    assert str(tmp_path) in str(saved)
    assert len(saved.state_dict_metadata) == 500


def _ignored(rank: int) -> None:
    for side in (torch.distributed.fsdp.FullyShardedDataParallel, h.FullyShardedDataParallel):
        module = nn.Linear(4, 4)
        with pytest.warns(UserWarning, match="ignore"):
            wrapped = side(
                module, ignored_modules=[module], device_id=DEVICE, device_mesh=mesh_of((2,))
            )
        wrapped(torch.ones(2, 4)).sum().backward()
        assert module.weight.grad is not None
        assert type(module.weight) is nn.Parameter


def test_the_wrapped_module_itself_may_be_ignored() -> None:
    run_ranks(_ignored, 2)
