"""Collectives and memory of a user's own, by torch FSDP2's protocol, and the other settings of how
modules communicate: torch's numbers with the same settings."""

import functools
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp as torchs
from device import DEVICE, cpu_only
from ranks import run_checks
from sides import SIDES, layers, sharded
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from training import mesh_of

import torch_hsdp_ckpt as ours

BF16, FP32 = torch.bfloat16, torch.float32


class _Memory:
    """Notes what it is asked for, and what is sent: a dtype, and what a reduction does."""

    def __init__(self) -> None:
        self.allocated: set[int] = set()
        self.calls: list[tuple[torch.dtype, Any]] = []

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        memory = torch.empty(*size, dtype=dtype, device=device)
        self.allocated.add(memory.data_ptr())
        return memory


class Gather(_Memory, AllGather):
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        assert output_tensor.data_ptr() in self.allocated
        self.calls.append((output_tensor.dtype, None))
        return dist.all_gather_into_tensor(output_tensor, input_tensor, group, async_op)


class Scatter(_Memory, ReduceScatter):
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        assert {output_tensor.data_ptr(), input_tensor.data_ptr()} <= self.allocated
        self.calls.append((output_tensor.dtype, op))
        return dist.reduce_scatter_tensor(output_tensor, input_tensor, op, group, async_op)


def _train(side: ModuleType, settings: Any, **arguments: Any) -> list[Tensor]:
    """Three steps of two backwards each, of which the first reduces to shards only."""
    model = sharded(side, layers(3, 6), mesh=mesh_of((2, 2)), **arguments)
    settings(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        for part in range(2):
            model.set_requires_all_reduce(part == 1)
            generator = torch.Generator().manual_seed(100 * step + 10 * part + dist.get_rank())
            model(torch.randn(4, 6, generator=generator).to(DEVICE)).square().mean().backward()
        optimizer.step()
    return [parameter.to_local() for parameter in model.parameters()]


def _same(settings: Any, **arguments: Any) -> None:
    outcomes = [_train(side, settings, **arguments) for side in SIDES]
    for found, wanted in zip(*outcomes, strict=True):
        assert torch.equal(found, wanted)


def _with_comms(gathers: list[Gather], scatters: list[Scatter], model: nn.Module) -> None:
    for module in model.children():
        gathers.append(Gather())
        module.set_custom_all_gather(gathers[-1])
        scatters.append(Scatter())
        module.set_custom_reduce_scatter(scatters[-1])


def _sends_by_a_users_code(rank: int) -> None:
    for param_dtype, reduce_dtype in ((None, None), (BF16, FP32), (BF16, BF16)):
        policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
        outcomes = []
        for side in SIDES:
            gathers: list[Gather] = []
            scatters: list[Scatter] = []
            settings = functools.partial(_with_comms, gathers, scatters)
            outcomes.append(_train(side, settings, mp_policy=policy))
            assert len(gathers) == len(scatters) == 3
            gathered, reduced = param_dtype or FP32, reduce_dtype or FP32
            for comm in gathers:
                assert {dtype for dtype, _ in comm.calls} == {gathered}
            for comm in scatters:
                assert [dtype for dtype, _ in comm.calls] == [reduced] * 6
                assert {op for _, op in comm.calls} == {dist.ReduceOp.AVG}
        for found, wanted in zip(*outcomes, strict=True):
            assert torch.equal(found, wanted)


def _sums(scatters: list[Scatter], model: nn.Module) -> None:
    for module in model.children():
        scatters.append(Scatter())
        module.set_custom_reduce_scatter(scatters[-1])
        module.set_force_sum_reduction_for_comms(True)


def _adds_up_only(rank: int) -> None:
    outcomes = []
    for side in SIDES:
        scatters: list[Scatter] = []
        outcomes.append(_train(side, functools.partial(_sums, scatters)))
        assert {op for comm in scatters for _, op in comm.calls} == {dist.ReduceOp.SUM}
    for found, wanted in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def _other_settings(model: nn.Module) -> None:
    later = {"set_keep_unsharded_storage": True, "set_reduce_scatter_max_input_buffers": 3}
    for name, value in later.items():
        if isinstance(model, ours.FSDPModule) or hasattr(torchs.FSDPModule, name):
            getattr(model, name)(value)
    for module in model.children():
        module.set_allocate_memory_from_process_group_for_comm(True)


def _settings_that_change_no_numbers(rank: int) -> None:
    _same(_other_settings)


def _keeps_memory(rank: int) -> None:
    """The full parameters' addresses are the same at every gather while that is asked for."""
    model = sharded(ours, layers(2, 64), mesh=mesh_of((2, 2)))
    model.set_keep_unsharded_storage(True)
    seen: list[int] = []
    model[0].register_forward_pre_hook(lambda m, _: seen.append(m.weight.data_ptr()))
    blocks = []
    for _ in range(3):
        model(torch.randn(2, 64, device=DEVICE)).sum().backward()
        blocks.append(torch.empty(64, 64, device=DEVICE))  # takes what is free
    assert len(set(seen)) == 1
    assert model[0].weight.device_mesh is not None  # the sharded one is shown


class _Wrong(Gather):
    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(3, dtype=dtype, device=device)


def _refusals(rank: int) -> None:
    model = sharded(ours, layers(), mesh=mesh_of((2, 2)))
    model[0].set_custom_all_gather(_Wrong())
    message = rf"^rank {rank}: the all-gather of module 0 .* asked for 24 elements .* gave \(3,\)"
    with pytest.raises(RuntimeError, match=message):
        model(torch.ones(1, 4, device=DEVICE))
    for setting in ("set_allocate_memory_from_process_group_for_comm", "set_symm_mem_for_comm"):
        with pytest.raises(ValueError, match=f"^rank {rank}: module FSDPLinear: set_custom_all_ga"):
            getattr(model[0], setting)(True)
    for wrong, error in ((True, TypeError), (1.0, TypeError), (0, ValueError)):
        with pytest.raises(error, match="max_input_buffers"):
            model.set_reduce_scatter_max_input_buffers(wrong)


@cpu_only("it is of streams that the CPU lacks")
def _streams_of_hooks(rank: int) -> None:
    model = sharded(ours, layers(), mesh=mesh_of((4,)))
    with pytest.raises(ValueError, match=f"^rank {rank}: module FSDPLinear: set_all_reduce_hook"):
        model[0].set_all_reduce_hook(lambda _: None, stream=object())


def test_communication_settings() -> None:
    assert SIDES[1] is torchs
    run_checks(
        4,
        _sends_by_a_users_code,
        _adds_up_only,
        _settings_that_change_no_numbers,
        _keeps_memory,
        _refusals,
        _streams_of_hooks,
    )
