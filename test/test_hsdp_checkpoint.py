"""The two cases that name this project: HSDP saved and loaded on the same mesh, and HSDP saved, 1-D
FSDP loaded."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from device import DEVICE
from models import NETS, Block, batch
from ranks import run_ranks
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from training import full

from torch_hsdp_ckpt import (
    FileSystemReader,
    FileSystemWriter,
    FullyShardedDataParallel,
    ShardingStrategy,
    StateDictType,
)


def _wrap(net: torch.nn.Module, device: str, shape: tuple[int, ...]) -> FullyShardedDataParallel:
    names = ("replicate", "shard")[-len(shape) :]
    model = FullyShardedDataParallel(
        net.to(device),
        device_mesh=init_device_mesh(device, shape, mesh_dim_names=names),
        sharding_strategy=ShardingStrategy.HYBRID_SHARD
        if len(shape) == 2
        else ShardingStrategy.FULL_SHARD,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
    )
    FullyShardedDataParallel.set_state_dict_type(model, StateDictType.SHARDED_STATE_DICT)
    return model


def _step(
    model: FullyShardedDataParallel, optimizer: torch.optim.Optimizer, x: torch.Tensor
) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def _local(value: torch.Tensor) -> torch.Tensor:
    return (value.to_local() if isinstance(value, DTensor) else value).detach().clone()


def _device(device: str, rank: int) -> str:
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    return device


def _save_step_load(rank: int, path: str, kind: str, device: str) -> None:
    net = NETS[kind]()
    model = _wrap(net, _device(device, rank), (2, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    _step(model, optimizer, batch(net, 0, rank).to(device))

    saved = model.state_dict()
    before = {key: _local(value) for key, value in saved.items()}
    dcp.save(saved, storage_writer=FileSystemWriter(path), planner=DefaultSavePlanner())

    _step(model, optimizer, batch(net, 1, rank).to(device))
    target = model.state_dict()
    assert target.keys() == before.keys()
    sharded = 0
    for key, value in target.items():
        if not isinstance(value, DTensor):
            continue
        sharded += 1
        assert (
            value.device_mesh == saved[key].device_mesh
            and value.placements == saved[key].placements
        ), key
        if value.to_local().numel():  # a shard without rows has nothing that could differ
            assert not torch.equal(_local(value), before[key]), key
    assert sharded == len(list(model.parameters()))

    dcp.load(target, storage_reader=FileSystemReader(path), planner=DefaultLoadPlanner())
    model.load_state_dict(target)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for key, value in after.items():
        assert torch.equal(_local(value), before[key]), key


def _save_hsdp_load_fsdp(rank: int, path: str, kind: str, device: str) -> None:
    net = NETS[kind]()
    model = _wrap(net, _device(device, rank), (2, 2))
    _step(model, torch.optim.Adam(model.parameters(), lr=0.1), batch(net, 0, rank).to(device))
    saved = model.state_dict()
    dcp.save(saved, storage_writer=FileSystemWriter(path), planner=DefaultSavePlanner())

    other = _wrap(NETS[kind](seed=1), device, (dist.get_world_size(),))
    target = other.state_dict()
    dcp.load(target, storage_reader=FileSystemReader(path), planner=DefaultLoadPlanner())
    other.load_state_dict(target)
    loaded = other.state_dict()
    assert loaded.keys() == saved.keys()
    for key, value in saved.items():
        if isinstance(value, DTensor):
            assert loaded[key].device_mesh.ndim == 1, key
            assert torch.equal(full(loaded[key]), full(value)), key
        else:
            assert torch.equal(loaded[key], value), key


CASES = [_save_step_load, _save_hsdp_load_fsdp]


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("case", CASES)
def test_on_gloo(case, kind, tmp_path) -> None:
    run_ranks(case, 4, str(tmp_path), kind, DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("case", CASES)
def test_on_cuda(case, kind, tmp_path) -> None:
    """Gloo with CUDA tensors: NCCL refuses several ranks on one GPU."""
    run_ranks(case, 4, str(tmp_path), kind, "cuda", backend="cpu:gloo,cuda:gloo")
