"""Checkpoints of models beside tensor, expert and pipeline parallelism: planned natively, and read
on any other mesh, by stock torch too."""

import itertools
import logging
import math
import random
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from device import DEVICE
from parallel_models import language, mesh_of, tensor_parallel
from ranks import Messages, run_ranks
from sides import whole_in
from test_any_mesh import CASES, train
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor import _utils as tensor_utils
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._pytree import tree_map_only

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt.common.cuts import box_at, cuts_of

OF_ALL_RANKS = ("beside TP", "on columns beside TP", "1-D beside TP", "experts on another mesh")


EXACT = {"rtol": 0.0, "atol": 0.0, "check_device": False}


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


def _state_of_a_case(name: str) -> dict[str, Any]:
    case = CASES[name]
    model, optimizer, _ = train(case, h.fully_shard, mesh_of(**case.mesh), 2)
    return _state_of(model, optimizer)


def _state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    values, moments = get_state_dict(model, optimizer)
    return {"model": values, "optimizer": moments["state"]}


def _trained(model: nn.Module, steps: int) -> dict[str, Any]:
    """The state of a part of a model, after steps with gradients that it would have from peers."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.sin(parameter.detach())
        optimizer.step()
    return _state_of(model, optimizer)


def _stage() -> dict[str, Any]:
    """Of pipeline parallelism: each has modules of its own, sharded and replicated, and values of
    its own."""
    mesh = mesh_of(pp=2, replicate=2, shard=2)
    number = mesh["pp"].get_local_rank()
    model = language()
    first = {"embedding": model.embedding, "block0": model.blocks[0]}
    last = {"block1": model.blocks[1], "norm": model.norm, "head": model.head}
    stage = nn.Sequential(OrderedDict((first, last)[number]))
    h.fully_shard(stage, mesh=mesh["replicate", "shard"])
    state = _trained(stage, 2 + number)
    seed = torch.full((5000,), number, dtype=torch.uint8)
    return {**state, f"stage{number}": {"seed": seed, "microbatch": number}}


def _experts_by_rank() -> dict[str, Any]:
    """Each rank of expert parallelism has experts under keys of their own, and all have the
    others."""
    mesh = mesh_of(replicate=2, efsdp=2, ep=2)
    first = 3 * mesh["ep"].get_local_rank()  # three and two
    torch.manual_seed(0)
    experts = [nn.Linear(8, 24) for _ in range(5)]
    own = nn.Sequential(
        OrderedDict((f"expert{i}", experts[i]) for i in range(first, min(first + 3, 5)))
    )
    h.fully_shard(own, mesh=mesh["replicate", "efsdp"])
    router = nn.Linear(16, 5)
    h.fully_shard(router, mesh=mesh["replicate", "efsdp", "ep"]._flatten("fsdp"))
    return {"experts": _trained(own, 2), "router": _trained(router, 2)}


def _beside_replicas() -> dict[str, Any]:
    """Tensor parallelism within each replica, whose mesh knows nothing of the others."""
    mesh = mesh_of(replicate=4, tp=2)
    return _trained(tensor_parallel(language(), mesh["tp"]), 2)


OF_SOME_RANKS = {
    "pipeline stages": _stage,
    "experts by rank": _experts_by_rank,
    "TP within replicas": _beside_replicas,
}


def _state(name: str) -> dict[str, Any]:
    return OF_SOME_RANKS[name]() if name in OF_SOME_RANKS else _state_of_a_case(name)


def _united(states: Sequence[Any]) -> Any:
    """What ranks hold, in one."""
    if not isinstance(states[0], dict):
        return states[0]
    keys = dict.fromkeys(key for state in states for key in state)
    return {key: _united([state[key] for state in states if key in state]) for key in keys}


def _save(rank: int, name: str, root: str) -> None:
    """By ours and by stock DCP; and what the tensors are."""
    state = _state(name)
    messages = Messages()
    logger = logging.getLogger("torch_hsdp_ckpt")
    logger.addHandler(messages)
    logger.setLevel(logging.INFO)
    h.save(state, checkpoint_id=f"{root}/ours")
    for _ in range(3):  # the second one knows from the first one what other ranks hold
        h.async_save(state, checkpoint_id=f"{root}/async").result()
    saved = [text for text in messages.texts if "MiB/s" in text]
    assert rank or len(saved) == 4, messages.texts
    assert not [text for text in messages.texts if "through DCP" in text], messages.texts
    dcp.save(state, checkpoint_id=f"{root}/stock")
    wholes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(wholes, whole_in(state))
    if rank == 0:
        torch.save(_united(wholes), f"{root}/whole.pt")


def _empty_like(whole: Any, shape: tuple[int, ...]) -> Any:
    """A state of the same keys on a mesh of another shape, without the values."""
    mesh = init_device_mesh(DEVICE, shape) if shape else None

    def empty(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: empty(each) for key, each in value.items()}
        if not isinstance(value, torch.Tensor):
            return type(value)()
        if not value.ndim or mesh is None:
            return torch.zeros_like(value)
        placements = [Replicate()] * (len(shape) - 1) + [Shard(0)]
        return distribute_tensor(torch.zeros_like(value), mesh, placements, src_data_rank=None)

    return empty(whole)


def _load_on(rank: int, root: str, shape: tuple[int, ...]) -> None:
    whole = torch.load(f"{root}/whole.pt", map_location=DEVICE)
    for kind in ("ours", "async", "stock"):
        for load in (h.load, dcp.load):
            state = _empty_like(whole, shape)
            load(state, checkpoint_id=f"{root}/{kind}")
            torch.testing.assert_close(whole_in(state), whole, **EXACT)


def _part(whole: Any, held: Any) -> Any:
    """What one rank holds of it."""
    if not isinstance(held, dict):
        return whole
    return {key: _part(whole[key], value) for key, value in held.items()}


def _cleared(value: torch.Tensor) -> None:
    (value.to_local() if isinstance(value, DTensor) else value).zero_()


def _load_back(rank: int, name: str, root: str) -> None:
    """Onto the mesh that it came from, whose tensors hold something else."""
    whole = torch.load(f"{root}/whole.pt", map_location=DEVICE)
    state = _state(name)
    for kind in ("ours", "async", "stock"):
        with torch.no_grad():
            tree_map_only(torch.Tensor, _cleared, state)
        h.load(state, checkpoint_id=f"{root}/{kind}")
        torch.testing.assert_close(whole_in(state), _part(whole, state), **EXACT)


@pytest.mark.parametrize("name", [*OF_ALL_RANKS, *OF_SOME_RANKS])
def test_any_mesh_to_any_other(name: str, tmp_path: Path) -> None:
    root = str(tmp_path)
    run_ranks(_save, 8, name, root)
    run_ranks(_load_back, 8, name, root)
    for shape in ((2, 2), (4,), (2,)):
        run_ranks(_load_on, math.prod(shape), root, shape)
    run_ranks(_load_on, 1, root, ())
