"""What ranks hold under one key: of different shapes it is refused, of different values it is one
rank's, the same for all that belongs together."""

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from device import DEVICE
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt.checkpoint.save import capture, plan
from torch_hsdp_ckpt.checkpoint.save.async_save import await_save


@dataclasses.dataclass
class Holder:
    tensor: Any


def _saves(state: dict[str, Any], path: str) -> list[str]:
    """What both ways of saving raise."""
    messages = []
    with pytest.raises(h.CheckpointError) as caught:
        h.save(state, checkpoint_id=path)
    messages.append(str(caught.value))
    future = h.async_save(state, checkpoint_id=path)
    with pytest.raises(h.CheckpointError) as caught:
        await_save(future)
    messages.append(str(caught.value))
    return messages


def _contradicting(rank: int, root: str) -> None:
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    cases: dict[str, Any] = {
        "shape": torch.full((2 + rank // 2,), float(rank)),
        "dtype": torch.zeros(2, dtype=torch.float32 if rank else torch.float64),
        "kind": torch.zeros(2) if rank == 1 else "an object",
        "sharded": DTensor.from_local(torch.zeros(2), mesh, [Shard(0)]) if rank else torch.zeros(8),
    }
    for key, value in cases.items():
        for message in _saves({"w": torch.ones(2), "n": {key: value}}, f"{root}/{key}"):
            assert f"n.{key}: " in message and "on ranks [" in message, message
            assert "keys of its own" in message
    assert "a tensor [2] of float32 on ranks [0, 1]" in _saves({"s": cases["shape"]}, root)[0]
    # A key of two pipeline stages, each of which has tensors of its own besides.
    stages = init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("pp", "shard"))
    stage = stages["pp"].get_local_rank()
    shared = distribute_tensor(torch.full((8,), float(stage)), stages["shard"], [Shard(0)])
    own = distribute_tensor(torch.zeros(4 + stage), stages["shard"], [Shard(0)])
    for message in _saves({"tied": shared, f"own{stage}": own}, f"{root}/stages"):
        assert "tied: a sharded tensor [8] of float32, cut by mesh [1, 2] of [0, 1]" in message
        assert "[0, 1] on ranks [0, 1], a sharded tensor" in message
        assert "cut by mesh [1, 2] of [2, 3] on ranks [2, 3]" in message
    # Shards that no rank of the mesh holds.
    part = DTensor.from_local(torch.ones(2), mesh, [Shard(0)])
    alone = {"n": {"part": part}} if rank else {}
    for message in _saves(alone, f"{root}/part"):
        assert "n.part: no rank of the saving process group holds its shard at [0]" in message
    dist.barrier()
    left = [name for name in os.listdir(root) if os.listdir(f"{root}/{name}")]
    assert not left, "nothing is left of what was refused"


def _held_by_some(rank: int, path: str) -> tuple[list[str], int]:
    """The data files, and how often a plan was made for four saves of one structure."""
    mesh = init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("replicate", "shard"))
    placements = [Replicate(), Shard(0)]
    state: dict[str, Any] = {}
    if rank < 3:  # the last rank has nothing at all, and nothing is lost with it
        state["all"] = distribute_tensor(torch.arange(9.0), mesh, placements, src_data_rank=None)
    if rank == 2:
        state["last"] = {"large": torch.arange(1 << 16), "small": torch.tensor(2), "x": [1, "a"]}
    if rank in (0, 1):
        state["first"] = distribute_tensor(torch.arange(5.0), mesh, placements, src_data_rank=None)
    made: list[int] = []
    make = capture.make_static_plan
    capture.make_static_plan = lambda *a: made.append(1) or make(*a)  # type: ignore[func-returns-value]
    h.save(state, checkpoint_id=path)
    many = h.FileSystemWriter(f"{path}-many", single_file_per_rank=False)
    h.save(state, storage_writer=many)
    made.clear()
    again = plan.make_static_plan
    plan.make_static_plan = lambda *a: made.append(1) or again(*a)  # type: ignore[func-returns-value]
    for _ in range(4):
        h.async_save(state, checkpoint_id=f"{path}-async").result()
    capture.make_static_plan, plan.make_static_plan = make, again
    for saved in (path, f"{path}-many", f"{path}-async"):
        whole: dict[str, Any] = {
            "all": torch.zeros(9),
            "first": torch.zeros(5),
            "last": {
                "large": torch.zeros(1 << 16, dtype=torch.int64),
                "small": torch.tensor(0),
                "x": [0, ""],
            },
        }
        dcp.load(whole, storage_reader=dcp.FileSystemReader(saved), no_dist=True)
        assert torch.equal(whole["all"], torch.arange(9.0))
        assert torch.equal(whole["first"], torch.arange(5.0))
        last = whole["last"]
        assert torch.equal(last["large"], torch.arange(1 << 16)) and last["small"] == 2
        assert last["x"] == [1, "a"]
    dist.barrier()
    return sorted(name[:4] for name in os.listdir(path) if name.endswith("distcp")), len(made)


def _within_objects(rank: int, root: str) -> None:
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    sharded = distribute_tensor(torch.arange(8.0), mesh, [Shard(0)])
    for form, value in {"tuple": (sharded, 1), "class": Holder({"deep": [sharded]})}.items():
        for message in _saves({"n": {form: value}}, f"{root}/{form}"):
            assert f"n.{form}: it holds a DTensor within an object" in message
    like = {"n": [distribute_tensor(torch.zeros(8), mesh, [Shard(0)]), 0]}
    h.save({"n": [sharded, 1]}, checkpoint_id=f"{root}/list")
    h.load(like, checkpoint_id=f"{root}/list")
    loaded = like["n"][0]
    assert isinstance(loaded, DTensor) and torch.equal(loaded.full_tensor(), torch.arange(8.0))


def _state_of(rank: int) -> dict[str, Any]:
    return {
        "torch": torch.full((5056,), rank, dtype=torch.uint8),
        "numpy": torch.full((624,), rank),
        "python": ("state", rank),
        "seed": rank,
        "average": {"mean": torch.full((4, 1024), float(rank)), "count": torch.tensor(rank)},
    }


def _ranks_in(state: dict[str, Any]) -> set[int]:
    return {
        int(state["torch"][0]),
        int(state["numpy"][0]),
        state["python"][1],
        state["seed"],
        int(state["average"]["mean"][0, 0]),
        int(state["average"]["count"]),
    }


def _one_ranks_state(rank: int, root: str) -> set[int]:
    logging.disable(logging.WARNING)
    own = {f"rank{rank}": torch.tensor(rank)}  # which only a gathered plan can have
    found: set[int] = set()
    for i, extra in enumerate(({}, own)):
        saved = {"state": _state_of(rank), **extra}
        h.save(saved, checkpoint_id=f"{root}/{i}")
        h.async_save(saved, checkpoint_id=f"{root}/{i}-async").result()
        for path in (f"{root}/{i}", f"{root}/{i}-async"):
            like: dict[str, Any] = {"state": _state_of(-1 % 100), **extra}
            h.load(like, checkpoint_id=path)
            found |= _ranks_in(like["state"])
    return found


def test_one_key_with_other_shapes_is_refused(tmp_path: Path) -> None:
    run_ranks(_contradicting, 4, str(tmp_path))


def test_each_is_written_by_ranks_that_hold_it(tmp_path: Path) -> None:
    outcomes = run_ranks(_held_by_some, 4, f"{tmp_path}/saved")
    assert outcomes[0][0] == ["__0_", "__1_", "__2_"]
    # Once as if all held the same, once when the first save has found that they do not.
    assert [made for _, made in outcomes] == [2] * 4


def test_shards_within_objects_are_refused(tmp_path: Path) -> None:
    run_ranks(_within_objects, 2, str(tmp_path))


def test_what_differs_comes_from_one_rank(tmp_path: Path) -> None:
    assert run_ranks(_one_ranks_state, 4, str(tmp_path)) == [{0}] * 4
