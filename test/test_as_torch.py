"""What torch allows and documents, and this package once refused or did otherwise."""

from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
from device import DEVICE, cpu_only
from models import uneven_net
from ranks import run_checks, run_ranks
from torch import nn
from torch.distributed.checkpoint.format_utils import (
    BroadcastingTorchSaveReader,
    DynamicMetaLoadPlanner,
)
from torch.distributed.fsdp import FullyShardedDataParallel as TorchsFSDP
from torch.distributed.fsdp import fully_shard as torchs_fully_shard
from training import full, mesh_of

from torch_hsdp_ckpt import (
    CheckpointError,
    FullyShardedDataParallel,
    ShardingStrategy,
    StateDictType,
    fully_shard,
    load,
)


def _names_by_rank(rank: int) -> None:
    """Ranks may give modules names of their own, as long as the shapes are the same."""
    gradients = []
    for face in (fully_shard, torchs_fully_shard):
        torch.manual_seed(0)
        named = {f"expert_{rank}": nn.Linear(7, 7), f"shared_{rank}": nn.Linear(7, 5)}
        model = nn.Sequential(OrderedDict(named))
        face(model[0], mesh=mesh_of((2, 2)))
        face(model, mesh=mesh_of((2, 2)))
        for _ in range(2):
            x = torch.full((2, 7), float(rank))
            model(x).sum().backward()
        gradients.append([full(p.grad) for p in model.parameters()])
    torch.testing.assert_close(*gradients)
    other = fully_shard(nn.Linear(7, 7 + (rank == 2)), mesh=mesh_of((2, 2)))
    with pytest.raises(RuntimeError, match=r"different modules.*(\n.*)*rank 2: .*weight \(8, 7\)"):
        other(torch.ones(2, 7))


def _writes_without_shards(rank: int) -> None:
    no_shard, full_shard = ShardingStrategy.NO_SHARD, ShardingStrategy.FULL_SHARD
    for strategy, kept in ((no_shard, True), (full_shard, False)):
        for face in (FullyShardedDataParallel, TorchsFSDP):
            model = face(
                uneven_net(),
                sharding_strategy=strategy,
                use_orig_params=True,
                device_id=torch.device(DEVICE),
            )
            before = uneven_net().head.weight
            with face.summon_full_params(model, writeback=False), torch.no_grad():
                model.module.head.weight.fill_(3.0)
            with face.summon_full_params(model):
                expected = torch.full_like(before, 3.0) if kept else before
                assert torch.equal(model.module.head.weight, expected)


def test_as_torch() -> None:
    run_checks(4, _names_by_rank, _writes_without_shards)


def _online_conversion(rank: int, path: str) -> None:
    torch.manual_seed(1)
    whole = nn.Linear(5, 10).state_dict()
    if rank == 0:
        torch.save({"model": whole}, path)
    dist.barrier()
    model = FullyShardedDataParallel(nn.Linear(5, 10), device_id=torch.device(DEVICE))
    reader, planner = BroadcastingTorchSaveReader(), DynamicMetaLoadPlanner()
    with pytest.raises(CheckpointError, match=r"model\.weight is sharded.*FULL_STATE_DICT"):
        load({"model": model}, planner=planner, storage_reader=reader, checkpoint_id=path)
    FullyShardedDataParallel.set_state_dict_type(model, StateDictType.FULL_STATE_DICT)
    load({"model": model}, planner=planner, storage_reader=reader, checkpoint_id=path)
    with FullyShardedDataParallel.summon_full_params(model):
        assert torch.equal(model.module.weight, whole["weight"])


@cpu_only("torch's reader broadcasts by the first backend of the default group")
def test_online_conversion(tmp_path) -> None:
    run_ranks(_online_conversion, 2, str(tmp_path / "model.pt"))
