"""``Stateful`` objects in a state dict: their code is the user's, and may fail on one rank
alone."""

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor

# These surely are none; to ask for a protocol takes microseconds a value.
_VALUES = frozenset((torch.Tensor, torch.nn.Parameter, DTensor))


def is_stateful(value: Any) -> TypeGuard[Stateful]:
    return type(value) not in _VALUES and isinstance(value, Stateful)


def values_of(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], Exception | None]:
    """The state dict with each ``Stateful`` object's state in its place; or nothing, and what one
    of them raised, which has to travel with the next thing that the ranks tell each other."""
    try:
        return {k: v.state_dict() if is_stateful(v) else v for k, v in state_dict.items()}, None
    except Exception as error:
        return {}, error
