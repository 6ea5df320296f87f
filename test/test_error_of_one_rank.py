"""An error that ends one rank's forward or backward is an error of that step on all ranks; with the
next one they go on."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from device import not_on_device
from models import Block, Net, batch
from ranks import run_checks, run_ranks
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from training import assert_close, grads, loss_of, mean_grads, mesh_of, wrap

from torch_hsdp_ckpt import ShardingStrategy, fully_shard

pytestmark = not_on_device("NCCL has no peers that tell each other of an error")


def _net() -> Net:
    torch.manual_seed(0)
    return Net(7, 13, 3, blocks=4)


def _sharded(net: Net, shape: tuple[int, ...], reshard: bool | None = None, **options) -> Any:
    for module in (*net.blocks, net):
        fully_shard(module, mesh=mesh_of(shape), reshard_after_forward=reshard, **options)
    return net


def _wrapped(net: Net, shape: tuple[int, ...], reshard: bool | None = None) -> Any:
    strategies = {False: ShardingStrategy._HYBRID_SHARD_ZERO2, None: ShardingStrategy.HYBRID_SHARD}
    if len(shape) == 1:
        strategies = {False: ShardingStrategy.SHARD_GRAD_OP, None: ShardingStrategy.FULL_SHARD}
    return wrap(net, shape, sharding_strategy=strategies[reshard])


class _Asked(KeyError):
    pass


class _Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        raise _Asked


def _fail(module: nn.Module, where: str) -> Any:
    def hook(module: nn.Module, args: Any, output: Any = None) -> Any:
        if where == "backward":
            return _Raises.apply(output)
        raise _Asked

    if where == "before":
        return module.register_forward_pre_hook(hook)
    return module.register_forward_hook(hook)


def _raises(call: Callable[[], Any], module: nn.Module, where: str = "forward") -> None:
    handle = _fail(module, where)
    with pytest.raises(_Asked):
        call()
    handle.remove()


def _step_with_an_error(call: Callable[[], Any], module: nn.Module, where: str, rank: int) -> None:
    """Rank 1's own error, and the peers' that name it."""
    if rank == 1:
        _raises(call, module, where)
        return
    kind = "backward" if where == "backward" else "forward"
    with pytest.raises(
        RuntimeError,
        match=rf"rank {rank}\b.*given up, as rank 1 has left the {kind} of module \(outermost\)",
    ):
        call()


def _goes_on(model: Any, rank: int) -> None:
    model.zero_grad()
    for step in range(2):
        model.zero_grad()
        loss_of(model, batch(_net(), step, rank)).backward()
        expected = mean_grads(_net(), lambda n, r, s=step: loss_of(n, batch(_net(), s, r)))
        assert_close(grads(model), expected)


def _blocks_of(model: Any) -> list[Block]:
    return [module for module in model.modules() if isinstance(module, Block)]


def _every_place(rank: int) -> None:
    for face, shape, reshard in ((_sharded, (2, 2), None), (_wrapped, (4,), False)):
        model = face(_net(), shape, reshard)

        def step(model: Any = model) -> None:
            loss_of(model, batch(_net(), 0, rank)).backward()

        step()
        for where, block in (("before", 0), ("forward", 1), ("forward", 3), ("backward", 2)):
            _step_with_an_error(step, _blocks_of(model)[block], where, rank)
            _goes_on(model, rank)


def test_wherever_it_is() -> None:
    run_ranks(_every_place, 4, timeout=300.0)


def _first_forward(rank: int) -> None:
    model = _sharded(_net(), (2, 2))
    x = batch(_net(), 0, rank)
    _step_with_an_error(lambda: model(x), model.blocks[1], "forward", rank)
    _goes_on(model, rank)


def _twice_and_on_all_ranks(rank: int) -> None:
    """Errors of all ranks at once, in one place or in several, are their own."""
    model = _sharded(_net(), (2, 2))
    x = batch(_net(), 0, rank)
    for place in ([1, 1, 1, 1], [0, 1, 2, 3], [3, 3, 0, 0], [2, 2, 2, 2]):
        handle = _fail(model.blocks[place[rank]], "forward")
        with pytest.raises((_Asked, RuntimeError)) as error:
            model(x)
        alike = len(set(place)) == 1
        assert error.type is _Asked or not alike
        handle.remove()
    _goes_on(model, rank)


def _evaluation(rank: int) -> None:
    """An error behind all gathers, with no backward to come, keeps nobody waiting."""
    model = _sharded(_net(), (4,))
    x = batch(_net(), 0, rank)
    with torch.no_grad():
        model(x)
        if rank == 1:
            _raises(lambda: model(x), model.blocks[3])
        else:
            model(x)
        model(x)
        _step_with_an_error(lambda: model(x), model.blocks[1], "forward", rank)
    _goes_on(model, rank)


def _accumulated(rank: int) -> None:
    """What some ranks keep of a step that had the error, and others not, is sent in one dtype."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = _sharded(_net(), (4,), reshard=False, mp_policy=policy)
    x = batch(_net(), 0, rank)
    loss_of(model, x).backward()
    model.zero_grad()
    model.set_requires_gradient_sync(False)
    if rank == 1:
        _raises(lambda: model(x), model.blocks[3])
    else:
        loss_of(model, x).backward()  # needs nothing of rank 1
        with pytest.raises(RuntimeError, match="given up, as rank 1 has left the forward"):
            model(x)
    model.set_requires_gradient_sync(True)
    loss_of(model, x).backward()
    assert all(p.grad is not None for p in model.parameters())


class _Ordered(Net):
    order: tuple[int, ...] = (0, 1, 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in self.order:
            x = self.blocks[i](x)
        return self.head(x)


def _ordered(order: tuple[int, ...]) -> _Ordered:
    torch.manual_seed(0)
    net = _Ordered(7, 13, 3, blocks=4)
    net.order = order
    return net


def _other_modules_next(rank: int) -> None:
    """The rank that had the error has run forward to its end, as the others have, and been in no
    backward."""
    model = _sharded(_ordered((0, 1, 2, 3)), (2, 2))
    x = batch(_net(), 0, rank)
    _step_with_an_error(lambda: loss_of(model, x).backward(), model.blocks[3], "forward", rank)
    model.order = (2, 0)
    for step in range(2):
        model.zero_grad()
        loss_of(model, batch(_net(), step, rank)).backward()
        expected = mean_grads(
            _ordered((2, 0)), lambda n, r, s=step: loss_of(n, batch(_net(), s, r))
        )
        assert_close(grads(model), expected)


def _told_at_once(rank: int) -> None:
    """The ranks agree on an error by means of their own before anybody goes on."""
    model = _sharded(_net(), (2, 2))
    x = batch(_net(), 0, rank)
    _step_with_an_error(lambda: loss_of(model, x).backward(), model.blocks[2], "backward", rank)
    errors = torch.ones(1)
    dist.all_reduce(errors)
    assert errors.item() == 4
    model.blocks[0].unshard()
    _goes_on(model, rank)


def _two_models(rank: int) -> None:
    first, second = _sharded(_net(), (2, 2)), _sharded(_net(), (2, 2))
    x = batch(_net(), 0, rank)

    def step() -> None:
        (loss_of(first, x) + loss_of(second, x)).backward()

    step()
    _step_with_an_error(step, second.blocks[1], "forward", rank)
    _goes_on(first, rank)
    _goes_on(second, rank)


def test_and_whatever_is_under_way() -> None:
    run_checks(4, _first_forward, _twice_and_on_all_ranks, _evaluation, _accumulated, timeout=300.0)


def test_and_whatever_comes_next() -> None:
    run_checks(4, _other_modules_next, _told_at_once, _two_models, timeout=300.0)


def _kept_of(net: Any, x: torch.Tensor) -> torch.Tensor:
    """What the second block returns, from a forward that is left there on purpose."""
    kept: list[torch.Tensor] = []

    def hook(module: nn.Module, args: tuple[torch.Tensor]) -> None:
        kept.append(args[0])
        raise _Asked

    handle = net.blocks[2].register_forward_pre_hook(hook)
    with pytest.raises(_Asked):
        net(x)
    handle.remove()
    return kept[0]


def _left_on_purpose(rank: int) -> None:
    """A forward that all ranks leave has a backward all the same."""
    for shape in ((2, 2), (4,)):
        model = _sharded(_net(), shape)
        for step in range(2):
            model.zero_grad()
            _kept_of(model, batch(_net(), step, rank)).square().sum().backward()
            expected = mean_grads(
                _net(), lambda n, r, s=step: _kept_of(n, batch(_net(), s, r)).square().sum()
            )
            assert_close(grads(model), expected)
        _goes_on(model, rank)


def _left_by_one_rank(rank: int) -> None:
    """If the others have not left it, the backward is one rank's alone."""
    model = _sharded(_net(), (2, 2))
    x = batch(_net(), 0, rank)
    if rank == 1:
        kept = _kept_of(model, x)
        with pytest.raises(RuntimeError, match="go on with different things"):
            kept.sum().backward()
    else:
        for text in ("given up, as rank 1 has left the forward", "go on with different things"):
            with pytest.raises(RuntimeError, match=text):
                model(x)
    _goes_on(model, rank)


def _many_replicas(rank: int) -> None:
    """Each rank a replica: it needs the others in backward only, in an all-reduce of Gloo's."""
    model = _sharded(_net(), (4, 1))
    x = batch(_net(), 0, rank)
    for alone in (False, True):
        with torch.set_grad_enabled(not alone):
            if not alone or rank == 1:
                _raises(lambda: model(x), model.blocks[1])
        _goes_on(model, rank)


def test_that_is_meant() -> None:
    run_checks(4, _left_on_purpose, _left_by_one_rank, _many_replicas)


def _dropped(rank: int) -> None:
    """A model that is dropped with its error leaves nothing behind that stops the next one on its
    mesh: a gather under way, reductions in the background."""
    for face in (_sharded, _wrapped):
        for where, block in (("backward", 2), ("backward", 0), ("forward", 1)):
            for _ in range(2):
                model = face(_net(), (2, 2))
                handle = _fail(_blocks_of(model)[block], where)
                with pytest.raises(_Asked):
                    loss_of(model, batch(_net(), 0, rank)).backward()
                del model, handle
                gc.collect()
                _goes_on(face(_net(), (2, 2)), rank)


def test_of_a_model_that_is_dropped() -> None:
    run_ranks(_dropped, 4, timeout=300.0)
