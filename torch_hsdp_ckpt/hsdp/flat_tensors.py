"""The tensors in what a module takes and returns."""

import dataclasses
from collections import UserList
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch.utils._pytree import tree_leaves


def flat_tensors(outputs: Any) -> list[torch.Tensor]:
    """The tensors in a module's result, whatever pytrees, dataclasses, mappings, lists and sets
    they are in."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    found: list[torch.Tensor] = []
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
            continue
        for item in _items_of(leaf):
            found += flat_tensors(item)
    return found


def _items_of(leaf: Any) -> list[Any]:
    """What is in a container that is no pytree; nothing for what is no container."""
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        return [getattr(leaf, field.name) for field in dataclasses.fields(leaf)]
    if isinstance(leaf, Mapping):  # subclasses of dict are no pytrees
        return list(leaf.values())
    if isinstance(leaf, (list, tuple, Set, UserList)):
        return list(leaf)
    return []
