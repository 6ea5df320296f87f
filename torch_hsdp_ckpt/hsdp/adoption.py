"""Optimizers that were made before wrapping go on with the sharded parameters.

torch's FSDP1 keeps the user's Parameter objects. Here a unit puts DTensors into their places, which
no plain Parameter can be turned into (``torch.utils.swap_tensors`` refuses: the objects are laid
out differently). So an optimizer that holds the old ones is given the new ones, with its state cut
to this rank's rows. That happens when ``FullyShardedDataParallel`` has wrapped, at an outermost
module's first forward, before a step, and when the optimizer's state is asked for or loaded here:
whichever comes first. Schedulers and whoever else holds the optimizer or its groups need not know.

Nothing here talks to other ranks: one that has made its optimizer later has nothing to adopt."""

import contextlib
import functools
import gc
import threading
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch._compile import _disable_dynamo
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from .optimizers import check_can_step, step_is_over, step_mixed_groups_singly
from .shards import Replacement, replacement_of, some_are_replaced
from .state.cut import own_part
from .state.nested import map_leaves
from .state.optimizer_mismatch import keys_with_dimensions

# Optimizers that held replaced parameters. One that holds a module's may hold the next one's, and
# is at hand then: to find those that nobody knows takes a look at all objects of the process.
_known: "weakref.WeakSet[Optimizer]" = weakref.WeakSet()

# One thread adopts at a time: two may train models of one optimizer.
_adopting = threading.RLock()

_postponed: ContextVar[bool] = ContextVar("postponed", default=False)


class _Adoption(NamedTuple):
    """One parameter of an optimizer that is to be replaced. ``state``: None if it has none."""

    group: list[torch.Tensor]
    position: int
    replacement: Replacement
    state: Any

    @property
    def original(self) -> torch.Tensor:
        return self.group[self.position]


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """Within the block ``adopt_everywhere`` does nothing: the outermost of several wrappers that
    are made at once calls it for all."""
    token = _postponed.set(True)
    try:
        yield
    finally:
        _postponed.reset(token)


def adopt_everywhere() -> None:
    """``adopt`` for all optimizers of the process that hold replaced parameters, if anybody holds
    such parameters at all."""
    if _postponed.get() or not some_are_replaced():
        return
    with _adopting:
        _adopt_for(list(_known))
        if some_are_replaced():
            _adopt_for(_optimizers_of_process())


def _adopt_for(optimizers: list[Optimizer]) -> None:
    for optimizer in optimizers:
        # One that can't follow may be of no use any more. If it is of use, its step raises.
        with contextlib.suppress(ValueError):
            adopt(optimizer)


def _optimizers_of_process() -> list[Optimizer]:
    """All optimizers with groups of their own. (Wrappers around one, such as Accelerate's, show the
    groups of the one inside.)"""
    # By type(): isinstance would ask objects that stand for others, and make them.
    found = [each for each in gc.get_objects() if issubclass(type(each), Optimizer)]
    return [each for each in found if "param_groups" in each.__dict__]


def adopt(optimizer: Optimizer) -> None:
    """Gives ``optimizer`` the parameters that are in the model now for those that were replaced,
    with their state and with gradients that came after wrapping.

    Its groups' lists and its state are changed in place. ValueError, before anything changes, for a
    state that can't be cut by the parameter's rows, naming it."""
    if not some_are_replaced():
        return
    with _adopting:
        adoptions = _adoptions(optimizer)
        _exchange(optimizer, adoptions)
        if adoptions:
            _known.add(optimizer)


def _exchange(optimizer: Optimizer, adoptions: list[_Adoption]) -> None:
    for each in adoptions:
        original, parameter = each.original, each.replacement.parameter
        if each.state is not None:
            del optimizer.state[original]
            optimizer.state[parameter] = each.state
        _move_gradient(original, each.replacement)
        each.group[each.position] = parameter


@_disable_dynamo  # part of a compiled step it would be traced
def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    adopt(optimizer)
    check_can_step(optimizer)
    step_mixed_groups_singly(optimizer)


@_disable_dynamo
def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    step_is_over(optimizer)


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)


def _adoptions(optimizer: Optimizer) -> list[_Adoption]:
    found = []
    like_parameters: frozenset[str] | None = None
    for group in optimizer.param_groups:
        for position, original in enumerate(group["params"]):
            replacement = replacement_of(original)
            if replacement is None:
                continue
            if like_parameters is None:
                like_parameters = keys_with_dimensions(optimizer.state.values())
            state = optimizer.state[original] if original in optimizer.state else None
            cut = _cut_state(state, replacement, like_parameters)
            found.append(_Adoption(group["params"], position, replacement, cut))
    return found


def _cut_state(state: Any, replacement: Replacement, like_parameters: frozenset[str]) -> Any:
    """The state of a whole parameter as that of its shard: what has the parameter's shape is cut to
    this rank's rows; single values stay."""
    parameter = replacement.parameter
    if not isinstance(state, dict) or not isinstance(parameter, DTensor):
        return state

    def cut(key: Any, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or isinstance(leaf, DTensor):
            return leaf
        if leaf.ndim == 0 and (parameter.ndim > 0 or _is_single(key, like_parameters)):
            return leaf
        if leaf.shape != parameter.shape:
            raise ValueError(
                f"rank {dist.get_rank()}: an optimizer that was made before wrapping keeps {key} "
                f"of shape {tuple(leaf.shape)} for the parameter {replacement.name} of shape "
                f"{tuple(parameter.shape)}, which can't be cut to its shards: make the optimizer "
                "after wrapping, from model.parameters()"
            )
        return own_part(leaf, parameter)

    return {key: map_leaves(value, functools.partial(cut, key)) for key, value in state.items()}


def _is_single(key: Any, like_parameters: frozenset[str]) -> bool:
    """Whether a value without dimensions is one beside a parameter without dimensions, rather than
    the state of the parameter's one element."""
    return str(key) not in like_parameters if like_parameters else key == "step"


def _move_gradient(original: torch.Tensor, replacement: Replacement) -> None:
    """Gives the sharded parameter a gradient that somebody has put on the original since it was
    wrapped (torch's ``get_optimizer_state_dict`` does, to make a first state). One from before is
    this rank's own, which no reduction has averaged: it goes, as with torch's fully_shard."""
    parameter, gradient = replacement.parameter, original.grad
    if gradient is None or replacement.had_gradient or parameter.grad is not None:
        return
    if not isinstance(parameter, DTensor) or isinstance(gradient, DTensor):
        parameter.grad = gradient
    else:
        parameter.grad = own_part(gradient, parameter)
