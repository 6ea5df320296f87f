"""Optimizers that were made before wrapping, or from lists of parameters that were."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from device import DEVICE
from models import NETS, Block, Net, batch
from ranks import run_checks
from states import adam, assert_same, bits, fully_sharded, mesh_of, step, wrapped
from torch import nn, optim
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel as TorchFSDP
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

from torch_hsdp_ckpt import FullyShardedDataParallel as FSDP
from torch_hsdp_ckpt import fully_shard
from torch_hsdp_ckpt.hsdp.shards import some_are_replaced

Faces = Callable[[Net], nn.Module]


def _auto_wrapped(net: Net) -> nn.Module:
    return wrapped(net, mesh_of(2, 2))


def _wrapped_by_hand(net: Net) -> nn.Module:
    for i, block in enumerate(net.blocks):
        net.blocks[i] = FSDP(block, device_mesh=mesh_of(2, 2))
    return FSDP(net, device_mesh=mesh_of(2, 2))


def _fully(net: Net) -> nn.Module:
    return fully_sharded(net, mesh_of(2, 2))


FACES: list[Faces] = [_auto_wrapped, _wrapped_by_hand, _fully]


def _stock(net: Net) -> nn.Module:
    return TorchFSDP(
        net,
        device_mesh=mesh_of(4),
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        use_orig_params=True,
        device_id=torch.device(DEVICE),
    )


def _grouped(net: nn.Module) -> tuple[optim.Optimizer, optim.lr_scheduler.LRScheduler]:
    """Groups with options of their own, and a scheduler."""
    biases = [p for p in net.parameters() if p.ndim == 1]
    weights = [p for p in net.parameters() if p.ndim == 2]
    groups = [{"params": biases, "weight_decay": 0.0, "lr": 0.05}, {"params": weights}]
    optimizer = optim.AdamW(groups, lr=0.02)
    return optimizer, optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


def _losses(model: nn.Module, optimizers: list[Any], rank: int, steps: int = 3) -> list[float]:
    """The mean over the ranks of each step's loss; ``optimizers``: schedulers among them."""
    losses = []
    for number in range(steps):
        for each in optimizers:
            if isinstance(each, optim.Optimizer):
                each.zero_grad()
        loss = model(batch(NETS["uneven"](), number, rank)).square().mean()
        loss.backward()
        for each in optimizers:
            each.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    return losses


def _with_groups_and_scheduler(rank: int) -> None:
    """Beside stock FSDP1 with use_orig_params, and to the bit as one made after wrapping."""
    nets = [NETS["uneven"]() for _ in range(2 + len(FACES))]
    stock = list(_grouped(nets[0]))
    expected = _losses(_stock(nets[0]), stock, rank)
    after = _auto_wrapped(nets[1])
    exact = _losses(after, list(_grouped(after)), rank)
    assert exact == pytest.approx(expected, rel=1e-5) and expected[2] < expected[0]
    for net, face in zip(nets[2:], FACES, strict=True):
        before = list(_grouped(net))
        model = face(net)
        assert _losses(model, before, rank) == exact, face.__name__
        held = [p for group in before[0].param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in model.parameters()}
        assert before[0].param_groups[0]["lr"] == 0.05 * 0.5**3
        assert not some_are_replaced(), "a step looks for nothing any more"


MAKERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "SGD": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, foreach=False),
    "Adam, foreach": lambda p: optim.Adam(p, lr=0.01, foreach=True),
    "AdamW, fused": lambda p: optim.AdamW(p, lr=0.01, fused=True),
    "Adagrad, which has a state before its first step": lambda p: optim.Adagrad(p, lr=0.1),
    "by name": lambda p: optim.NAdam(p, lr=0.01),
}


def _of_every_kind(rank: int) -> None:
    for name, make in MAKERS.items():
        nets = [NETS["uneven"]() for _ in range(4)]
        after = _auto_wrapped(nets[0])
        exact = _losses(after, [make(after.parameters())], rank, 2)
        before = make(nets[1].named_parameters() if name == "by name" else nets[1].parameters())
        assert _losses(_fully(nets[1]), [before], rank, 2) == exact, name
        # Made after wrapping, from a list of before.
        for net, face in ((nets[2], _auto_wrapped), (nets[3], _fully)):
            parameters = list(net.parameters())
            model = face(net)
            assert _losses(model, [make(parameters)], rank, 2) == exact, name


def _two_over_parts(rank: int) -> None:
    results = []
    for face in (None, *FACES):
        net = NETS["uneven"]()
        model = _auto_wrapped(net) if face is None else net
        parts = [model.blocks, model.head]
        optimizers = [
            optim.SGD(parts[0].parameters(), lr=0.1),
            adam([*parts[1].parameters(), nn.Parameter(torch.ones(2))]),
        ]
        results.append(_losses(model if face is None else face(net), optimizers, rank))
    assert all(result == results[0] for result in results)


def _tied(rank: int) -> None:
    results = []
    for before in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        net[2].weight = net[0].weight
        optimizer = adam(list(net.parameters())) if before else None
        model = FSDP(net, device_mesh=mesh_of(2, 2))
        optimizer = optimizer or adam(list(model.parameters()))
        assert len(optimizer.param_groups[0]["params"]) == 3
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(2, 6) * (rank + 1)).square().sum().backward()
            optimizer.step()
        results.append(bits(model.state_dict()))
    assert_same(*results)


def _on_the_meta_device(rank: int) -> None:
    """Initialisation replaces the parameters once more."""
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        net[2].weight = net[0].weight
    optimizer = adam(list(net.parameters()))
    model = FSDP(net, device_mesh=mesh_of(2, 2), sync_module_states=True)
    own = list(model.parameters())
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], own, strict=True))
    start = bits(model.state_dict())
    model(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(start["0.weight"], bits(model.state_dict())["0.weight"])


class _Scaled(nn.Module):
    """A parameter without dimensions beside others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.scale = nn.Linear(4, 6), nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.scale


def _one_step(model: nn.Module, optimizer: optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = model(torch.linspace(-1, 1, 8).reshape(2, 4)).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def _trained_before(rank: int) -> None:
    """The state goes along, cut to each rank's rows."""
    for face in (
        lambda net: FSDP(net, device_mesh=mesh_of(2, 2)),
        lambda net: fully_shard(net, mesh=mesh_of(2, 2)),
    ):
        for make in (adam, lambda p: optim.SGD(p, lr=0.05, momentum=0.9)):
            alone, net = _Scaled(), _Scaled()
            optimizers = [make(list(each.parameters())) for each in (alone, net)]
            for _ in range(2):
                assert _one_step(alone, optimizers[0]) == _one_step(net, optimizers[1])
            model = face(net)  # with gradients of before, which count no more
            for _ in range(3):
                expected = _one_step(alone, optimizers[0])
                assert _one_step(model, optimizers[1]) == pytest.approx(expected, rel=1e-5)
            whole = FSDP.full_optim_state_dict(model, optimizers[1], rank0_only=False)
            for number, name in enumerate(("scale", "layer.weight", "layer.bias")):
                for key, value in optimizers[0].state_dict()["state"][number].items():
                    torch.testing.assert_close(whole["state"][name][key], value.cpu())


def _unfit_state(rank: int) -> None:
    """What can't be cut is an error at the first step, on every rank, and nothing has changed."""
    net = _Scaled()
    optimizer = optim.LBFGS(net.parameters(), lr=0.1, max_iter=3)
    optimizer.step(lambda: _backward(net))
    model = FSDP(net, device_mesh=mesh_of(2, 2))
    held = list(optimizer.param_groups[0]["params"])
    with pytest.raises(ValueError, match=rf"rank {rank}: .* keeps d of shape .* parameter scale"):
        optimizer.step(lambda: _backward(model))
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], held, strict=True))


def _backward(model: nn.Module) -> torch.Tensor:
    loss = model(torch.linspace(-1, 1, 8).reshape(2, 4)).square().mean()
    loss.backward()
    return loss


def _gradients_of_before(rank: int) -> None:
    """They are this rank's own, and would tear the replicas apart."""
    for face in (_auto_wrapped, _fully):
        net = NETS["uneven"]()
        optimizer = optim.SGD(net.parameters(), lr=0.1)
        net(batch(net, 0, rank)).sum().backward()
        model = face(net)
        start = bits(model.state_dict())
        optimizer.step()
        assert_same(model.state_dict(), start)
        assert all(p.grad is None for p in model.parameters())


def _scaler(rank: int) -> None:
    for face in FACES:
        net = NETS["uneven"]()
        optimizer = optim.SGD(net.parameters(), lr=0.1)
        model, scaler = face(net), torch.amp.GradScaler(DEVICE, init_scale=256.0)
        start = bits(model.state_dict())
        optimizer.zero_grad()
        scaler.scale(model(batch(NETS["uneven"](), 0, rank)).square().mean()).backward()
        scaler.unscale_(optimizer)
        gradients = [p.grad for p in model.parameters()]
        optimizer_sees = [p.grad for group in optimizer.param_groups for p in group["params"]]
        assert {id(each) for each in gradients} == {id(each) for each in optimizer_sees}
        scaler.step(optimizer)
        scaler.update()
        moved = (model.state_dict()["head.bias"]._local_tensor - start["head.bias"]).abs().sum()
        assert moved > 0 or not start["head.bias"].numel()


def _state_dicts_come_first(rank: int) -> None:
    for face in FACES:
        for get in (FSDP.optim_state_dict, get_optimizer_state_dict):
            net = NETS["uneven"]()
            optimizer = adam(list(net.parameters()))
            model = face(net)
            state = get(model, optimizer)["state"]
            assert state.keys() == {
                name.replace("_checkpoint_wrapped_module.", "")
                for name, _ in model.named_parameters()
            }
            assert all(isinstance(entry["exp_avg"], DTensor) for entry in state.values())


def _assigned(rank: int) -> None:
    """Parameters that load_state_dict(assign=True) has replaced are followed too, to and fro."""
    net = NETS["uneven"]()
    optimizer = adam(list(net.parameters()))
    model = _fully(net)
    step(model, optimizer, "uneven", 0, rank)
    first = {name: p for name, p in model.named_parameters()}
    for replaced in (copy.deepcopy(model.state_dict()), {**model.state_dict(), **first}):
        model.load_state_dict(replaced, assign=True)
        start = bits(model.state_dict())
        step(model, optimizer, "uneven", 1, rank)
        end = bits(model.state_dict())
        assert any(not torch.equal(start[name], end[name]) for name, _ in model.named_parameters())
        own = {id(p) for p in model.parameters()}
        assert {id(p) for p in optimizer.param_groups[0]["params"]} == own
    model.double()
    step(model.float(), optimizer, "uneven", 2, rank)


def _hooks(rank: int) -> None:
    """Of hooks that were registered before wrapping torch's wrappers run none, either."""
    for face in (lambda net: _stock(net), _auto_wrapped, _fully):
        net, fired = NETS["uneven"](), []
        for parameter in net.parameters():
            parameter.register_hook(fired.append)
            parameter.register_post_accumulate_grad_hook(fired.append)
        face(net)(batch(NETS["uneven"](), 0, rank)).sum().backward()
        assert not fired


def test_an_optimizer_made_before_wrapping_trains() -> None:
    run_checks(4, _with_groups_and_scheduler, _two_over_parts, _tied, _on_the_meta_device)


def test_optimizers_of_every_kind_made_before_wrapping() -> None:
    run_checks(4, _of_every_kind)


def test_state_and_gradients_of_before_wrapping() -> None:
    run_checks(4, _trained_before, _unfit_state, _gradients_of_before)


def test_whoever_looks_at_the_optimizer_sees_sharded_parameters() -> None:
    run_checks(4, _scaler, _state_dicts_come_first, _assigned, _hooks)
