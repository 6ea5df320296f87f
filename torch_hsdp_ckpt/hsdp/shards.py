"""Which parameters can be sharded at all, and what is in the place of those that were."""

import weakref
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from ..common.tensors import is_plain_subclass, local_of
from .extensions import is_extended
from .precision import REDUCIBLE_DTYPES
from .slots import Slot

_REPLACEMENT = "_hsdp_ckpt_replacement"  # on a parameter that is in no module any more

# The parameters with such a note that somebody still holds. There are none where optimizers are
# made after wrapping, and then nobody has to look. By id, as tensors compare by value.
_replaced: "weakref.WeakValueDictionary[int, nn.Parameter]" = weakref.WeakValueDictionary()


class Replacement(NamedTuple):
    """What is in a module in place of a parameter that was there before.

    ``name``: the parameter's in its module or unit. ``is_sharded``: a unit has sharded it.
    ``had_gradient``: there was a gradient already, of this rank's data alone."""

    parameter: nn.Parameter
    name: str
    is_sharded: bool
    had_gradient: bool


def mark_as_replaced(
    original: nn.Parameter, replacement: nn.Parameter, name: str, is_sharded: bool = True
) -> None:
    """Leaves a note on ``original``, which another module may share and an optimizer may hold, of
    what is in its place now."""
    if original is replacement:
        return
    # A parameter may come back (load_state_dict(assign=True)); notes must not lead in a circle.
    replacement.__dict__.pop(_REPLACEMENT, None)
    _replaced.pop(id(replacement), None)
    note = Replacement(replacement, name, is_sharded, original.grad is not None)
    setattr(original, _REPLACEMENT, note)
    _replaced[id(original)] = original


def some_are_replaced() -> bool:
    """Whether anybody still holds a parameter that was replaced."""
    return bool(_replaced)


def replacement_of(parameter: torch.Tensor) -> Replacement | None:
    """What is in the place of ``parameter`` now, after all that has replaced it; None if it is
    there itself. ``had_gradient`` is its own."""
    first = last = _note_on(parameter)
    while last is not None and (later := _note_on(last.parameter)) is not None:
        last = later
    if first is None or last is None:
        return None
    return last._replace(had_gradient=first.had_gradient)


def _note_on(parameter: torch.Tensor) -> Replacement | None:
    note: Replacement | None = parameter.__dict__.get(_REPLACEMENT)
    return note


def check_is_not_shared(slot: Slot) -> None:
    """Raises ValueError for a parameter on the meta device that a module which was wrapped before
    has too: what it has got there is sharded already."""
    note = _note_on(slot.parameter)
    if note is not None:
        raise ValueError(
            f"rank {dist.get_rank()}: module {type(slot.module).__name__}: parameter {slot.name} "
            f"{_shared_with_wrapped(note)}"
        )


def _shared_with_wrapped(note: Replacement) -> str:
    return (
        f"is shared with another wrapped module, which has sharded it as {note.name}: wrap "
        "one module that holds all uses, or leave both modules to the same unit"
    )


def why_not_shardable(parameter: nn.Parameter, device: torch.device) -> str:
    """Why no unit on ``device`` can hold ``parameter``, and what to do; an empty text if it
    can."""
    plain = local_of(parameter.data)
    is_plain = type(parameter) is nn.Parameter or type(plain) is torch.Tensor
    if not is_plain and not is_extended(parameter) and not is_plain_subclass(plain):
        return (
            f"is a tensor subclass, {type(plain).__name__}, of which this package knows "
            "no memory to shard: use torch's own fully_shard, or name it in ignored_states"
        )
    note = _note_on(parameter)
    if note is not None and note.is_sharded:
        return _shared_with_wrapped(note)
    if parameter.requires_grad and parameter.dtype not in REDUCIBLE_DTYPES:
        return (
            f"is {parameter.dtype}, whose gradients are not reduced here (float64, float32, "
            "bfloat16, float16 are): name it in ignored_states, or convert it"
        )
    if parameter.device != device and not parameter.is_meta:
        return (
            f"is on {parameter.device} and the mesh needs {device}: move the module first (or "
            "device_id)"
        )
    return ""


def check_same_placement(name: str, found: object, expected: DTensorSpec) -> DTensor:
    """Returns ``found``, which was put into a unit's slot, if it is a DTensor of ``expected``'s
    mesh, placements and shape; raises ValueError otherwise."""
    if not isinstance(found, DTensor):
        raise ValueError(
            f"parameter {name} was replaced by a {type(found).__name__}; expected a DTensor"
        )
    as_before = (
        found.device_mesh == expected.mesh
        and found.placements == expected.placements
        and found.shape == expected.shape
    )
    if not as_before:
        raise ValueError(
            f"parameter {name} was replaced by one of shape {tuple(found.shape)}, placed "
            f"{found.placements} on {found.device_mesh}; expected {tuple(expected.shape)}, "
            f"{expected.placements} on {expected.mesh}"
        )
    return found
