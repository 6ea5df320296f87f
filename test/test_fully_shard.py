"""``fully_shard`` and what the wrapper has in common with it: torch FSDP2's numbers, names and
settings."""

import copy
import dataclasses

import pytest
import torch
import torch.distributed as dist
from device import DEVICE
from models import NETS, Block, Net, batch
from ranks import run_checks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as torchs_fully_shard
from torch.distributed.fsdp.wrap import CustomPolicy, ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Shard
from training import assert_close, full, grads, loss_of, mean_grads, mesh_of, wrap

from torch_hsdp_ckpt import (
    CPUOffload,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    ShardingStrategy,
    fully_shard,
    register_fsdp_forward_method,
)


def shard(net: Net, face=fully_shard, policy: MixedPrecisionPolicy | None = None) -> Net:
    mesh = mesh_of((2, 2))
    policy = policy or MixedPrecisionPolicy()
    for block in net.blocks:
        face(block, mesh=mesh, mp_policy=dataclasses.replace(policy, output_dtype=None))
    return face(net, mesh=mesh, mp_policy=policy)


def _train(model: nn.Module, net: Net, rank: int) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for step in range(5):
        loss = loss_of(model, batch(net, step, rank))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _same_bits(rank: int) -> None:
    for make in NETS.values():
        ours, reference = shard(make()), shard(make(), torchs_fully_shard)
        assert _train(ours, make(), rank) == _train(reference, make(), rank)
        assert list(ours.state_dict()) == list(reference.state_dict()) == list(make().state_dict())
        for p, q in zip(ours.parameters(), reference.parameters(), strict=True):
            assert torch.equal(p.to_local(), q.to_local())
    assert (
        isinstance(ours, FSDPModule) and isinstance(ours, Net) and type(ours).__name__ == "FSDPNet"
    )


def _settings(rank: int) -> None:
    net = NETS["uneven"]()
    ours = shard(copy.deepcopy(net))
    expected = mean_grads(
        net, lambda n, r: loss_of(n, batch(net, 0, r)) + loss_of(n, batch(net, 1, r))
    )

    def both() -> None:
        loss_of(ours, batch(net, 1, rank)).backward()
        assert_close(grads(ours), expected)
        ours.zero_grad()

    for without in (
        ours.set_requires_gradient_sync,
        ours.set_requires_all_reduce,
    ):  # accumulation, partial accumulation
        without(False)
        loss_of(ours, batch(net, 0, rank)).backward()
        assert all(p.grad is None for p in ours.parameters())
        without(True)
        both()

    once = mean_grads(net, lambda n, r: loss_of(n, batch(net, 0, r)))
    ours.set_modules_to_forward_prefetch([ours.blocks[1]])
    ours.blocks[1].set_modules_to_backward_prefetch([ours.blocks[0]])
    ours.set_reshard_after_forward(False)
    ours.set_is_last_backward(True)
    handle = ours.blocks[0].unshard(async_op=True)
    handle.wait()
    assert not isinstance(ours.blocks[0].up.weight, DTensor)
    assert torch.equal(ours.blocks[0].up.weight, net.blocks[0].up.weight)
    ours.blocks[0].reshard()
    assert isinstance(ours.blocks[0].up.weight, DTensor)
    ours.blocks[0].unshard()
    assert isinstance(ours.state_dict()["blocks.0.up.weight"], DTensor)
    assert isinstance(ours.blocks[0].up.weight, DTensor)  # as with torch's
    for _ in range(2):
        ours.zero_grad()
        loss_of(ours, batch(net, 0, rank)).backward()
        assert_close(grads(ours), once)
    ours.zero_grad()
    ours.set_gradient_divide_factor(2.0)  # of the root unit's alone: the head
    loss_of(ours, batch(net, 0, rank)).backward()
    got = grads(ours)
    torch.testing.assert_close(got["head.weight"], 2 * once["head.weight"])
    torch.testing.assert_close(got["blocks.0.up.weight"], once["blocks.0.up.weight"])

    ours.predict = lambda x: ours.head(x)
    register_fsdp_forward_method(ours, "predict")
    with torch.no_grad():
        x = torch.ones(1, 7)
        torch.testing.assert_close(ours.predict(x), net.head(x))
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(ours)
    fresh, cube = NETS["even"](), init_device_mesh(DEVICE, (2, 2, 1))
    for given, module, wrong, message in (
        (fresh, "Net", dict(reshard_after_forward=3), "reshard_after_forward=3 is neither"),
        (fresh, "Net", dict(mesh=cube), "device_mesh has 3 dimensions"),
        (
            [fresh.blocks[0], fresh.head],
            "Block, Linear",
            dict(mesh=cube),
            "device_mesh has 3 dimensions",
        ),
        (
            fresh.head,
            "Linear",
            dict(shard_placement_fn=lambda p: Shard(p.ndim)),
            r"parameter weight of shape \(4, 8\) has no dimension 2 to be sharded on",
        ),
        (ours, "FSDPNet", {}, "fully_shard has been applied to it already"),
        (fresh.blocks, "ModuleList", {}, "it has no forward"),
    ):
        with pytest.raises(ValueError, match=f"^rank {rank}: module {module}: {message}"):
            fully_shard(given, **wrong)


def _mixed_precision(rank: int) -> None:
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
    )
    net = NETS["even"]()
    ours, reference = (
        shard(copy.deepcopy(net), face, policy) for face in (fully_shard, torchs_fully_shard)
    )
    out, expected = ours(batch(net, 0, rank)), reference(batch(net, 0, rank))
    assert out.dtype == torch.float32 and torch.equal(out, expected)
    out.square().mean().backward()
    expected.square().mean().backward()
    for p, q in zip(ours.parameters(), reference.parameters(), strict=True):
        assert p.grad.dtype == torch.float32
        torch.testing.assert_close(full(p.grad), full(q.grad), rtol=2e-2, atol=1e-3)

    class Normed(nn.Sequential):
        pass

    normed = Normed(nn.Linear(6, 4), nn.BatchNorm1d(4), Block(4, 6))
    seen = []
    normed[1].register_forward_hook(lambda m, a, o: seen.append((a[0].dtype, m.weight.dtype)))
    wrapped = wrap(
        normed,
        mixed_precision=MixedPrecision(param_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16),
    )
    assert isinstance(wrapped.module[1], FullyShardedDataParallel)
    assert wrapped(torch.randn(3, 6)).dtype == torch.bfloat16
    assert seen == [(torch.float32, torch.float32)]
    assert wrapped.module[1].module.running_mean.dtype == torch.float32


def _constructor(rank: int) -> None:
    net = NETS["uneven"]()
    expected = mean_grads(net, lambda n, r: loss_of(n, batch(net, 0, r)))

    def check(ours: nn.Module) -> None:
        loss_of(ours, batch(net, 0, rank)).backward()
        assert_close(grads(ours), expected)

    mesh = mesh_of((2, 2))
    policy = ModuleWrapPolicy({Block})
    pair = (mesh.get_group(1), mesh.get_group(0))
    hybrid, whole = ShardingStrategy.HYBRID_SHARD, ShardingStrategy.NO_SHARD
    offload = CPUOffload(offload_params=DEVICE == "cpu")  # refused elsewhere
    for options in (
        dict(process_group=pair, sharding_strategy=hybrid),
        dict(process_group=dist.group.WORLD),
        dict(sharding_strategy=whole),
        dict(device_mesh=mesh, cpu_offload=offload, use_orig_params=False),
        dict(device_mesh=mesh, forward_prefetch=True, limit_all_gathers=False),
    ):
        check(FullyShardedDataParallel(copy.deepcopy(net), auto_wrap_policy=policy, **options))
    custom = CustomPolicy(
        lambda m: {"sharding_strategy": ShardingStrategy._HYBRID_SHARD_ZERO2}
        if m is inner.blocks[0]
        else isinstance(m, Block)
    )
    inner = copy.deepcopy(net)
    ours = FullyShardedDataParallel(inner, device_mesh=mesh, auto_wrap_policy=custom)
    assert [w.sharding_strategy.name for w in FullyShardedDataParallel.fsdp_modules(ours)] == [
        "HYBRID_SHARD", "_HYBRID_SHARD_ZERO2", "HYBRID_SHARD",
    ]  # fmt: skip
    check(ours)

    with torch.device("meta"):
        empty = Net(7, 13, 3)
    del empty._buffers["calls"], empty._buffers["scratch"]
    empty.calls = 0
    made = wrap(empty, sync_module_states=True)
    for _, p in made.named_parameters():
        everywhere = [torch.empty_like(full(p)) for _ in range(4)]
        dist.all_gather(everywhere, full(p))
        assert all(torch.equal(everywhere[0], other) for other in everywhere)
    assert made(torch.ones(1, 7)).isfinite().all()


def _methods(rank: int) -> None:
    net = NETS["uneven"]()
    ours = wrap(copy.deepcopy(net))
    loss_of(ours, batch(net, 0, rank)).backward()
    whole_grads = grads(ours)
    assert ours.check_is_root() and not ours.module.blocks[0].check_is_root()
    summon = FullyShardedDataParallel.summon_full_params
    with summon(ours, with_grads=True):
        for (name, p), q in zip(ours.named_parameters(), net.parameters(), strict=True):
            assert type(p) is nn.Parameter and torch.equal(p, q), name
            torch.testing.assert_close(p.grad, whole_grads[name])
        with pytest.raises(RuntimeError, match="summoned"):
            ours(batch(net, 0, rank))
        with torch.no_grad():
            ours.module.head.weight.fill_(2.0)
    assert (full(ours.module.head.weight) == 2).all()
    with summon(ours, writeback=False, rank0_only=True, offload_to_cpu=True):
        assert isinstance(ours.module.head.weight, DTensor) == (rank != 0)
    with summon(ours, writeback=False), torch.no_grad():
        ours.module.head.weight.fill_(3.0)
    assert (full(ours.module.head.weight) == 2).all()
    with summon(ours, recurse=False):
        assert isinstance(ours.module.blocks[0].module.up.weight, DTensor)
        assert not isinstance(ours.module.head.weight, DTensor)
    with pytest.raises(NotImplementedError, match="writeback"), summon(ours, rank0_only=True):
        pass

    @torch.no_grad()
    def ones(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            assert module.weight.ndim == 2 and not isinstance(module.weight, DTensor)
            module.weight.fill_(1.0)

    ours.apply(ones)
    assert all(
        (full(p) == 1).all()
        for name, p in ours.named_parameters()
        if name.endswith(("up.weight", "head.weight"))
    )
    with pytest.raises(ValueError, match="set_all_reduce_hook"):
        ours.register_comm_hook(None, lambda *_: None)


def _freed_is_not_shown(rank: int) -> None:
    """What a forward has kept and shown goes when another one raises, or passes it by."""

    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, skip: bool, fail: bool = False) -> torch.Tensor:
            x = self.first(x) if skip else self.second(self.first(x))
            if fail:
                raise ArithmeticError
            return x

    model = Skips()
    for module in (model.first, model.second, model):
        fully_shard(module, reshard_after_forward=False)
    x = torch.ones(2, 4)
    model(x, skip=False)
    assert not isinstance(model.second.weight, DTensor)
    model(x, skip=True)
    assert isinstance(model.second.weight, DTensor)
    with pytest.raises(ArithmeticError):
        model(x, skip=False, fail=True)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    bias = model.second.bias
    model(x, skip=False)
    bias.requires_grad_(False)  # and the full ones are made anew
    model(x, skip=False).sum().backward()
    assert bias.grad is None and model.first.bias.grad is not None


def test_both_faces() -> None:
    checks = (_same_bits, _settings, _freed_is_not_shown, _mixed_precision, _constructor, _methods)
    run_checks(4, *checks)
