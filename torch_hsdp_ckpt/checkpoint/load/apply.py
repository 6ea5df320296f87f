"""Applied: what is no tensor of the state dict's own is in its place too, and ``Stateful`` objects
have their state."""

import dataclasses
from typing import Any

from ...errors import CheckpointError
from ..stateful import is_stateful
from ..storage.tensor_reads import written_in_part
from .read import Read


@dataclasses.dataclass(frozen=True)
class Applied:
    """``values``, by key: the state dict with the state of ``Stateful`` objects in their place."""

    values: dict[str, Any]


def apply(read: Read, values: dict[str, Any]) -> Applied:
    """Called by all ranks; raises on all, whichever failed. The errors say that tensors may have
    been written in part."""

    def update() -> bytes:
        read.update.apply()
        return b""

    try:
        read.ranks.agreement.run("apply", update)
    except (CheckpointError, OSError) as error:
        raise written_in_part(error) from error
    return Applied(values)


def hand_over(applied: Applied, state_dict: dict[str, Any]) -> None:
    """Puts the values into the caller's state dict. There may be more keys than before, with a
    planner that adds them."""
    for key, loaded in applied.values.items():
        value = state_dict.get(key)
        if is_stateful(value):
            value.load_state_dict(loaded)
        else:
            state_dict[key] = loaded
