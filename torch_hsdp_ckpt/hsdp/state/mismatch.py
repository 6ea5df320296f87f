"""How a tensor of a state dict differs from the one that it is loaded into, in words; and the error
that every rank raises for what any rank has found, before anything has changed on one of them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ...common.agreement import problems_of_all_ranks
from ...common.tensors import local_of

_SHOWN = 50  # problems in one error message


class StorageFormat(NamedTuple):
    """What tensors need to have in common to be copied into each other."""

    layout: torch.layout
    is_quantized: bool
    is_nested: bool

    @staticmethod
    def of(tensor: torch.Tensor) -> "StorageFormat":
        return StorageFormat(tensor.layout, tensor.is_quantized, tensor.is_nested)


DENSE = StorageFormat(torch.strided, is_quantized=False, is_nested=False)


def placement_mismatch(what: str, value: DTensor, expected: DTensor, intro: str) -> str:
    """The message for a DTensor that is placed otherwise than ``expected``. ``intro``: the words
    before how that is placed, "the module has" say."""
    return (
        f"{what} is placed {value.placements} on {value.device_mesh}, {intro} "
        f"{expected.placements} on {expected.device_mesh}: load it through "
        "torch.distributed.checkpoint, which reshards"
    )


def local_shape_mismatch(what: str, value: DTensor, expected: DTensor, owner: str) -> str | None:
    """The message for a DTensor with another local shape than ``expected``; None if it is the
    same. A copy of one row would go into all of them without a word."""
    given, needed = tuple(local_of(value).shape), tuple(local_of(expected).shape)
    if given == needed:
        return None
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
