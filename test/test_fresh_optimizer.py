"""Resuming into an optimizer that has made no step yet: by each road that the documentation shows,
and by those that frameworks take."""

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from device import DEVICE
from models import NETS, Net
from ranks import run_checks
from states import adam, assert_same, bits, fully_sharded, mesh_of, step, wrapped
from torch import nn, optim
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.optimizer import load_sharded_optimizer_state_dict
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel as TorchFSDP

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt import FullyShardedDataParallel as FSDP

Make = Callable[[Any], optim.Optimizer]

MAKERS: dict[str, Make] = {
    "AdamW": lambda p: optim.AdamW(p, lr=0.05),
    "Adam with decay, one by one": lambda p: optim.Adam(
        p, lr=torch.tensor(0.05), weight_decay=0.1, amsgrad=True, foreach=False
    ),
    "SGD with momentum and decay": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "SGD": lambda p: optim.SGD(p, lr=0.05),
    "NAdam": lambda p: optim.NAdam(p, lr=0.05),
    "ASGD": lambda p: optim.ASGD(p, lr=0.05, weight_decay=0.1),
}


def _shared_directory() -> str:
    """One directory for all ranks, in which each call is given another."""
    box = [tempfile.mkdtemp()]
    dist.broadcast_object_list(box)
    return box[0]


def _example(model: nn.Module, optimizer: optim.Optimizer, path: str) -> None:
    """The README's road, and Accelerate's with FSDP1."""
    state = {"model": model.state_dict(), "optim": FSDP.optim_state_dict(model, optimizer)}
    dcp.load(state, storage_reader=h.FileSystemReader(path))
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(FSDP.optim_state_dict_to_load(model, optimizer, state["optim"]))


def _ours(model: nn.Module, optimizer: optim.Optimizer, path: str) -> None:
    state = {
        "model": model.state_dict(),
        "optim": FSDP.sharded_optim_state_dict(model, optimizer),
    }
    h.load(state, checkpoint_id=path)
    model.load_state_dict(state["model"])
    FSDP.optim_state_dict_to_load(model, optimizer, state["optim"], load_directly=True)


def _torchs_family(model: nn.Module, optimizer: optim.Optimizer, path: str) -> None:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    h.load({"model": of_model, "optim": of_optimizer}, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer)


def _lightnings(model: nn.Module, optimizer: optim.Optimizer, path: str) -> None:
    reader = dcp.FileSystemReader(path)
    state = {"model": model.state_dict()}
    dcp.load(state, storage_reader=reader)
    model.load_state_dict(state["model"])
    read = load_sharded_optimizer_state_dict(model.state_dict(), "optim", reader)
    optimizer.load_state_dict(FSDP.optim_state_dict_to_load(model, optimizer, read["optim"]))


ROADS = [_example, _ours, _torchs_family, _lightnings]


def _of_face(face: str, seed: int, make: Make) -> tuple[nn.Module, optim.Optimizer]:
    net = NETS["uneven"](seed)
    mesh = mesh_of(2, 2)
    model = wrapped(net, mesh) if face == "wrapped" else fully_sharded(net, mesh)
    return model, make(list(model.parameters()))


def _saved(face: str, make: Make, rank: int, steps: int) -> tuple[nn.Module, Any, str]:
    model, optimizer = _of_face(face, 1, make)
    for number in range(steps):
        step(model, optimizer, "uneven", number, rank)
    path = _shared_directory()
    state = {"model": model.state_dict(), "optim": FSDP.optim_state_dict(model, optimizer)}
    h.save(state, checkpoint_id=path)
    return model, optimizer, path


def _goes_on(rank: int, one: tuple[Any, Any], other: tuple[Any, Any], where: str) -> None:
    """The same steps from here, to the bit."""
    for model, optimizer in (one, other):
        for number in range(10, 12):
            step(model, optimizer, "uneven", number, rank)
    other_state = {**bits(other[0].state_dict()), "calls": one[0].state_dict()["calls"]}
    assert_same(one[0].state_dict(), other_state, where)
    assert_same(*(FSDP.optim_state_dict(*each) for each in (one, other)), where)


def _every_road(rank: int) -> None:
    for face in ("wrapped", "fully_shard"):
        for road in ROADS:
            model, optimizer, path = _saved(face, MAKERS["AdamW"], rank, 3)
            other, fresh = _of_face(face, 2, MAKERS["AdamW"])
            road(other, fresh, path)
            assert_same(fresh.state_dict(), optimizer.state_dict())
            _goes_on(rank, (model, optimizer), (other, fresh), f"{face}, {road.__name__}")


def _every_optimizer(rank: int) -> None:
    """Also from before the first step, which both sides then make."""
    for name, make in MAKERS.items():
        for steps in (2, 0):
            model, optimizer, path = _saved("wrapped", make, rank, steps)
            other, fresh = _of_face("wrapped", 2, make)
            _example(other, fresh, path)
            where = f"{name}, {steps} steps"
            _goes_on(rank, (model, optimizer), (other, fresh), where)


def _stays_as_it_is(rank: int) -> None:
    """Being asked for its state changes nothing about an optimizer, its gradients or its user's."""
    model, _ = _of_face("wrapped", 1, adam)
    model.module.head.bias.requires_grad_(False)
    rate = torch.tensor(0.05)
    optimizer = optim.Adam(model.parameters(), lr=rate, weight_decay=0.1, foreach=False)
    steps: list[Any] = []
    optimizer.register_step_pre_hook(lambda *_: steps.append(1))
    optim.lr_scheduler.StepLR(optimizer, 1)
    step_on_instance = optimizer.step
    model(torch.ones(2, 7)).sum().backward()
    before = [bits(model.state_dict()), [p.grad for p in model.parameters()]]
    groups = [dict(group) for group in optimizer.param_groups]
    state = FSDP.optim_state_dict(model, optimizer)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert state["state"].keys() == trained and "head.bias" not in trained
    for entry in state["state"].values():
        assert not any(value.count_nonzero().item() for value in _locals(entry))
    assert state["param_groups"][0]["lr"] is rate
    assert not optimizer.state and not steps and optimizer.step is step_on_instance
    assert not getattr(optimizer, "_opt_called", False)
    assert [dict(group) for group in optimizer.param_groups] == groups
    assert_same(model.state_dict(), before[0])
    assert all(p.grad is g for p, g in zip(model.parameters(), before[1], strict=True))
    with FSDP.state_dict_type(model, h.StateDictType.FULL_STATE_DICT):
        whole = FSDP.optim_state_dict(model, optimizer)
    assert whole["state"]["head.weight"]["exp_avg"].shape == (3, 7)


def _locals(entry: dict[str, Any]) -> list[torch.Tensor]:
    return [getattr(value, "_local_tensor", value) for value in entry.values()]


class _Wrapping(optim.Optimizer):
    """As Accelerate's: it shows another optimizer's groups and state, and may leave steps out."""

    def __init__(self, optimizer: optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    def state_dict(self) -> Any:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.optimizer.load_state_dict(state_dict)

    def step(self, closure: Any = None) -> None:
        raise AssertionError("gradients are being accumulated")


def _wrapped_optimizer(rank: int) -> None:
    model, optimizer, path = _saved("wrapped", adam, rank, 3)
    net = NETS["uneven"](2)
    inner = adam(list(net.parameters()))
    outer = _Wrapping(inner)
    outer.load_state_dict(outer.state_dict())
    other = wrapped(net, mesh_of(2, 2))  # Accelerate's order: the optimizer is made before
    _example(other, outer, path)
    assert_same(inner.state_dict(), optimizer.state_dict())
    _goes_on(rank, (model, optimizer), (other, inner), "wrapped optimizer")


def _no_trial_step(rank: int) -> None:
    model, _ = _of_face("wrapped", 1, adam)
    optimizer = optim.LBFGS(model.parameters())
    with pytest.raises(RuntimeError, match=rf"rank {rank}: LBFGS has made no step yet.*closure"):
        FSDP.optim_state_dict(model, optimizer)
    assert not optimizer.state and all(p.grad is None for p in model.parameters())


def _missing(rank: int) -> None:
    """Parameters that no step has reached have no state in a checkpoint: all are named. With
    partial loads they keep the state that a first step begins with."""

    def make(seed: int) -> tuple[FSDP, optim.Optimizer]:
        net = NETS["uneven"](seed)
        net.unused = nn.Linear(4, 4)
        model = wrapped(net, mesh_of(2, 2))
        return model, adam(list(model.parameters()))

    model, optimizer = make(1)
    step(model, optimizer, "uneven", 0, rank)
    path = _shared_directory()
    h.save({"optim": FSDP.optim_state_dict(model, optimizer)}, checkpoint_id=path)
    other, fresh = make(2)
    state = {"optim": FSDP.optim_state_dict(other, fresh)}
    with pytest.raises(h.CheckpointError) as error:
        h.load(state, checkpoint_id=path)
    keys = [f"unused.{each}.{key}" for each in ("weight", "bias") for key in ("step", "exp_avg")]
    assert all(f"optim.state.{key}" in str(error.value) for key in keys)
    h.load(state, checkpoint_id=path, planner=DefaultLoadPlanner(allow_partial_load=True))
    FSDP.optim_state_dict_to_load(other, fresh, state["optim"], load_directly=True)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    _goes_on_with_unused(rank, (model, optimizer), (other, fresh))


def _goes_on_with_unused(rank: int, *pairs: tuple[FSDP, optim.Optimizer]) -> None:
    """One that gets its first gradient after the resume goes on as if there had been none."""
    for model, optimizer in pairs:
        optimizer.zero_grad()
        x = torch.ones(2, 7) * (rank + 1)
        model(x).sum().backward()
        for parameter in model.module.unused.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert_same(*(model.state_dict() for model, _ in pairs))


def _sharded_tensors(rank: int) -> None:
    """ShardedTensors over all ranks, with uneven rows and ranks without any; beside stock FSDP1."""
    net = Net(7, 13, 3)
    stock = TorchFSDP(NETS["uneven"](), device_id=torch.device(DEVICE), use_orig_params=True)
    models = [(stock, TorchFSDP), (FSDP(net, device_mesh=mesh_of(4)), FSDP)]
    results = []
    for model, side in models:
        if side is FSDP:
            with FSDP.summon_full_params(model):
                model.module.load_state_dict(NETS["uneven"]().state_dict())
        optimizer = adam(list(model.parameters()))
        with side.state_dict_type(model, h.StateDictType.SHARDED_STATE_DICT):
            step(model, optimizer, "uneven", 0, rank)
            path = _shared_directory()
            h.save({"optim": side.optim_state_dict(model, optimizer)}, checkpoint_id=path)
            reader = dcp.FileSystemReader(path)
            read = load_sharded_optimizer_state_dict(model.state_dict(), "optim", reader)
            fresh = adam(list(model.parameters()))
            loadable = side.optim_state_dict_to_load(model, fresh, read["optim"])
        fresh.load_state_dict(loadable)
        step(model, fresh, "uneven", 1, rank)
        with side.state_dict_type(model, h.StateDictType.FULL_STATE_DICT):
            results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-6)


def _bad_sharded_tensors(rank: int) -> None:
    model, optimizer, path = _saved("wrapped", adam, rank, 1)
    reader = dcp.FileSystemReader(path)

    def read() -> Any:
        return load_sharded_optimizer_state_dict(model.state_dict(), "optim", reader)["optim"]

    state = read()
    state["state"]["head.weight"] = state["state"]["blocks.0.up.weight"]
    with pytest.raises(ValueError, match=r"size mismatch for head\.weight: exp_avg"):
        FSDP.optim_state_dict_to_load(model, optimizer, state)
    state = read()
    if rank == 2:
        del state["state"]["head.weight"]["exp_avg"]
    with pytest.raises(RuntimeError, match=rf"different ShardedTensors \(rank {rank} has"):
        FSDP.optim_state_dict_to_load(model, optimizer, state)
    with pytest.raises(ValueError, match="with rank0_only it has to be whole"):
        FSDP.scatter_full_optim_state_dict(read(), model, optim=optimizer)


def test_every_road_resumes_into_a_fresh_optimizer() -> None:
    run_checks(4, _every_road)


def test_every_optimizer_resumes_after_and_before_its_first_step() -> None:
    run_checks(4, _every_optimizer)


def test_a_state_of_before_the_first_step() -> None:
    run_checks(4, _stays_as_it_is, _wrapped_optimizer, _no_trial_step, _missing)


def test_sharded_tensors_of_torch() -> None:
    run_checks(4, _sharded_tensors, _bad_sharded_tensors)
