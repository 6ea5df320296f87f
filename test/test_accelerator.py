"""A device that nothing here knows by name (``simgpu/accelerator``: PrivateUse1, with a backend of
its own for collectives): the wrapper, state dicts, saves and loads have to take it as they take
CUDA's. Each rank's simulator finds races, too early reads by the host, and deadlocks."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Net, batch
from ranks import SIMULATED, RankError, run_ranks
from simgpu import simgpu
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor
from training import full, loss_of, mesh_of, wrap, wrap_fsdp2

import torch_hsdp_ckpt as h

pytestmark = pytest.mark.skipif(
    SIMULATED or not (simgpu.LIBRARIES / "simgpu_accelerator.so").exists(),
    reason="the simulated accelerator is not built (HSDP_CKPT_TESTS=1), or GPUs are simulated",
)
BACKEND = "cpu:gloo,simulated:simccl"
SHAPES = ((2, 2), (4,))


def _net() -> Net:
    """Weights that divide evenly, biases that are packed, a head with fewer rows than ranks."""
    torch.manual_seed(0)
    return Net(16, 32, 3, 3)


def _wrap_fully_shard(net: Net, shape: tuple[int, ...]) -> Net:
    net = net.to("simulated")
    for block in net.blocks:
        h.fully_shard(block, mesh=mesh_of(shape, "simulated"))
    return h.fully_shard(net, mesh=mesh_of(shape, "simulated"))


def _wrap_fsdp(net: Net, shape: tuple[int, ...]) -> nn.Module:
    return wrap(net, shape, "simulated")


FACES = (_wrap_fully_shard, _wrap_fsdp)


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: range) -> None:
    for step in steps:
        loss_of(model, batch(_net(), step, rank).to("simulated", non_blocking=True)).backward()
        optimizer.step()
        optimizer.zero_grad()


def _values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: full(p).cpu() for name, p in model.named_parameters()}


def _trains(rank: int) -> None:
    for shape in SHAPES:
        theirs = wrap_fsdp2(_net(), shape, "simulated")
        _train(theirs, _optimizer(theirs), rank, range(4))
        expected = _values(theirs)
        torch.accelerator.synchronize()
        sys.modules["simgpu_accelerator"].poison_frees(True)
        for make in FACES:
            ours = make(_net(), shape)
            assert all(p.device.type == "simulated" for p in ours.parameters())
            _train(ours, _optimizer(ours), rank, range(4))
            values = _values(ours)
            assert values.keys() == expected.keys()
            for name, value in values.items():
                assert torch.equal(value, expected[name]), (shape, name)


def test_training_has_the_bits_of_torchs_fully_shard() -> None:
    run_ranks(_trains, 4, backend=BACKEND)


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))


def _leaves(state: dict[str, Any]) -> list[torch.Tensor]:
    """Copies on the CPU of what this rank holds."""
    tensors = [v for v in torch.utils._pytree.tree_leaves(state) if isinstance(v, torch.Tensor)]
    return [(v.to_local() if isinstance(v, DTensor) else v).detach().cpu().clone() for v in tensors]


def _zeros_like(state: dict[str, Any]) -> dict[str, Any]:
    return torch.utils._pytree.tree_map(
        lambda v: torch.zeros_like(v) if isinstance(v, torch.Tensor) else v, state
    )


def _has_loaded(state: dict[str, Any], path: str, expected: list[torch.Tensor]) -> bool:
    target = _zeros_like(state)
    h.load(target, checkpoint_id=path)
    loaded = _leaves(target)
    return all(torch.equal(a, b) for a, b in zip(loaded, expected, strict=True))


def _saves(rank: int, path: str) -> None:
    for make in FACES:
        model = make(_net(), (2, 2))
        optimizer = _optimizer(model)
        _train(model, optimizer, rank, range(2))
        place = f"{path}/{make.__name__}"
        state = _state(model, optimizer)
        h.save(state, checkpoint_id=f"{place}/saved")
        assert _has_loaded(state, f"{place}/saved", _leaves(state))

        for step, snapshot in enumerate(("lazy", "copy", "verify"), start=2):
            loss_of(model, batch(_net(), step, rank).to("simulated")).backward()
            state = _state(model, optimizer)
            expected, values = _leaves(state), _values(model)
            future = h.async_save(state, checkpoint_id=f"{place}/{snapshot}", snapshot=snapshot)
            optimizer.step()  # its kernels are queued behind the copies
            optimizer.zero_grad()
            future.result(60)
            assert _has_loaded(state, f"{place}/{snapshot}", expected), snapshot
            now = _values(model)
            assert not any(torch.equal(value, now[name]) for name, value in values.items())

        other = make(_net(), (4,))
        others = _optimizer(other)
        _train(other, others, rank, range(1))
        state = _state(other, others)
        h.load(state, checkpoint_id=f"{place}/verify")
        set_state_dict(
            other, others, model_state_dict=state["model"], optim_state_dict=state["optim"]
        )
        assert all(torch.equal(value, values[name]) for name, value in _values(other).items())


def test_what_is_saved_has_the_values_of_the_call(tmp_path: Path) -> None:
    run_ranks(_saves, 4, str(tmp_path), backend=BACKEND)


def _is_whole(rank: int) -> None:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    for make in FACES:
        model = make(_net(), (2, 2))
        _train(model, _optimizer(model), rank, range(2))
        values = _values(model)
        whole = get_model_state_dict(model, options=options)
        assert bool(whole) == (rank == 0)
        if rank == 0:
            assert all(torch.equal(whole[name], value) for name, value in values.items())
        other = make(_net(), (4,))
        from_first = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(other, whole, options=from_first)
        assert all(torch.equal(value, values[name]) for name, value in _values(other).items())
    with h.FullyShardedDataParallel.state_dict_type(model, h.StateDictType.FULL_STATE_DICT):
        everywhere = model.state_dict()
    assert all(torch.equal(everywhere[name].cpu(), value) for name, value in values.items())


def _is_the_default(rank: int) -> None:
    """Nobody names the device, or only by its number."""
    _is_whole(rank)
    for model in (h.fully_shard(_net()), h.FullyShardedDataParallel(_net(), device_id=rank)):
        assert next(model.parameters()).device == torch.device("simulated", rank)


def test_full_state_dicts_and_the_default_device() -> None:
    run_ranks(_is_the_default, 4, backend=BACKEND)


def _lacks_a_wait(rank: int, waits: bool) -> None:
    x = torch.full((1000,), 2.0).to("simulated")
    torch.accelerator.synchronize()
    y = x * x
    side = torch.Stream("simulated")
    if waits:
        side.wait_stream(torch.accelerator.current_stream())
    with side:
        z = y + 1
    torch.accelerator.current_stream().wait_stream(side)
    assert not waits or z.sum().item() == 5000


def test_what_is_wrong_is_found() -> None:
    run_ranks(_lacks_a_wait, 1, True, backend=BACKEND)
    with pytest.raises(RankError, match=r"race: read by .aten::add"):
        run_ranks(_lacks_a_wait, 1, False, backend=BACKEND)
