"""How a tensor of a state dict differs from the one that it is loaded into, in words; and the error
that every rank raises for what any rank has found, before anything has changed on one of them."""

from collections.abc import Sequence

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ...common.agreement import problems_of_all_ranks
from ...common.tensors import local_of

_SHOWN = 50  # problems in one error message


def have_same_format(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the tensors have in common what a copy of one into the other needs, shapes apart."""
    return (
        one.layout == other.layout
        and one.is_quantized == other.is_quantized
        and one.is_nested == other.is_nested
    )


def is_dense(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested


def placement_mismatch(what: str, value: DTensor, expected: DTensor, intro: str) -> str:
    """The message for a DTensor that is placed otherwise than ``expected``. ``intro``: the words
    before how that is placed, "the module has" say."""
    return (
        f"{what} is placed {value.placements} on {value.device_mesh}, {intro} "
        f"{expected.placements} on {expected.device_mesh}: load it through "
        "torch.distributed.checkpoint, which reshards"
    )


def have_same_local_shape(one: DTensor, other: DTensor) -> bool:
    """Whether the shards have one shape, as their placements alone do not ensure. A copy of one row
    would go into all of them without a word."""
    return local_of(one).shape == local_of(other).shape


def local_shape_mismatch(what: str, value: DTensor, expected: DTensor, owner: str) -> str:
    """The message for a DTensor with another local shape than ``expected``."""
    given, needed = tuple(local_of(value).shape), tuple(local_of(expected).shape)
    return (
        f"size mismatch for {what}: this rank's shard has the shape {given}, the {owner}'s {needed}"
    )


def as_lines(problems: Sequence[str]) -> str:
    """``problems`` as the lines of an error message, all of them up to a sensible number."""
    lines = list(problems[:_SHOWN])
    more = len(problems) - _SHOWN
    if more > 0:
        lines.append(f"... and {more} more")
    return "\n\t".join(lines)


def raise_on_all_ranks(
    mesh: DeviceMesh, problems: Sequence[str], error: type[Exception], summary: str
) -> None:
    """Raises ``error`` on every rank of ``mesh`` if a rank has problems; it lists them all.
    Collective."""
    found = problems_of_all_ranks(mesh, problems)
    if found:
        raise error(f"{summary}; nothing was loaded:\n\t{as_lines(found)}")
