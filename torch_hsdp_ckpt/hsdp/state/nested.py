"""Walks over the leaves of a state: of the dicts, lists and tuples that optimizers keep."""

from collections.abc import Callable, Iterator
from typing import Any

from torch.distributed.tensor import DTensor


def map_leaves(value: Any, function: Callable[[Any], Any]) -> Any:
    """``value`` with ``function`` of each leaf. A named tuple is a leaf."""
    if isinstance(value, dict):
        return {key: map_leaves(item, function) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map_leaves(item, function) for item in value)
    return function(value)


def sharded_leaves(value: Any, path: str = "") -> Iterator[tuple[str, DTensor]]:
    """The DTensors inside by path, in an order that all ranks share whatever order their dicts
    have."""
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from sharded_leaves(value[key], f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from sharded_leaves(item, f"{path}/{i}")
    elif isinstance(value, DTensor):
        yield path, value
