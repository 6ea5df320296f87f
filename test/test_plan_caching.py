"""``DefaultSavePlanner(enable_plan_caching=True)``: each checkpoint is what was saved, whichever
writers, directories and failures come one after another in a process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import run_ranks
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from training import mesh_of

import torch_hsdp_ckpt as h


def _state(step: int) -> dict[str, Any]:
    """Values that change; objects that grow; shapes that change once."""
    rows = 8 if step < 3 else 13
    w = distribute_tensor(
        torch.full((rows, 2), float(step)), mesh_of((2, 2)), [Replicate(), Shard(0)]
    )
    return {"w": w, "o": "x" * 10**step, "t": torch.full((3,), float(step)), "n": step}


def _planner() -> DefaultSavePlanner:
    return DefaultSavePlanner(enable_plan_caching=True)


Save = Callable[[dict[str, Any], str], Any]


def _by_dcp(writer: type, **options: Any) -> Save:
    return lambda state, path: dcp.save(
        state, storage_writer=writer(path, **options), planner=_planner()
    )


def _by_asynchronous_dcp(state: dict[str, Any], path: str) -> None:
    dcp.async_save(state, storage_writer=h.FileSystemWriter(path), planner=_planner()).result()


def _by_package(state: dict[str, Any], path: str) -> None:
    h.save(state, checkpoint_id=path, planner=_planner())


OURS = _by_dcp(h.FileSystemWriter)
TORCHS = _by_dcp(dcp.FileSystemWriter)
FILE_EACH = _by_dcp(h.FileSystemWriter, single_file_per_rank=False)
# The saves of a run, one after another.
RUNS: dict[str, list[Save]] = {
    "ours": [OURS] * 5,
    "torch's, then ours": [TORCHS, OURS, TORCHS, OURS, OURS],
    "ours, then torch's": [OURS, TORCHS, OURS, TORCHS, TORCHS],
    "asynchronous": [TORCHS, *[_by_asynchronous_dcp] * 4],
    "by the package": [OURS, _by_package, TORCHS, _by_package, OURS],
    "a file each": [OURS, FILE_EACH, TORCHS, FILE_EACH, OURS],
}


def _check(step: int, path: str) -> None:
    state = _state(step)
    like = {"w": torch.zeros_like(state["w"]), "o": "", "t": torch.zeros(3), "n": -1}
    h.load(like, checkpoint_id=path)
    assert torch.equal(like["w"].to_local(), state["w"].to_local())
    assert torch.equal(like["t"], state["t"])
    assert (like["o"], like["n"]) == (state["o"], state["n"])
    assert h.verify(path).ok
    dist.barrier()


def _run(rank: int, root: str, name: str, same_directory: bool) -> None:
    for step, save in enumerate(RUNS[name]):
        path = f"{root}/{'one' if same_directory else step}"
        save(_state(step), path)
        dist.barrier()
        _check(step, path)


@pytest.mark.parametrize("name", RUNS)
def test_each_checkpoint_is_what_was_saved(name: str, tmp_path: Path) -> None:
    run_ranks(_run, 4, str(tmp_path), name, False)


@pytest.mark.parametrize("name", ["ours", "by the package"])
def test_saves_into_one_directory(name: str, tmp_path: Path) -> None:
    run_ranks(_run, 4, str(tmp_path), name, True)


def _a_save_fails(rank: int, root: str) -> None:
    for step in range(4):
        if step == 2:
            bad = {**_state(step), "bad": torch.zeros(2, device="meta")}
            with pytest.raises(CheckpointException, match="meta device"):
                OURS(bad, f"{root}/{step}")
        OURS(_state(step), f"{root}/{step}")
        _check(step, f"{root}/{step}")


def test_a_failed_save_leaves_no_plan_behind(tmp_path: Path) -> None:
    run_ranks(_a_save_fails, 4, str(tmp_path))


def test_without_coordination(tmp_path: Path) -> None:
    """Each save's files have names of their own, though the plan that torch keeps is the first
    one's."""
    for step in range(3):
        dcp.save(
            {"t": torch.full((3,), float(step))},
            storage_writer=h.FileSystemWriter(tmp_path),
            planner=_planner(),
            no_dist=True,
        )
        like = {"t": torch.zeros(3)}
        h.load(like, checkpoint_id=tmp_path, no_dist=True)
        assert like["t"].unique().item() == step
    assert len(list(tmp_path.glob("*.distcp"))) == 1
