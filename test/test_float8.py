"""torchao's float8 training, which gathers weights in eight bits by FSDP2's extensions: the numbers
of torch's ``fully_shard``, bit for bit where groups have two ranks."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.fsdp as torchs
from device import DEVICE
from framework_driver import PYTHON as FRAMEWORKS_PYTHON
from parallel_models import mesh_of
from ranks import run_checks, run_ranks
from sides import SIDES, whole
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor.parallel import parallelize_module

import torch_hsdp_ckpt as ours

# Ranks import this too.
TORCHAO = FRAMEWORKS_PYTHON.parents[1] / "torchao"
sys.path.append(str(TORCHAO))
pytestmark = pytest.mark.skipif(
    not TORCHAO.exists() and os.environ.get("HSDP_CKPT_REQUIRE_FRAMEWORKS") != "1",
    reason=f"torchao is not installed in {TORCHAO}: `make frameworks` installs it",
)
WIDTH = 32


def _model(side: Any) -> nn.Sequential:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    torch.manual_seed(0)
    model = nn.Sequential()
    for has_bias in (True, False):
        inner = nn.Linear(WIDTH, 64, bias=has_bias), nn.ReLU(), nn.Linear(64, WIDTH, bias=has_bias)
        model.append(nn.Sequential(*inner))
    if side is torchs:  # whose units of eight bits alone Gloo can't gather
        model[1].other = nn.Parameter(torch.zeros(4), requires_grad=False)
    # Emulated: so it runs on the CPU.
    config = Float8LinearConfig(enable_fsdp_float8_all_gather=True, emulate=True)
    return convert_to_float8_training(model.to(DEVICE), config=config)


def _parallel(model: nn.Sequential, mesh: DeviceMesh) -> None:
    from torchao.float8.float8_tensor_parallel import (
        Float8ColwiseParallel,
        Float8RowwiseParallel,
    )

    for block in model:
        plan = {"0": Float8ColwiseParallel(), "2": Float8RowwiseParallel()}
        parallelize_module(block, mesh, plan)


def _train(side: Any, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> list[torch.Tensor]:
    """The losses, then the parameters."""
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

    model = _model(side)
    if "tp" in mesh.mesh_dim_names:
        _parallel(model, mesh["tp"])
    data_parallel = mesh["replicate", "shard"]
    for module in (*model, model):
        side.fully_shard(module, mesh=data_parallel, mp_policy=policy)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    replica = 2 * mesh["replicate"].get_local_rank() + mesh["shard"].get_local_rank()
    losses = []
    for step in range(6):
        drawn = torch.Generator().manual_seed(10 * step + replica)
        x = torch.randn(16, WIDTH, generator=drawn).to(DEVICE)
        loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 2:  # else each gather finds its own scales
            precompute_float8_dynamic_scale_for_fsdp(model)
        losses.append(loss.detach())
    shards = [
        whole(parameter) for name, parameter in model.named_parameters() if "other" not in name
    ]
    return losses + [getattr(shard, "_tensor", shard).detach() for shard in shards]


def _as_torch(rank: int, **sizes: int) -> None:
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for policy in (MixedPrecisionPolicy(), half):
        sides = [_train(side, mesh_of(**sizes), policy) for side in SIDES]
        torch.testing.assert_close(*sides, rtol=0, atol=0)


def _alone(rank: int) -> None:
    _as_torch(rank, replicate=2, shard=2)


def _beside_tp(rank: int) -> None:
    _as_torch(rank, replicate=2, shard=2, tp=2)


def _values(parameter: nn.Parameter) -> torch.Tensor:
    local = parameter.to_local().detach()
    return getattr(local, "_tensor", local)


def _saves(rank: int, root: str) -> None:
    """Saved as the tensors that they are before they are gathered."""
    model, mesh = _model(ours), mesh_of(replicate=2, shard=2)
    for module in (*model, model):
        ours.fully_shard(module, mesh=mesh)
    ours.save(model.state_dict(), checkpoint_id=root)
    before = [_values(parameter).clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        _values(parameter).zero_()
    ours.load(model.state_dict(), checkpoint_id=root)
    assert all(map(torch.equal, before, map(_values, model.parameters())))


def test_float8_training(tmp_path: Path) -> None:
    run_checks(4, _alone)
    run_ranks(_saves, 4, f"{tmp_path}/saved")


def test_float8_training_beside_tp() -> None:
    run_checks(8, _beside_tp)
