"""Results of units in whatever a module may return, keep or change: backward gathers what the graph
needs, and the gradients are one process's."""

import collections
import copy
import dataclasses
import functools
import itertools
import re
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from models import Block
from ranks import run_checks
from torch import nn
from torch.distributed.fsdp import ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from training import assert_close, grads, loss_of, mean_grads, mesh_of, wrap

from torch_hsdp_ckpt import fully_shard
from torch_hsdp_ckpt.hsdp.flat_tensors import flat_tensors, tensors_behind

WIDTH = 6


class Plain:
    """An object with attributes; one refers back, as a child does to its parent."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.n, self.child = None, types.SimpleNamespace(t=[tensor], parent=self)


class Slots:
    __slots__ = ("t",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self.t = tensor


class SlotsBelow(Slots):
    __slots__ = ("n",)


@dataclasses.dataclass(frozen=True)
class Answer:
    n: int
    inner: Plain


class Mapping(collections.OrderedDict):
    """A dict that is no pytree."""


class Pair(NamedTuple):
    n: Any
    t: Any


def _yielding(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    yield tensor


# How a block's result is packed, and how its user gets at it.
Kind = tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]
KINDS: dict[str, Kind] = {
    "object": (Plain, lambda o: o.child.t[0]),
    "slots": (SlotsBelow, lambda o: o.t),
    "dataclass around an object": (lambda t: Answer(3, Plain(t)), lambda o: o.inner.child.t[0]),
    "objects in a pytree": (lambda t: [{"a": (None, Slots(t))}, "x"], lambda o: o[0]["a"][1].t),
    "named tuple": (lambda t: Pair(None, Slots(t)), lambda o: o.t.t),
    "mapping": (lambda t: Mapping(a=Slots(t)), lambda o: o["a"].t),
    "user dict": (lambda t: collections.UserDict(a=Slots(t)), lambda o: o["a"].t),
    "chain map": (lambda t: collections.ChainMap({}, {"a": t}), lambda o: o["a"]),
    "read only": (lambda t: types.MappingProxyType({"a": t}), lambda o: o["a"]),
    "deque of objects": (lambda t: collections.deque([Slots(t)]), lambda o: o[0].t),
    "generator": (lambda t: (x for x in [t]), next),
    "generator function": (_yielding, next),
    "iterator": (lambda t: iter([t]), next),
    "chained": (lambda t: itertools.chain([], map(torch.neg, [t])), lambda o: -next(o)),
    "closure": (lambda t: lambda: t, lambda o: o()),
    "default": (lambda t: lambda t=t: t, lambda o: o()),
    "partial": (lambda t: functools.partial(torch.neg, t), lambda o: -o()),
    "bound method": (lambda t: t.neg, lambda o: -o()),
    "distribution": (lambda t: torch.distributions.Normal(t, 1.0), lambda o: o.mean),
}


class Packing(nn.Module):
    """A block whose result comes packed, and how its user gets at it."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.block, self.kind = Block(WIDTH, 10), kind

    def forward(self, x: torch.Tensor) -> Any:
        return KINDS[self.kind][0](self.block(x))

    @staticmethod
    def use(unit: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return KINDS[unit.kind][1](unit(x))


class Lazy(Packing):
    """Computes while its user goes through the result; its last value is the one that counts."""

    def forward(self, x: torch.Tensor) -> Any:
        for _ in range(2):
            x = self.block(x)
            yield x

    @staticmethod
    def use(unit: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return list(unit(x))[-1]


class Endless(Packing):
    """Goes on for as long as it is asked, and takes advice."""

    def forward(self, x: torch.Tensor) -> Any:
        while True:
            factor = yield x
            x = self.block(x * (factor or 1.0))

    @staticmethod
    def use(unit: nn.Module, x: torch.Tensor) -> torch.Tensor:
        steps = unit(x)
        next(steps)
        out = steps.send(0.5)
        steps.close()
        return out


class Chunks(Packing):
    def forward(self, x: torch.Tensor) -> Any:
        return None, (self.block(part) for part in x.chunk(2))

    @staticmethod
    def use(unit: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(list(unit(x)[1]))


class Keeping(Packing):
    """Returns nothing: the result is an attribute."""

    def forward(self, x: torch.Tensor) -> None:
        self.result = Slots(self.block(x))

    @staticmethod
    def use(unit: nn.Module, x: torch.Tensor) -> torch.Tensor:
        unit(x)
        return unit.result.t


class KeepingInside(Packing):
    """A module inside keeps the result, in a buffer."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.inside = nn.Module()
        self.inside.register_buffer("result", None)

    def forward(self, x: torch.Tensor) -> None:
        self.inside.result = self.block(x)

    @staticmethod
    def use(unit: nn.Module, x: torch.Tensor) -> torch.Tensor:
        unit(x)
        return unit.inside.result


class KeepingMore(Packing):
    """Keeps one of two results, and computes it last."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = x.clone()
        self.result = Slots(self.block(x))
        return result

    @staticmethod
    def use(unit: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return unit(x) + unit.result.t


class Filling(Packing):
    """Puts the result into what it was given."""

    def forward(self, given: dict[str, Any]) -> None:
        given["out"].append(self.block(given["x"]))

    @staticmethod
    def use(unit: nn.Module, x: torch.Tensor) -> torch.Tensor:
        given = {"x": x, "out": []}
        unit(given)
        return given["out"][0]


class Stack(nn.Module):
    def __init__(self, units: Callable[[], list[nn.Module]]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inp, self.units = nn.Linear(WIDTH, WIDTH), nn.ModuleList(units())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inp(x)
        for unit in self.units:
            x = unit.use(unit, x)
        return x


def _faces(net: nn.Module) -> Iterator[nn.Module]:
    """Both faces around a net whose ``units`` are units: freed after forward but for what backward
    needs first, and all."""
    yield wrap(copy.deepcopy(net), policy=_is_unit)
    for reshard in (None, True):
        model = copy.deepcopy(net)
        for unit in (*model.units, model):
            fully_shard(unit, mesh=mesh_of((2, 2)), reshard_after_forward=reshard)
        yield model


def _is_unit(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    return recurse or isinstance(module, (Packing, InPlace, Halves, Frozen))


def _check(net: nn.Module, rank: int, x: Callable[[int], torch.Tensor]) -> None:
    def loss(model: nn.Module, r: int) -> torch.Tensor:
        return model(x(r)).square().mean()

    expected = mean_grads(net, loss)
    for ours in _faces(net):
        for _ in range(2):  # the second one finds what the first one has left
            ours.zero_grad()
            loss(ours, rank).backward()
            assert_close(grads(ours), expected)
            assert all(isinstance(p, DTensor) for p in ours.parameters())


def _input(rank: int) -> torch.Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(rank))


def _in_objects(rank: int) -> None:
    _check(Stack(lambda: [Packing(kind) for kind in KINDS]), rank, _input)


def _kept_and_computed_late(rank: int) -> None:
    kinds = (Lazy, Endless, Chunks, Keeping, KeepingInside, KeepingMore, Filling)
    _check(Stack(lambda: [kind() for kind in kinds]), rank, _input)
    _check(Stack(lambda: [kind() for kind in reversed(kinds)]), rank, _input)


class InPlace(nn.Module):
    """Returns a view, which its user changes in place."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.block, self.how = Block(WIDTH, 10), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.block(x)
        if self.how == "of a view":
            return out.view(2, -1).view(4, WIDTH)
        return out[:, :] if self.how == "slice" else out.t()


class Changing(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.units, self.how = nn.ModuleList(InPlace(how) for _ in range(3)), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for unit in self.units:
            out = unit(x)
            out += 1
            x = out.mul_(0.5).t() if self.how == "transposed" else out.relu_()
        return x


def _views_changed_in_place(rank: int) -> None:
    for how in ("slice", "transposed", "of a view"):
        _check(Changing(how), rank, _input)


class Halves(nn.Module):
    """A part that runs twice within one forward, each time recomputed by backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.part, self.reentrant = Block(WIDTH, 10), reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = checkpoint(self.part, x, use_reentrant=self.reentrant)
        return x


class Twice(nn.Module):
    """Units that run twice, and within them parts that do; recomputed one by one and together."""

    def __init__(self, reentrant: bool, outer: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.units = nn.ModuleList(Halves(reentrant) for _ in range(2))
        self.reentrant, self.outer = reentrant, outer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_()
        for unit in (self.units[0], self.units[1], self.units[0]):
            x = checkpoint(unit, x, use_reentrant=self.reentrant) if self.outer else unit(x)
        return x


def _recomputed_twice(rank: int) -> None:
    for reentrant, outer in itertools.product((True, False), repeat=2):
        _check(Twice(reentrant, outer), rank, _input)
    partly_frozen = Twice(reentrant=True, outer=True)
    for unit in partly_frozen.units:
        unit.part.up.requires_grad_(False)
    _check(partly_frozen, rank, _input)


class Hidden(nn.Module):
    """Puts its result where no walk finds it. Each kind of parameter is needed for the gradient of
    its input."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = Block(WIDTH, 10), kind
        self.norm = nn.LayerNorm(WIDTH)
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.8))

    def forward(self, x: torch.Tensor) -> None:
        parts = {"linear": self.inner, "norm": self.norm, "scale": lambda x: x * self.scale}
        HIDDEN.append(parts[self.kind](x))


HIDDEN: list[torch.Tensor] = []


class UsesHidden(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.units, self.head = nn.ModuleList(Hidden(kind) for _ in range(2)), nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        for unit in self.units:
            unit(x)
            x = HIDDEN.pop().sin()
        return self.head(x)


def _hidden_results(rank: int) -> None:
    """Backward says which module it is, and what to do. Whoever does it gets the gradients."""
    for kind in ("linear", "norm", "scale"):
        net = UsesHidden(kind)
        expected = mean_grads(net, lambda n, r: loss_of(n, _input(r)))
        function = copy.deepcopy(net)
        for unit in (*function.units, function):
            fully_shard(unit, mesh=mesh_of((2, 2)), reshard_after_forward=True)
        class_ = wrap(copy.deepcopy(net), policy=ModuleWrapPolicy({Hidden}))
        for ours, name in ((class_, "Hidden"), (function, "Hidden")):
            for _ in range(2):
                loss = loss_of(ours, _input(rank))
                with pytest.raises(RuntimeError, match="is used while it has no memory") as error:
                    loss.backward()
                text = str(error.value)
                assert re.match(rf"rank {rank}: .* of module .*units\.[01] \({name}\)", text), text
                assert "reshard_after_forward=False" in text and "setStorage" not in text
        for unit in function.units:
            unit.set_reshard_after_forward(False)
        kept = wrap(
            copy.deepcopy(net),
            (4,),
            policy=ModuleWrapPolicy({Hidden}),
            sharding_strategy=ShardingStrategy.SHARD_GRAD_OP,
        )
        for ours in (function, kept):
            ours.zero_grad()
            loss_of(ours, _input(rank)).backward()
            assert_close(grads(ours), expected)


def test_hidden_results() -> None:
    run_checks(4, _hidden_results)


def test_results_in_objects() -> None:
    run_checks(4, _in_objects)


def test_results_that_are_kept_or_computed_late() -> None:
    run_checks(4, _kept_and_computed_late)


def test_views_changed_in_place_and_recomputed_twice() -> None:
    run_checks(4, _views_changed_in_place, _recomputed_twice)


class Frozen(nn.Module):
    """Trains a bias alone; the gradient of its input, in an object, needs the frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, given: Slots) -> torch.Tensor:
        return given.t @ self.weight + self.bias

    @staticmethod
    def use(unit: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return unit(Slots(x))


def _inputs_in_objects(rank: int) -> None:
    _check(Stack(lambda: [Frozen() for _ in range(3)]), rank, _input)


def _graphs_in_any_order(rank: int) -> None:
    """Backwards of graphs that are older than the last forward, with frozen units and an input
    that is a leaf, the same in all steps."""
    net = Stack(lambda: [Frozen() for _ in range(3)])
    leaf = _input(10 + rank).requires_grad_()

    def losses(model: nn.Module, r: int) -> Iterator[torch.Tensor]:
        first, second = (model(_input(step + r)).square().mean() for step in (0, 20))
        yield first
        third = model(_input(10 + r)).square().mean()
        yield second
        yield third

    expected = mean_grads(net, lambda n, r: sum(losses(n, r)))
    for ours in _faces(net):
        for _ in range(2):
            ours.zero_grad()
            for loss in losses(ours, rank):
                loss.backward()
            assert_close(grads(ours), expected)
        for _ in range(3):
            leaf.grad = None
            ours(leaf).square().mean().backward()
            torch.testing.assert_close(leaf.grad, _grad_of_input(net, leaf))


def _grad_of_input(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    (grad,) = torch.autograd.grad(net(x).square().mean(), x)
    return grad


def test_frozen_units() -> None:
    run_checks(4, _inputs_in_objects, _graphs_in_any_order)


def test_the_walk_ends() -> None:
    """Of objects that refer to all there is, or to much data, what is near is found."""
    near, far = torch.ones(1), torch.ones(2)
    crowd = Plain(near)
    crowd.data = [object() for _ in range(20000)]
    crowd.data.insert(10000, far)
    crowd.module, crowd.kind, crowd.library = nn.Linear(2, 2), Plain, torch
    found = flat_tensors(crowd)
    assert any(tensor is near for tensor in found)
    assert not any(tensor is far or isinstance(tensor, nn.Parameter) for tensor in found)
    assert flat_tensors((1, "x", None, near)) == [near]
    assert tensors_behind([5, crowd.child]) == [near]


@pytest.mark.parametrize("kind", KINDS)
def test_the_walk_finds(kind: str) -> None:
    tensor = torch.ones(3, requires_grad=True)
    assert any(found is tensor for found in flat_tensors(KINDS[kind][0](tensor)))
