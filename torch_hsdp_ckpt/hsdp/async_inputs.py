"""What tensor parallelism hands to a module before its collectives are done.

A compiled module takes what such a tensor wraps for its input: on torch 2.15 the gradient then
misses the way back into the tensor's own graph, an error or no gradient at all for what is
before."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.utils._pytree import tree_any, tree_map_only


class _Finished(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: AsyncCollectiveTensor) -> Tensor:
        done = tensor.wait()
        return done.view_as(done)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


def finished(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """Arguments whose tensors are there, in the same graph. Where there is nothing to wait for,
    they are themselves: a module may put something into a list that it is given."""
    if not any(map(_holds_one, (*args, *kwargs.values()))):
        return args, kwargs
    done: tuple[tuple[Any, ...], Any] = tree_map_only(
        AsyncCollectiveTensor, _Finished.apply, (args, kwargs)
    )
    return done


def _holds_one(value: Any) -> bool:
    if isinstance(value, (tuple, list, dict)):
        return tree_any(_is_one, value)
    return _is_one(value)


def _is_one(value: Any) -> bool:
    return isinstance(value, AsyncCollectiveTensor)
