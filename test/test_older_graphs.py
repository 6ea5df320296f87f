"""Backwards of graphs that other forwards and backwards have followed: the gradients of one
process. Each unit has a parameter that no graph uses, so that not all of its gradients come."""

import copy
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import Block
from ranks import run_checks
from torch import nn
from training import assert_close, grads, loss_of, mesh_of, unsharded, wrap

from torch_hsdp_ckpt import fully_shard


class _Part(Block):
    def __init__(self) -> None:
        super().__init__(6, 10)
        self.unused = nn.Parameter(torch.ones(5))


class _Net(nn.Module):
    """Two parts, of which a call may use one, between parameters of its own."""

    def __init__(self, part: type[Block] = _Part) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = part(), part()
        self.scale, self.head = nn.Parameter(torch.full((6,), 0.8)), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor, *parts: str) -> torch.Tensor:
        x = x * self.scale
        for part in parts or ("a", "b"):
            x = getattr(self, part)(x)
        return self.head(x)


def _input(rank: int, number: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * number + rank)
    return torch.randn(4, 6, generator=generator, requires_grad=True)


def _evaluate(model: nn.Module, rank: int) -> None:
    with torch.no_grad():
        model(_input(rank, 7))


def _twice(model: nn.Module, rank: int) -> None:
    loss = loss_of(model, _input(rank))
    loss.backward(retain_graph=True)
    _evaluate(model, rank)
    loss.backward()


def _two_losses(model: nn.Module, rank: int) -> None:
    first, second = loss_of(model, _input(rank)), loss_of(model, _input(rank, 1))
    first.backward()
    _evaluate(model, rank)
    second.backward()


def _gradient_of_the_input_first(model: nn.Module, rank: int) -> None:
    x = _input(rank)
    loss = loss_of(model, x)
    (direction,) = torch.autograd.grad(loss, x, retain_graph=True)
    with torch.no_grad():
        model(x + 0.1 * direction.sign())
    loss.backward()


def _other_parts_between(model: nn.Module, rank: int) -> None:
    first = model(_input(rank), "a").square().mean()
    second = model(_input(rank, 1), "a").square().mean()
    first.backward()
    third = model(_input(rank, 2), "b").square().mean()
    second.backward()
    third.backward()


def _then_a_step(model: nn.Module, rank: int) -> None:
    """Nothing of an older graph is left for the next step."""
    _other_parts_between(model, rank)
    for p in model.parameters():
        p.grad = None
    loss_of(model, _input(rank, 3)).backward()


STEPS = (_twice, _two_losses, _gradient_of_the_input_first, _other_parts_between, _then_a_step)


def _faces(net: nn.Module) -> list[nn.Module]:
    function = copy.deepcopy(net)
    for module in (function.a, function.b, function):
        fully_shard(module, mesh=mesh_of((2, 2)))
    policy = torch.distributed.fsdp.wrap.ModuleWrapPolicy({type(net.a)})
    return [wrap(copy.deepcopy(net), policy=policy), function]


def _check(net: nn.Module, step: Callable[[nn.Module, int], None], rank: int) -> None:
    singles = [copy.deepcopy(net) for _ in range(dist.get_world_size())]
    for other, single in enumerate(singles):
        step(single, other)
    used = [name for name, _ in net.named_parameters() if "unused" not in name]
    expected = {
        name: torch.stack([single.get_parameter(name).grad for single in singles]).mean(0)
        for name in used
    }
    for ours in _faces(net):
        step(ours, rank)
        assert not unsharded(ours)
        found = grads(ours)
        assert_close({name: found[name] for name in used}, expected)


def _older_graphs(rank: int) -> None:
    for step in STEPS:
        _check(_Net(), step, rank)


class _Detached(Block):
    """Gradients of its input need a weight whose own gradient is there before."""

    def __init__(self) -> None:
        super().__init__(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.tanh(F.linear(x, self.up.weight.detach())))


def _penalty(model: nn.Module, rank: int) -> None:
    x = _input(rank)
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    (gradient.square().mean() + loss_of(model, _input(rank, 1))).backward()


def _detached_weights(rank: int) -> None:
    for step in (lambda model, r: loss_of(model, _input(r)).backward(), _penalty, _twice):
        _check(_Net(_Detached), step, rank)


class _Inner(_Net):
    """A gradient of gradients that lives within a segment which backward computes again."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def segment(x: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                energy = self.a(x).square().sum()
                (force,) = torch.autograd.grad(energy, x, create_graph=True)
            return force

        x = torch.utils.checkpoint.checkpoint(segment, x * self.scale, use_reentrant=False)
        return self.head(self.b(x))


def _recomputed_gradients(rank: int) -> None:
    """What the recomputation has kept goes with the backward."""
    _check(_Inner(), lambda model, r: loss_of(model, _input(r)).backward(), rank)


def _inference_in_a_transform(rank: int) -> None:
    for ours in _faces(_Net()):
        with torch.no_grad():
            torch.func.vmap(ours)(_input(rank)[None])
            torch.func.jvp(ours, (_input(rank),), (torch.ones(4, 6),))
        assert not unsharded(ours), "no backward is to come"


def test_older_graphs() -> None:
    run_checks(
        4, _older_graphs, _detached_weights, _recomputed_gradients, _inference_in_a_transform
    )
