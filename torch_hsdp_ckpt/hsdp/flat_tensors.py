"""The tensors in what a module takes and returns, whatever they are in."""

import gc
import types
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

# Most arguments and results hold nothing but tensors and these.
_ATOMS = frozenset((int, float, bool, complex, str, bytes, type(None), torch.dtype, torch.device))
# Behind these is all of the program.
_NOT_LOOKED_INTO = (type, types.ModuleType, types.CodeType, types.FrameType, nn.Module)
# How many values are looked at beyond pytrees, nearest first, and how many of what one of them
# holds: an object may refer to the dataset.
_LIMIT, _ITEMS = 10_000, 2000


def flat_tensors(values: Any) -> list[torch.Tensor]:
    """The tensors in a module's arguments or its result: those in pytrees, and behind them those
    that other objects hold, as items, as attributes, in slots, in a generator's or a closure's
    variables."""
    if isinstance(values, torch.Tensor):
        return [values]
    tensors, others = _in_pytrees(values)
    return tensors + tensors_behind(others) if others else tensors


def tensors_of_graph(outputs: Any, since: int) -> list[torch.Tensor]:
    """The tensors in a module's result that have a graph, whose backward they announce.

    ``since``: autograd's sequence number when the module's forward began. What objects that are no
    pytrees have held since before does not count."""
    if isinstance(outputs, torch.Tensor):
        if outputs._base is None:  # most results are that
            return [] if outputs.is_leaf else [outputs]
        return _with_bases([outputs], since)
    tensors, others = _in_pytrees(outputs)
    if others:
        tensors += new_tensors(others, since)
    return _with_bases(tensors, since)


def new_tensors(values: Iterable[Any], since: int) -> list[torch.Tensor]:
    """The tensors behind ``values`` that have a graph, computed since then."""
    return [tensor for tensor in tensors_behind(values) if _is_computed(tensor, since)]


def tensors_behind(values: Iterable[Any]) -> list[torch.Tensor]:
    """The tensors that ``values`` lead to, as the garbage collector finds its way."""
    found: list[torch.Tensor] = []
    # The values are kept: one that was made on the way could leave its id to another.
    seen: dict[int, Any] = {}
    waiting = deque(values)
    while waiting and len(seen) < _LIMIT:
        value = waiting.popleft()
        if type(value) in _ATOMS or id(value) in seen:
            continue
        seen[id(value)] = value
        # By type(): isinstance would ask objects that stand for others, which may be gone.
        if issubclass(type(value), torch.Tensor):
            found.append(value)
        elif not issubclass(type(value), _NOT_LOOKED_INTO):
            waiting.extend(_held_by(value)[:_ITEMS])
    return found


def _in_pytrees(values: Any) -> tuple[list[torch.Tensor], list[Any]]:
    """The tensors in ``values``, and the leaves that may hold others."""
    tensors: list[torch.Tensor] = []
    others: list[Any] = []
    leaves = values if _is_flat(values) else tree_leaves(values)
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            tensors.append(leaf)
        elif type(leaf) not in _ATOMS:
            others.append(leaf)
    return tensors, others


def _is_flat(values: Any) -> bool:
    """Whether ``values`` are a list or tuple of tensors and the like: pytrees take long to say
    so."""
    if type(values) is not tuple and type(values) is not list:
        return False
    return all(isinstance(value, torch.Tensor) or type(value) in _ATOMS for value in values)


def _held_by(value: Any) -> list[Any]:
    if isinstance(value, types.FunctionType):  # not its globals
        return [*(value.__closure__ or ()), *(value.__defaults__ or ())]
    return gc.get_referents(value)


def _with_bases(tensors: list[torch.Tensor], since: int) -> list[torch.Tensor]:
    """Those of ``tensors`` that have a graph, each once, views with their bases: where somebody
    changes a view in place, backward goes past the view that was returned, and through the base."""
    found: dict[int, torch.Tensor] = {}
    for tensor in tensors:
        if tensor.is_leaf:
            continue
        found[id(tensor)] = tensor
        base = tensor._base
        if base is not None and _is_computed(base, since):
            found[id(base)] = base
    return list(found.values())


def _is_computed(tensor: torch.Tensor, since: int) -> bool:
    node = tensor.grad_fn
    return node is not None and node._sequence_nr() >= since
