"""Graphs of gradients and forwards within forwards: gradients of gradients, forwards that backward
computes again, units that run twice, errors that a forward catches."""

import contextlib
import copy
import warnings

import pytest
import torch
from device import cpu_only
from models import NETS, Block, Net, batch
from ranks import run_checks
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from training import assert_close, full, grads, loss_of, mean_grads, mesh_of, unsharded, wrap

from torch_hsdp_ckpt import fully_shard


def _gradient_penalty(rank: int) -> None:
    """Gradients of gradients, with forwards before and after the inner ones: one process's numbers.
    FSDP2 dies of them."""
    net = NETS["uneven"]()

    def penalty(model: nn.Module, step: int, r: int) -> torch.Tensor:
        x = batch(net, step, r).requires_grad_()
        (inner,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return inner.square().mean()

    def loss(model: nn.Module, step: int, r: int) -> torch.Tensor:
        before = loss_of(model, batch(net, step + 10, r)) if step != 1 else 0.0
        middle = penalty(model, step, r)
        return before + middle + (loss_of(model, batch(net, step + 20, r)) if step != 0 else 0.0)

    single = copy.deepcopy(net)
    optimizer = torch.optim.SGD(single.parameters(), lr=0.05)
    for step in range(3):
        optimizer.zero_grad()
        torch.stack([loss(single, step, r) for r in range(4)]).mean().backward()
        optimizer.step()
    function = copy.deepcopy(net)
    for module in (*function.blocks, function):
        fully_shard(module, mesh=mesh_of((2, 2)))
    for ours in (
        wrap(copy.deepcopy(net)),
        wrap(copy.deepcopy(net), backward_prefetch=None),
        function,
    ):
        optimizer = torch.optim.SGD(ours.parameters(), lr=0.05)
        for step in range(3):
            optimizer.zero_grad()
            loss(ours, step, rank).backward()
            assert all(isinstance(p, DTensor) for p in ours.parameters())
            optimizer.step()
        for (name, p), q in zip(ours.named_parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(full(p), q.detach(), rtol=1e-4, atol=1e-5, msg=name)
        assert not unsharded(ours), "the last backward has freed them"
        ours.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of a cycle that is not made here
            loss_of(ours, batch(net, 0, rank)).backward(create_graph=True)
        assert_close(grads(ours), mean_grads(single, lambda n, r: loss_of(n, batch(net, 0, r))))
        assert not any(p.grad.requires_grad for p in ours.parameters())


class Either(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scale = Block(6, 10), Block(6, 10), nn.Parameter(torch.full((6,), 0.8))

    def forward(self, x: torch.Tensor, use: str) -> torch.Tensor:
        return getattr(self, use)(x * self.scale)


def _penalty_of_a_unit_that_ran_before(rank: int) -> None:
    """The graph of gradients needs a unit that no later forward runs, with the values that it had;
    then it runs again."""
    torch.manual_seed(0)
    net = Either()

    def loss(model: nn.Module, r: int) -> torch.Tensor:
        x = torch.randn(3, 6, generator=torch.Generator().manual_seed(r), requires_grad=True)
        (inner,) = torch.autograd.grad(model(x, "a").square().sum(), x, create_graph=True)
        with torch.no_grad():
            model(x, "b")
        return inner.square().mean()

    for ours in (wrap(copy.deepcopy(net)), wrap(copy.deepcopy(net), backward_prefetch=None)):
        single = copy.deepcopy(net)
        for _ in range(3):
            ours.zero_grad()
            loss(ours, rank).backward()
            assert_close(grads(ours), mean_grads(single, loss))
            with torch.no_grad():
                for p, q in zip(ours.parameters(), single.parameters(), strict=True):
                    p.mul_(0.9)
                    q.mul_(0.9)
        assert not unsharded(ours)


class Forces(nn.Module):
    """Gradients of its blocks within its forward, with parameters of its own before and after."""

    def __init__(self, create_graph: bool, backward: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.scale, self.head = (
            Block(6, 10),
            Block(6, 10),
            nn.Parameter(torch.ones(6)),
            nn.Linear(6, 2),
        )
        self.create_graph, self.backward = create_graph, backward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x * self.scale).detach().requires_grad_()
        with torch.enable_grad():
            energy = self.b(self.a(x) * self.scale).square().sum()
            if self.backward:
                (0.5 * energy).backward(retain_graph=True)
            (force,) = torch.autograd.grad(energy, x, create_graph=self.create_graph)
        return self.head(self.a(force * self.scale))


def _gradients_within_a_forward(rank: int) -> None:
    """Between steps an evaluation without gradients does the same. FSDP2 has put its shards back by
    then."""
    for create_graph, backward in ((True, False), (False, False), (False, True)):
        torch.manual_seed(0)
        net = Forces(create_graph, backward)
        x = [torch.randn(3, 6, generator=torch.Generator().manual_seed(r)) for r in range(4)]
        singles = [
            copy.deepcopy(net) for _ in range(4)
        ]  # not mean_grads, which divides losses: not what forward adds itself
        for single, own in zip(singles, x, strict=True):
            loss_of(single, own).backward()
        expected = {
            name: None if own[0].grad is None else torch.stack([p.grad for p in own]).mean(0)
            for (name, _), *own in zip(
                net.named_parameters(), *(single.parameters() for single in singles), strict=True
            )
        }
        for ours in (wrap(copy.deepcopy(net)), wrap(copy.deepcopy(net), (4,))):
            for _ in range(2):
                ours.zero_grad()
                loss_of(ours, x[rank]).backward()
                assert_close(grads(ours), expected)
                if not backward:
                    with torch.no_grad():
                        torch.testing.assert_close(ours(x[rank]), net(x[rank]))
                assert all(isinstance(p, DTensor) for p in ours.parameters())


class Caught(nn.Module):
    """A backward of its own, whose error it does not let out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fails = Block(6, 10), Block(6, 10), False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fails:
            inner = self.a(x)
            inner.register_hook(lambda gradient: gradient[5:].sum(1))  # of the wrong shape
            with contextlib.suppress(RuntimeError):
                inner.sum().backward()
        return self.b(self.a(x))


def _an_error_that_a_forward_catches(rank: int) -> None:
    torch.manual_seed(0)
    net = Caught()
    ours = wrap(copy.deepcopy(net))
    x = [torch.randn(3, 6, generator=torch.Generator().manual_seed(r)) for r in range(4)]
    for _ in range(2):
        ours.module.fails = True
        with pytest.raises(RuntimeError, match="let the error out of the forward"):
            ours(x[rank])
        ours.module.fails = False
        ours.zero_grad()
        loss_of(ours, x[rank]).backward()
        assert_close(grads(ours), mean_grads(net, lambda n, r: loss_of(n, x[r])))


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (
            nn.Parameter(torch.randn(6, 6) / 3),
            nn.Parameter(torch.randn(6, 6) / 3),
        )

    def forward(self, x: torch.Tensor, use: bool) -> torch.Tensor:
        return x @ self.one + (x @ self.two if use else 0.0)


@cpu_only("a limit of docs/supported.md: other collectives than Gloo's may mix such gradients up")
def _roots_of_their_own(rank: int) -> None:
    """Units of one size without a wrapper around them: a rank that lacks a gradient in one reduces
    it later than its peers, after another one's, and neither gets the other one's gradient."""
    torch.manual_seed(0)
    net = nn.ModuleList(Part() for _ in range(4))
    for shape in ((4,), (2, 2)):
        ours = copy.deepcopy(net)
        for part in ours:
            fully_shard(part, mesh=mesh_of(shape))

        def loss(parts: nn.ModuleList, r: int) -> torch.Tensor:
            x = torch.randn(3, 6, generator=torch.Generator().manual_seed(r))
            for i, part in enumerate(parts):
                x = part(x, r % 2 == 0 or i != 2)
            return x.square().mean()

        for _ in range(3):
            ours.zero_grad()
            loss(ours, rank).backward()
            assert_close(grads(ours), mean_grads(net, loss))


class Checkpointed(nn.Module):
    """Recomputes inside the units' forwards and around them."""

    def __init__(self, net: Net, reentrant: bool) -> None:
        super().__init__()
        self.net, self.reentrant = net, reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.net.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return checkpoint(self.net.head, x, use_reentrant=self.reentrant)


def _recomputation(rank: int) -> None:
    net = NETS["uneven"]()
    expected = mean_grads(net, lambda n, r: loss_of(n, batch(net, 0, r).requires_grad_()))
    for reentrant in (False, True):
        ours = wrap(Checkpointed(copy.deepcopy(net), reentrant))
        for _ in range(2):
            ours.zero_grad()
            loss_of(ours, batch(net, 0, rank).requires_grad_()).backward()
            assert_close({k.removeprefix("net."): v for k, v in grads(ours).items()}, expected)


def _unfrozen_before_the_recomputation(rank: int) -> None:
    """A backward that computes a unit's forward again trains what is unfrozen by then."""
    net = NETS["uneven"]()
    expected = mean_grads(net, lambda n, r: loss_of(n, batch(net, 0, r).requires_grad_()))
    ours = wrap(Checkpointed(copy.deepcopy(net), reentrant=True))
    block = ours.net.blocks[0]
    block.requires_grad_(False)
    block.down.bias.requires_grad_(True)
    loss = loss_of(ours, batch(net, 0, rank).requires_grad_())
    block.requires_grad_(True)
    loss.backward()
    assert_close({k.removeprefix("net."): v for k, v in grads(ours).items()}, expected)


def test_graphs_of_gradients() -> None:
    run_checks(
        4,
        _gradient_penalty,
        _penalty_of_a_unit_that_ran_before,
        _gradients_within_a_forward,
        _an_error_that_a_forward_catches,
        _roots_of_their_own,
    )


def test_recomputed_forwards() -> None:
    run_checks(4, _recomputation, _unfrozen_before_the_recomputation)
