"""Modules under ``fully_shard`` as torch's own code sees them: its classes, its registry, its
pipelining, and ends of backwards by hand."""

import copy
import inspect
import pickle
import weakref
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp as torchs
from device import DEVICE
from ranks import run_checks
from sides import HERE, SIDES, assert_same, layers, sharded, whole
from torch import Tensor, nn
from torch.distributed._composable import replicate_with_fsdp
from torch.distributed._composable.contract import _get_registry
from torch.distributed._composable.replicate import replicate as replicate_by_ddp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)
from torch.distributed.tensor import DTensor
from training import mesh_of

import torch_hsdp_ckpt as ours
from torch_hsdp_ckpt.hsdp.fsdp_module import fsdp_runner

REPLICATES = [replicate_by_ddp, replicate_with_fsdp.replicate]
# 2.11's has fewer methods than 2.15's.
METHODS = [name for name, value in vars(torchs.FSDPModule).items() if inspect.isfunction(value)]


def test_every_method_of_torchs_class_is_overridden() -> None:
    """Torch's would look for a state of torch's own."""
    assert {"reshard", "_apply", "_get_fsdp_state", "_set_unshard_async_op"} <= set(METHODS)
    assert set(METHODS) <= vars(ours.FSDPModule).keys()


@pytest.mark.parametrize("name", METHODS)
def test_methods_take_what_torchs_take(name: str) -> None:
    method = getattr(ours.FSDPModule, name)
    if "Not supported" in (method.__doc__ or ""):
        return
    asked, taken = (
        inspect.signature(each).parameters for each in (getattr(torchs.FSDPModule, name), method)
    )
    # Older ones of torch pass some on as they are.
    passes_on = any(each.kind is each.VAR_POSITIONAL for each in asked.values())
    assert passes_on or [(each.name, each.kind, each.default) for each in asked.values()] == [
        (each.name, each.kind, each.default) for each in taken.values()
    ]


def _classes(rank: int) -> None:
    model = sharded(ours, layers(3))
    assert all(isinstance(m, torchs.FSDPModule) for m in model.modules())
    assert type(model[0]) is type(model[1]) and isinstance(model[0], nn.Linear)
    # A part of a container is one of the original class, and computes with the same modules.
    part = model[1:]
    assert type(part) is nn.Sequential and part[0] is model[1]
    handle = model[0].unshard(async_op=True)
    assert isinstance(handle, torchs.UnshardHandle)
    handle.wait()
    assert model[0].weight.shape == (4, 4) and not isinstance(model[0].weight, DTensor)
    model[0].reshard()
    assert isinstance(model[0].weight, DTensor)
    with pytest.raises(TypeError, match="can't be copied or pickled"):
        copy.deepcopy(model)
    with pytest.raises(TypeError, match="can't be copied or pickled"):
        pickle.dumps(model)
    # A class that is put between, as some frameworks do.
    model.__class__ = type("Between", (type(model),), {})
    assert model(torch.ones(2, 4)).shape == (2, 4)
    model.double()
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert model(torch.ones(2, 4, dtype=torch.float64)).dtype == torch.float64
    state = get_model_state_dict(model)
    for value in state.values():
        value.zero_()
    set_model_state_dict(model, state)
    assert not model(torch.ones(2, 4, dtype=torch.float64)).any()


def _registry(rank: int) -> None:
    model = sharded(ours, layers(3))
    state = torchs.fully_shard.state(model)
    assert state is model._get_fsdp_state() is torchs.fully_shard.state(model)
    inside = [torchs.fully_shard.state(child) for child in model]
    assert state._state_ctx.all_states == [state, *inside]
    assert "fully_shard" in _get_registry(model)
    contexts = {id(each._comm_ctx) for each in (state, *inside)}
    assert len(contexts) == 4
    ours.share_comm_ctx(list(model))
    assert len({id(each._comm_ctx) for each in inside}) == 1
    both = nn.Sequential(ours.FullyShardedDataParallel(nn.Linear(4, 4), device_id=HERE))
    ours.fully_shard(both)
    assert len(torchs.fully_shard.state(both)._state_ctx.all_states) == 1
    if hasattr(torchs, "share_comm_ctx"):
        torchs.share_comm_ctx([model, model[0]])
        assert model._get_fsdp_state()._comm_ctx is model[0]._get_fsdp_state()._comm_ctx


def _wrapped_by_both(rank: int) -> None:
    """Each around the other's is an error, at once."""
    net = layers(3)
    torchs.fully_shard(net[1], mesh=mesh_of((4,)))
    for wrap in (ours.fully_shard, ours.FullyShardedDataParallel):
        with pytest.raises(ValueError, match=f"^rank {rank}: .*own wrapper .* to 1 already"):
            wrap(net)
        with pytest.raises(ValueError, match=r"own wrapper .* to it already"):
            wrap(net[1])
    net = layers(3)
    torchs.FullyShardedDataParallel(net[1], device_id=HERE)
    net[0] = torchs.FullyShardedDataParallel(net[0], device_id=HERE)
    with pytest.raises(ValueError, match=f"^rank {rank}: .*own wrapper .* to 0 already"):
        ours.fully_shard(net)
    net = layers(3)
    ours.fully_shard(net[1], mesh=mesh_of((4,)))
    with pytest.raises(AssertionError, match="has already been applied"):
        torchs.fully_shard(net[1])
    net[2] = ours.FullyShardedDataParallel(net[2], device_mesh=mesh_of((4,)))
    for part, name in ((net[1], "FSDPLinear"), (net[2], "FullyShardedDataParallel")):
        torchs_is = f"^rank {rank}: module {name}: torch's .* is applied to a module around it"
        for given in ({}, {"mesh": mesh_of((4,))}, {"mesh": mesh_of((2, 2))}):
            with pytest.raises(ValueError, match=torchs_is):
                torchs.fully_shard(nn.Sequential(part), **given)
        with pytest.raises(ValueError, match=torchs_is):
            torchs.FullyShardedDataParallel(nn.Sequential(part), device_id=HERE)
    assert net(torch.ones(2, 4)).shape == (2, 4)


def _beside_replicate(rank: int) -> None:
    """Modules under torch's ``replicate`` inside are its own; around ours it leaves ours alone."""
    for replicate in REPLICATES:
        outcomes = []
        for side in SIDES:
            model = layers(3)
            replicate(model[1])
            side.fully_shard(model[0], mesh=mesh_of((2, 2)))
            side.fully_shard(model, mesh=mesh_of((2, 2)))
            model(torch.full((2, 4), rank + 1.0)).square().sum().backward()
            assert isinstance(model[0].weight, DTensor) and isinstance(model[2].weight, DTensor)
            assert not isinstance(model[1].weight, DTensor) or replicate is not replicate_by_ddp
            outcomes.append(_gradients(model))
        assert all(map(torch.equal, *outcomes)), replicate
    model = layers(3)
    ours.fully_shard(model[0], mesh=mesh_of((4,)))
    replicate_by_ddp(model)
    model(torch.full((2, 4), rank + 1.0)).square().sum().backward()
    assert isinstance(model[0].weight.grad, DTensor) and not isinstance(model[1].weight, DTensor)
    everyones = [torch.empty_like(model[1].weight.grad) for _ in range(4)]
    dist.all_gather(everyones, model[1].weight.grad)
    assert all(torch.equal(everyones[0], grad) for grad in everyones)


def _gradients(model: nn.Module) -> list[Tensor]:
    return [whole(p.grad).clone() for p in model.parameters()]


def _ended_by_hand(rank: int) -> None:
    """Backwards without synchronisation, and one end for all of them: as the last of them with
    it."""
    for mesh in (mesh_of((2, 2)), mesh_of((4,))):
        found = []
        for by_hand, async_op in ((False, False), (True, False), (True, True)):
            model = sharded(ours, layers(3), mesh=mesh)
            if by_hand:
                assert model.finalize_backward(async_op=async_op) is None or async_op
                model.set_manual_backward_finalization(True)
            for _ in range(2):
                for microbatch in range(3):
                    is_last = microbatch == 2 and not by_hand
                    model.set_requires_gradient_sync(is_last)
                    model.set_reshard_after_backward(is_last)
                    model(torch.full((2, 4), rank + microbatch + 1.0)).square().sum().backward()
                if by_hand:
                    assert not any(isinstance(p, DTensor) for p in model.parameters()), "kept"
                    model.set_requires_gradient_sync(True)
                    model.set_reshard_after_backward(True)
                    handle = model.finalize_backward(async_op=async_op)
                    assert isinstance(handle, ours.GradientReductionHandle) == async_op
                    if async_op:
                        with pytest.raises(RuntimeError, match=f"^rank {rank}: .* wait for"):
                            model.finalize_backward()
                        handle.wait()
                        handle.wait()
                assert all(isinstance(p, DTensor) for p in model.parameters())
                gradients = _gradients(model)
                model.zero_grad()
            found.append(gradients)
        assert all(map(torch.equal, found[0], found[1]))
        assert all(map(torch.equal, found[0], found[2]))


def _alternating(rank: int) -> None:
    """Backwards with and without synchronisation before the end by hand."""
    if not hasattr(torchs.FSDPModule, "finalize_backward"):
        return
    found = []
    for side in SIDES:
        model = sharded(side, layers(3), mesh=mesh_of((2, 2)))
        model.set_manual_backward_finalization(True)
        for microbatch in range(4):
            model.set_requires_gradient_sync(microbatch % 2 == 1)
            model(torch.full((2, 4), rank + microbatch + 1.0)).square().sum().backward()
        model.set_requires_gradient_sync(True)
        model.finalize_backward()
        found.append(_gradients(model))
    if DEVICE == "cpu":
        assert all(map(torch.equal, *found))
    else:  # products of matrices depend on where these lie
        assert_same(found)


def _handle_and_other_calls(rank: int) -> None:
    """Whatever needs the gradients takes them, and the handle has nothing left to wait for."""
    for call in ("state_dict", "zero_grad", "double"):
        model = sharded(ours, layers(3))
        model.set_manual_backward_finalization(True)
        model(torch.ones(2, 4)).sum().backward()
        handle = model.finalize_backward(async_op=True)
        getattr(model, call)()
        handle.wait()
        assert (model[0].weight.grad is None) == (call == "zero_grad")
    model(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
    handle = model.finalize_backward(async_op=True)
    gone = weakref.ref(fsdp_runner(model).root)
    del model, handle
    assert gone() is None, "held by what it holds"


def _modes_and_when_they_change(rank: int) -> None:
    model = sharded(ours, layers(3))
    model.set_manual_backward_finalization(True)
    model.set_requires_gradient_sync(False)
    model(torch.ones(2, 4)).sum().backward()
    model.set_manual_backward_finalization(True)
    with pytest.raises(RuntimeError, match=f"^rank {rank}: .* wait for finalize_backward, or"):
        model.set_manual_backward_finalization(False)
    # What is said to a module inside leaves the mode as it is.
    model[0].set_is_last_backward(True)
    model.set_requires_gradient_sync(True)
    model(torch.ones(2, 4)).sum().backward()
    handle = model.finalize_backward(async_op=True)
    handle.wait()
    model.set_manual_backward_finalization(False)


def _state_between_microbatches(rank: int) -> None:
    """Whoever asks for a state gets the sharded one, and an optimizer finds its parameters."""
    for side in SIDES:
        model = sharded(side, layers(3), mesh=mesh_of((2, 2)))
        optimizer = torch.optim.Adam(model.parameters())
        for is_last in (False, False, True):
            model.set_requires_gradient_sync(is_last)
            model.set_reshard_after_backward(is_last)
            model(torch.ones(2, 4)).sum().backward()
            states, of_optimizer = get_state_dict(model, optimizer)
            assert all(isinstance(value, DTensor) for value in states.values())
            assert set(of_optimizer["state"]) == set(states)
            assert all(isinstance(p, DTensor) for p in model.parameters())


def _ended_by_hand_after_an_error(rank: int) -> None:
    model = sharded(ours, layers(3))
    model.set_manual_backward_finalization(True)
    model(torch.ones(2, 4)).sum().backward()
    handle = model.finalize_backward(async_op=True)
    model.reset_iter_state()
    with pytest.raises(RuntimeError, match=f"^rank {rank}: .* reset_iter_state has ended"):
        handle.wait()
    with pytest.raises(RuntimeError, match=f"^rank {rank}: .* is for the outermost module"):
        model[0].set_manual_backward_finalization(False)

    def within(*_: object) -> None:
        model.finalize_backward()

    model[1].register_forward_hook(within)
    with pytest.raises(RuntimeError, match="finalize_backward has to come after it"):
        model(torch.ones(2, 4))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class _Stages:
    """A rank's part of a model of 4 parts, 2 blocks each, on 2 pipeline ranks x 2 shards."""

    microbatches = 8

    def __init__(self, side: ModuleType, kind: type, mesh: DeviceMesh) -> None:
        torch.manual_seed(0)
        parts = [nn.Sequential(_Block(), _Block()).to(DEVICE) for _ in range(4)]
        self.rank = mesh["pp"].get_local_rank()
        self.is_single = kind is Schedule1F1B
        if self.is_single:
            parts = [nn.Sequential(*parts[:2]), nn.Sequential(*parts[2:])]
        here = range(self.rank, len(parts), 2)
        self.reductions = 0
        for part in (parts[i] for i in here):
            blocks = [m for m in part.modules() if isinstance(m, _Block)]
            for module in (*blocks, part):
                side.fully_shard(module, mesh=mesh["shard"], reshard_after_forward=False)
            for block in blocks:
                block.set_all_reduce_hook(self._count)
        group = mesh["pp"].get_group()
        stages = [PipelineStage(parts[i], i, len(parts), HERE, group=group) for i in here]
        given = stages[0] if self.is_single else stages
        self.schedule = kind(given, self.microbatches, loss_fn=nn.functional.mse_loss)
        self.parameters = [p for i in here for p in parts[i].parameters()]
        self.blocks = sum(isinstance(m, _Block) for i in here for m in parts[i].modules())

    def _count(self, _: Tensor) -> None:
        self.reductions += 1

    def step(self, x: Tensor) -> list[float]:
        losses: list[Tensor] = []
        if self.rank == 0:
            self.schedule.step(x)
        else:
            self.schedule.step(target=x, losses=losses)
        return [loss.item() for loss in losses]


def _pipelining(rank: int) -> None:
    mesh = init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("pp", "shard"))
    for kind in (Schedule1F1B, ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble):
        outcomes = []
        for side in SIDES:
            stages = _Stages(side, kind, mesh)
            optimizer = torch.optim.Adam(stages.parameters, lr=0.01)
            losses = []
            for step in range(3):
                stages.reductions = 0
                torch.manual_seed(10 * step + mesh["shard"].get_local_rank())
                losses.append(stages.step(torch.randn(2 * stages.microbatches, 8).to(DEVICE)))
                optimizer.step()
                optimizer.zero_grad()
                # The first step runs a backward more, from which torch learns shapes.
                assert step == 0 or stages.reductions == stages.blocks, "one a step and unit"
            outcomes.append((losses, [whole(p) for p in stages.parameters]))
        assert outcomes[0][0] == outcomes[1][0]
        assert all(map(torch.equal, outcomes[0][1], outcomes[1][1])), kind


def test_classes_and_registry() -> None:
    run_checks(4, _classes, _registry, _wrapped_by_both, _beside_replicate)


def test_backwards_that_are_ended_by_hand() -> None:
    run_checks(
        4,
        _ended_by_hand,
        _ended_by_hand_after_an_error,
        _alternating,
        _handle_and_other_calls,
        _modes_and_when_they_change,
        _state_between_microbatches,
    )


def test_torchs_pipelining() -> None:
    run_checks(4, _pipelining)
