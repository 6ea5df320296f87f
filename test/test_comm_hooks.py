"""FSDP1's ``register_comm_hook``: hooks of torch's and of a user's, beside torch's own FSDP1."""

import gc
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from device import DEVICE
from ranks import run_checks
from sides import SIDES, assert_same, fsdp1, gradients, values
from torch import Tensor, nn
from torch.distributed.algorithms._comm_hooks import default_hooks
from torch.distributed.fsdp import ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from training import mesh_of

import torch_hsdp_ckpt as ours
from torch_hsdp_ckpt.compat import patch

SHARDED = default_hooks.reduce_scatter_hook
HALF = default_hooks.fp16_compress_hook
BRAIN = default_hooks.bf16_compress_hook


class _Net(nn.Module):
    """Uneven rows, a parameter without dimensions where torch takes one, and one that some
    ranks' backward skips."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.skipped, self.last = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor, skips: bool = False) -> Tensor:
        x = torch.relu(self.first(x))
        skipped = self.skipped(x)
        return self.last(x + (skipped.detach() if skips else skipped))


def _wrapped(side: ModuleType, strategy: ShardingStrategy) -> nn.Module:
    policy = ModuleWrapPolicy({nn.Linear})
    return fsdp1(side, _Net().to(DEVICE), auto_wrap_policy=policy, sharding_strategy=strategy)


def _state(hook: Callable[..., Any]) -> default_hooks.DefaultState:
    kind = default_hooks.LowPrecisionState if hook in (HALF, BRAIN) else default_hooks.DefaultState
    return kind(dist.distributed_c10d._get_default_group())


def _torchs_hooks(rank: int) -> None:
    for strategy in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"):
        plain = default_hooks.allreduce_hook if strategy == "NO_SHARD" else SHARDED
        # On the CPU torch's others end with an error of torch's.
        for hook in (plain,) if DEVICE == "cpu" else (plain, HALF, BRAIN):
            outcomes = []
            for side in SIDES:
                model = _wrapped(side, ShardingStrategy[strategy])
                model.register_comm_hook(_state(hook), hook)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                torch.manual_seed(rank)
                for _ in range(3):
                    optimizer.zero_grad()
                    model(torch.randn(4, 5).to(DEVICE)).square().mean().backward()
                    optimizer.step()
                outcomes.append(values(side, model))
            if hook is plain:
                assert_same(outcomes)
            else:  # summed in another order
                torch.testing.assert_close(outcomes[0], outcomes[1], rtol=2e-2, atol=2e-3)


def _what_a_hook_gets(rank: int) -> None:
    calls: list[tuple[Any, Tensor, Tensor]] = []

    def hook(state: Any, gradient: Tensor, shard: Tensor) -> None:
        calls.append((state, gradient.clone(), shard))
        dist.reduce_scatter_tensor(shard, gradient)
        shard.fill_(7.0)

    model = _wrapped(ours, ShardingStrategy.FULL_SHARD)
    model.register_comm_hook("state", hook)
    with model.no_sync():
        model(torch.ones(4, 5)).sum().backward()
    assert not calls
    model(torch.ones(4, 5)).sum().backward()
    assert len(calls) == 3 and {state for state, _, _ in calls} == {"state"}
    for _, gradient, shard in calls:
        assert gradient.dim() == shard.dim() == 1 and gradient.numel() == 4 * shard.numel()
        assert gradient.dtype == torch.float32 and gradient.device.type == DEVICE
    # The whole gradients of both backwards, and zeros between them.
    whole = _Net()
    (2 * whole(torch.ones(4, 5)).sum()).backward()
    expected = {sum(p.grad.sum().item() for p in m.parameters()) for m in whole.children()}
    found = {gradient.double().sum().item() for _, gradient, _ in calls}
    torch.testing.assert_close(sorted(found), sorted(expected), rtol=1e-5, atol=1e-4)
    assert all((p.grad.to_local() == 7.0).all() for p in model.parameters())


def _skipped_by_some_or_all(rank: int) -> None:
    """Who lacks gradients takes part with zeros; what nobody has reached keeps none."""
    for everybody in (False, True):
        model = _wrapped(ours, ShardingStrategy.FULL_SHARD)
        model.register_comm_hook(_state(SHARDED), SHARDED)
        reference = _wrapped(ours, ShardingStrategy.FULL_SHARD)
        for each in (model, reference):
            for _ in range(2):
                each(
                    torch.full((4, 5), rank + 1.0), skips=everybody or rank % 2 == 1
                ).sum().backward()
        for got, wanted in zip(model.parameters(), reference.parameters(), strict=True):
            assert (got.grad is None) == (wanted.grad is None)
        if not everybody:
            assert_same([gradients(ours, model), gradients(ours, reference)])
        assert (model.skipped.weight.grad is None) == everybody


def _refused(rank: int) -> None:
    hybrid = ours.FullyShardedDataParallel(_Net().to(DEVICE), device_mesh=mesh_of((2, 2)))
    with pytest.raises(ValueError, match=f"^rank {rank}: module Fully.*know one process group"):
        hybrid.register_comm_hook(None, SHARDED)
    model = _wrapped(ours, ShardingStrategy.FULL_SHARD)
    with pytest.raises(TypeError, match="a communication hook is called, and a str can't be"):
        model.register_comm_hook(None, "hook")
    model.register_comm_hook(_state(SHARDED), SHARDED)
    with pytest.raises(ValueError, match=f"^rank {rank}: .* has a communication hook"):
        model.register_comm_hook(_state(SHARDED), SHARDED)
    with pytest.raises(ValueError, match=f"^rank {rank}: .* is for the outermost wrapper"):
        model.first.register_comm_hook(_state(SHARDED), SHARDED)
    model(torch.ones(4, 5)).sum().backward()


def _goes_on(model: nn.Module) -> None:
    """The next backward has the gradients of a model without a hook."""
    model.zero_grad()
    model(torch.ones(4, 5)).sum().backward()
    reference = _wrapped(ours, ShardingStrategy.FULL_SHARD)
    reference(torch.ones(4, 5)).sum().backward()
    assert_same([gradients(ours, model), gradients(ours, reference)])


def _hook_that_raises(rank: int) -> None:
    model = _wrapped(ours, ShardingStrategy.FULL_SHARD)
    raises = [True]

    def hook(state: Any, gradient: Tensor, shard: Tensor) -> None:
        if raises[0]:
            raise ZeroDivisionError("a user's error")
        SHARDED(state, gradient, shard)

    model.register_comm_hook(_state(SHARDED), hook)
    with pytest.raises(ZeroDivisionError, match="a user's error"):
        model(torch.ones(4, 5)).sum().backward()
    raises[0] = False
    _goes_on(model)


def _while_patched(rank: int) -> None:
    with patch():
        model = _wrapped(torch.distributed.fsdp, ShardingStrategy.FULL_SHARD)
        assert isinstance(model, ours.FullyShardedDataParallel)
        calls = []

        def hook(state: Any, gradient: Tensor, shard: Tensor) -> None:
            calls.append(state)
            SHARDED(_state(SHARDED), gradient, shard)

        model.register_comm_hook("state", hook)
        model(torch.ones(4, 5)).sum().backward()
        assert calls == ["state"] * 3


def _hooks_that_reach_their_model(rank: int) -> None:
    """They do not keep it, nor do those of ``set_all_reduce_hook``."""

    class Reaches:
        def __init__(self, model: nn.Module) -> None:
            self.model = model

        def __call__(self, *tensors: Any) -> None:
            pass

    model = _wrapped(ours, ShardingStrategy.FULL_SHARD)
    model.register_comm_hook(None, Reaches(model))
    other = ours.fully_shard(_Net().to(DEVICE))
    other.set_all_reduce_hook(Reaches(other))
    gone = weakref.ref(model), weakref.ref(other)
    del model, other
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def _one_rank_raises(rank: int) -> None:
    """It says what, its peers that it has; all can go on."""
    model = _wrapped(ours, ShardingStrategy.FULL_SHARD)
    raises = [rank == 1]

    def hook(state: Any, gradient: Tensor, shard: Tensor) -> None:
        SHARDED(state, gradient, shard)
        if raises[0]:
            shard.resize_(3)  # of no use to anybody

    model.register_comm_hook(_state(SHARDED), hook)
    loss = model(torch.ones(4, 5)).sum()
    if rank == 1:
        with pytest.raises(RuntimeError, match=r"[Ss]ize"):
            loss.backward()
    else:
        loss.backward()
    raises[0] = False
    _goes_on(model)


def test_torchs_hooks() -> None:
    run_checks(4, _torchs_hooks)


def test_what_a_hook_gets_and_gives() -> None:
    run_checks(
        4, _what_a_hook_gets, _skipped_by_some_or_all, _refused, _hook_that_raises, _while_patched
    )


def test_hooks_and_what_becomes_of_their_model() -> None:
    run_checks(4, _hooks_that_reach_their_model, _one_rank_raises)
