"""Transforms of ``torch.func`` around wrapped modules, at their first forward and later: the values
of one process, also in backwards through what a transform has computed."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.func
from models import Block
from ranks import run_checks
from torch import nn
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from training import assert_close, grads, loss_of, mean_grads, mesh_of, unsharded, wrap

from torch_hsdp_ckpt import fully_shard

Model = Callable[[torch.Tensor], torch.Tensor]


class Stack(nn.Module):
    """Blocks and a head, without the buffer that the shared nets count calls in: no transform
    allows that."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(7, 13) for _ in range(2))
        self.head = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def _batch(step: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(4, 7, generator=generator)


def _faces(net: Stack, precision: bool = False) -> Iterator[nn.Module]:
    low = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    yield wrap(copy.deepcopy(net), mixed_precision=MixedPrecision(**low) if precision else None)
    for reshard in (True, False):
        model = copy.deepcopy(net)
        for unit in (*model.blocks, model):
            policy = MixedPrecisionPolicy(**low if precision else {})
            fully_shard(unit, mesh=mesh_of((2, 2)), reshard_after_forward=reshard, mp_policy=policy)
        yield model


def _loss(model: Model) -> Model:
    return lambda x: model(x).square().sum()


# Each takes a model and an input, and returns tensors.
TRANSFORMS: dict[str, Callable[[Model, torch.Tensor], Any]] = {
    "grad": lambda m, x: torch.func.grad(_loss(m))(x),
    "grad and value": lambda m, x: torch.func.grad_and_value(_loss(m))(x),
    "grad of grad": lambda m, x: torch.func.grad(
        lambda y: torch.func.grad(_loss(m))(y).square().sum()
    )(x),
    "vmap": lambda m, x: torch.func.vmap(m)(x),
    "vmap in vmap": lambda m, x: torch.func.vmap(torch.func.vmap(m))(torch.stack([x, 2 * x])),
    "vmap of grad": lambda m, x: torch.func.vmap(torch.func.grad(_loss(m)))(x),
    "vjp": lambda m, x: (lambda out, pull: (out, *pull(torch.ones_like(out))))(
        *torch.func.vjp(m, x)
    ),
    "jvp": lambda m, x: torch.func.jvp(m, (x,), (torch.ones_like(x),)),
    "jacrev": lambda m, x: torch.func.jacrev(m)(x),
    "jacrev in chunks": lambda m, x: torch.func.jacrev(m, chunk_size=3)(x),
    "jacfwd": lambda m, x: torch.func.jacfwd(m)(x),
    "hessian": lambda m, x: torch.func.hessian(_loss(m))(x[:1]),
    "functionalize": lambda m, x: torch.func.functionalize(m)(x),
    "twice": lambda m, x: torch.func.grad(lambda y: _loss(m)(y) + _loss(m)(2 * y))(x),
    "of a closure": lambda m, x: torch.func.jvp(lambda _: m(x), (x,), (torch.ones_like(x),)),
}


def _values(rank: int) -> None:
    net, x = Stack(), _batch(0, rank)
    expected = {name: transform(copy.deepcopy(net), x) for name, transform in TRANSFORMS.items()}
    for number, ours in enumerate(_faces(net)):
        ours(x)
        for name, transform in TRANSFORMS.items():
            try:
                torch.testing.assert_close(transform(ours, x), expected[name])
                assert all(isinstance(p, DTensor) for p in ours.parameters())
            except BaseException as error:
                raise AssertionError(f"{name}, face {number}") from error


def _first_forward(rank: int) -> None:
    x = _batch(0, rank)
    for name in ("grad", "vmap", "of a closure", "functionalize"):
        net, transform = Stack(), TRANSFORMS[name]
        expected = transform(copy.deepcopy(net), x)
        for ours in _faces(net):
            for _ in range(2):
                torch.testing.assert_close(transform(ours, x), expected, msg=name)


def _penalty(model: Model, x: torch.Tensor) -> torch.Tensor:
    return torch.func.grad(_loss(model))(x).square().mean()


# Losses that steps train with; forwards come before and after the transform.
LOSSES: dict[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {
    "penalty": _penalty,
    "forward, penalty": lambda m, x: loss_of(m, x) + _penalty(m, x),
    "penalty, forward": lambda m, x: _penalty(m, x) + loss_of(m, 3 * x),
    "vmap": lambda m, x: torch.func.vmap(m)(x).square().mean(),
    "vmap, forward": lambda m, x: torch.func.vmap(m)(x).square().mean() + loss_of(m, 3 * x),
    "jacobian": lambda m, x: torch.func.jacrev(m)(x).square().mean(),
    "vjp, forward, pull": lambda m, x: _pulled_late(m, x),
    "penalty, evaluation": lambda m, x: _then_evaluated(m, x, _penalty(m, x)),
    "vmap, evaluation": lambda m, x: _then_evaluated(m, x, torch.func.vmap(m)(x).square().mean()),
    "penalty, zero_grad": lambda m, x: _then_without_gradients(m, _penalty(m, x)),
    "penalty, state dict": lambda m, x: _then_saved(m, _penalty(m, x)),
    "create_graph, evaluation": lambda m, x: _then_evaluated(m, x, _penalty_of_autograd(m, x)),
    "create_graph, zero_grad": lambda m, x: _then_without_gradients(m, _penalty_of_autograd(m, x)),
    "jacobian, vectorized": lambda m, x: _vectorized(m, x, create_graph=True).square().mean(),
    "vectorized, forward": lambda m, x: _vectorized(m, x).square().mean() + loss_of(m, x),
}


def _vectorized(model: Model, x: torch.Tensor, **options: bool) -> torch.Tensor:
    return torch.autograd.functional.jacobian(model, x, vectorize=True, **options)


def _penalty_of_autograd(model: Model, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    (inner,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return inner.square().mean()


def _then_without_gradients(model: nn.Module, loss: torch.Tensor) -> torch.Tensor:
    if any(isinstance(p, DTensor) for p in model.parameters()):  # one process adds up all ranks'
        model.zero_grad()
    return loss


def _then_saved(model: nn.Module, loss: torch.Tensor) -> torch.Tensor:
    model.state_dict()
    return loss


def _then_evaluated(model: nn.Module, x: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        evaluated = model(x)
        torch.func.vmap(model)(x)
    torch.testing.assert_close(evaluated, model(x))
    return loss


def _pulled_late(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out, pull = torch.func.vjp(model, x)
    later = loss_of(model, 3 * x)
    (pulled,) = pull(torch.ones_like(out))
    return later + pulled.square().mean()


def _training(rank: int) -> None:
    net = Stack()
    for name, loss in LOSSES.items():
        for number, ours in enumerate(_faces(net)):
            single = copy.deepcopy(net)
            optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (ours, single)]
            try:
                for step in range(2):
                    expected = mean_grads(
                        single, lambda n, r, step=step, loss=loss: loss(n, _batch(step, r))
                    )
                    ours.zero_grad()
                    loss(ours, _batch(step, rank)).backward()
                    assert_close(grads(ours), expected)
                    for p in single.parameters():
                        p.grad = expected[next(n for n, q in single.named_parameters() if q is p)]
                    for optimizer in optimizers:
                        optimizer.step()
                    assert not unsharded(ours), "the backward has freed all"
            except BaseException as error:
                raise AssertionError(f"{name}, face {number}, step {step}") from error


def _mixed_precision(rank: int) -> None:
    net = Stack()
    x = _batch(0, rank)
    expected = torch.func.grad(_loss(copy.deepcopy(net).bfloat16()))(x.bfloat16())
    for ours in _faces(net, precision=True):
        found = torch.func.grad(_loss(ours))(x)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.bfloat16(), expected)


def _errors(rank: int) -> None:
    """Other parameters than the unit's own are refused before anything is gathered; an error within
    a transform leaves a model that can be used."""
    net = Stack()
    x = _batch(0, rank)
    expected = mean_grads(net, lambda n, r: loss_of(n, _batch(0, r)))
    for ours in _faces(net):
        parameters = dict(ours.named_parameters())
        own = torch.func.functional_call(ours, parameters, (x,))
        torch.testing.assert_close(own, net(x))
        again = torch.func.functional_call(ours, parameters, (x,))
        torch.testing.assert_close(again, ours(x))
        others = {name: p.detach().clone() for name, p in parameters.items()}
        with pytest.raises(RuntimeError, match="functional_call"):
            torch.func.functional_call(ours, others, (x,))

        def of_parameters(given: dict[str, torch.Tensor], model: nn.Module = ours) -> torch.Tensor:
            return torch.func.functional_call(model, given, (x,)).sum()

        with pytest.raises(RuntimeError, match="functional_call"):
            torch.func.grad(of_parameters)(parameters)

        def fail(*_: Any) -> None:
            raise ArithmeticError("within the transform")

        with pytest.raises(RuntimeError, match=rf"^rank {rank}: module .* can't be traced"):
            torch.func.linearize(ours, x)
        handle = ours.head.register_forward_hook(fail)
        with pytest.raises(ArithmeticError):
            torch.func.grad(_loss(ours))(x)
        handle.remove()
        assert all(isinstance(p, DTensor) for p in ours.parameters()) and not unsharded(ours)
        loss_of(ours, x).backward()
        assert_close(grads(ours), expected)


def test_transforms_give_one_processs_values() -> None:
    run_checks(4, _values, _first_forward)


def test_training_through_transforms() -> None:
    run_checks(4, _training, _mixed_precision)


def test_errors_within_transforms() -> None:
    run_checks(4, _errors)
