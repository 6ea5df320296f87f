"""Checkpoints of models beside tensor, expert and pipeline parallelism: planned natively, and read
on any other mesh, by stock torch too."""

import itertools
import logging
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from parallel_models import mesh_of
from ranks import Messages, run_ranks
from test_any_mesh import CASES, train
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor import _utils as tensor_utils
from torch.distributed.tensor.placement_types import _StridedShard
from training import full

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt.common.cuts import box_at, cuts_of

SAVED = ("beside TP", "on columns beside TP", "1-D beside TP", "experts on another mesh")


def _random_cut(draw: random.Random) -> tuple[list[int], list[int], list[Any]]:
    """A tensor's shape, a mesh's, and placements of each of its dimensions."""
    mesh_shape = [draw.choice((1, 2, 3)) for _ in range(draw.randint(1, 5))]
    shape = [draw.choice((1, 2, 5, 6, 12, 24)) for _ in range(draw.randint(1, 3))]
    placements: list[Any] = []
    for mesh_dim in reversed(range(len(mesh_shape))):
        dim = draw.randrange(-1, len(shape))
        if dim < 0:
            placements.insert(0, Replicate())
            continue
        right = list(zip(placements, mesh_shape[mesh_dim + 1 :], strict=True))
        pieces = math.prod(n for p, n in right if type(p) is Shard and p.dim == dim)
        # What torch's fully_shard makes: the last cut, along the dimension before the others.
        strided = pieces > 1 and not any(type(p) is _StridedShard for p, _ in right)
        if strided and shape[dim] % pieces == 0 and draw.random() < 0.5:
            placements.insert(0, _StridedShard(dim, split_factor=pieces))
        elif any(type(p) is _StridedShard and p.dim == dim for p, _ in right):
            placements.insert(0, Replicate())
        else:
            placements.insert(0, Shard(dim))
    return shape, mesh_shape, placements


_box_by_dtensor = tensor_utils._compute_local_shape_and_global_offset


def test_boxes_are_dtensors() -> None:
    """On random meshes of up to five dimensions: DTensor's own arithmetic, and all boxes of one
    replica together are the tensor, each element once."""
    draw = random.Random(7)
    strided = 0
    for _ in range(600):
        shape, mesh_shape, placements = _random_cut(draw)
        cuts = cuts_of(placements, mesh_shape)
        assert cuts is not None
        strided += any(type(p) is _StridedShard for p in placements)
        seen = torch.zeros(shape, dtype=torch.int64)
        for place in itertools.product(*map(range, mesh_shape)):
            offsets, sizes = box_at(shape, cuts, mesh_shape, place)
            wanted = _box_by_dtensor(shape, mesh_shape, place, placements)
            assert tuple(sizes) == tuple(wanted[0]), (shape, mesh_shape, placements, place)
            if 0 not in sizes:
                assert tuple(offsets) == tuple(wanted[1]), (shape, mesh_shape, placements, place)
            box = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
            seen[box] += 1
        replicas = math.prod(
            n for p, n in zip(placements, mesh_shape, strict=True) if p == Replicate()
        )
        assert torch.equal(seen, torch.full_like(seen, replicas))
    assert strided > 50


@pytest.mark.parametrize(
    ("placements", "mesh_shape"),
    [
        ([_StridedShard(0, split_factor=2), Replicate()], [2, 2]),
        ([_StridedShard(0, split_factor=3), Shard(0)], [2, 2]),
    ],
)
def test_split_factors_that_nothing_explains(placements: list[Any], mesh_shape: list[int]) -> None:
    assert cuts_of(placements, mesh_shape) is None


def _state(name: str) -> dict[str, Any]:
    case = CASES[name]
    model, optimizer, _ = train(case, h.fully_shard, mesh_of(**case.mesh), 2)
    values, moments = get_state_dict(model, optimizer)
    return {"model": values, "optimizer": moments["state"]}


def _whole(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _whole(value) for key, value in state.items()}
    return full(state).clone() if isinstance(state, DTensor) else state


def _save(rank: int, name: str, root: str) -> None:
    """By ours and by stock DCP; and what the tensors are."""
    state = _state(name)
    messages = Messages()
    logger = logging.getLogger("torch_hsdp_ckpt")
    logger.addHandler(messages)
    logger.setLevel(logging.INFO)
    h.save(state, checkpoint_id=f"{root}/ours")
    job = h.async_save(state, checkpoint_id=f"{root}/async")
    job.result()
    saved = [text for text in messages.texts if "MiB/s" in text]
    assert rank or len(saved) == 2, messages.texts
    assert not [text for text in saved if "planned through DCP" in text], saved
    dcp.save(state, checkpoint_id=f"{root}/stock")
    whole = _whole(state)
    if rank == 0:
        torch.save(whole, f"{root}/whole.pt")


def _empty_like(whole: Any, shape: tuple[int, ...]) -> Any:
    """A state of the same keys on a mesh of another shape, without the values."""
    mesh = init_device_mesh("cpu", shape) if shape else None

    def empty(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: empty(each) for key, each in value.items()}
        if not isinstance(value, torch.Tensor) or not value.ndim or mesh is None:
            return torch.zeros_like(value) if isinstance(value, torch.Tensor) else value
        placements = [Replicate()] * (len(shape) - 1) + [Shard(0)]
        return distribute_tensor(torch.zeros_like(value), mesh, placements)

    return empty(whole)


def _equal(found: Any, wanted: Any, at: str = "") -> None:
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), at
        for key in wanted:
            _equal(found[key], wanted[key], f"{at}.{key}")
    elif isinstance(wanted, torch.Tensor):
        assert torch.equal(full(found), wanted), at


def _load_on(rank: int, root: str, shape: tuple[int, ...]) -> None:
    whole = torch.load(f"{root}/whole.pt")
    for kind in ("ours", "async", "stock"):
        for load in (h.load, dcp.load):
            state = _empty_like(whole, shape)
            load(state, checkpoint_id=f"{root}/{kind}")
            _equal(state, whole, f"{kind} by {load.__module__}")


def _load_back(rank: int, name: str, root: str) -> None:
    """Onto the mesh that it came from, whose tensors hold something else."""
    whole = torch.load(f"{root}/whole.pt")
    state = _state(name)
    for kind in ("ours", "stock"):
        with torch.no_grad():
            for value in state["model"].values():
                value.to_local().add_(1.0)
        h.load(state, checkpoint_id=f"{root}/{kind}")
        _equal(state, whole, kind)


@pytest.mark.parametrize("name", SAVED)
def test_any_mesh_to_any_other(name: str, tmp_path: Path) -> None:
    root = str(tmp_path)
    run_ranks(_save, 8, name, root)
    run_ranks(_load_back, 8, name, root)
    for shape in ((2, 2), (4,), (2,)):
        run_ranks(_load_on, math.prod(shape), root, shape)
    run_ranks(_load_on, 1, root, ())
