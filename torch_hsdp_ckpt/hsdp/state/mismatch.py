"""One answer on every rank: what one rank finds wrong is raised by all, before anything has changed
on any of them."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

_SHOWN = 50  # names in one error message


def kind_of(tensor: torch.Tensor) -> tuple[torch.layout, bool, bool]:
    """What tensors have to have in common to be copied into each other: (layout, quantized,
    nested)."""
    return tensor.layout, tensor.is_quantized, tensor.is_nested


def listed(problems: Sequence[str]) -> str:
    """``problems`` as the lines of an error message, all of them up to a sensible number."""
    rest = len(problems) - _SHOWN
    return "\n\t".join([*problems[:_SHOWN], *([f"... and {rest} more"] if rest > 0 else [])])


def groups_of(mesh: DeviceMesh) -> list[dist.ProcessGroup]:
    """Groups whose reductions one after the other reach all ranks of ``mesh``; one, if these are
    all ranks that there are."""
    if mesh.size() == dist.get_world_size():
        return [dist.distributed_c10d._get_default_group()]
    return [mesh.get_group(dim) for dim in range(mesh.ndim)]


def agree(mesh: DeviceMesh, problems: Sequence[str]) -> list[str]:
    """The problems of all ranks of ``mesh``; empty if no rank has one. Collective.

    A reduction of one number in each dimension; texts travel only if there are any. This rank's
    come first, as they are; those that only others have follow, with a rank that has them."""
    flag = torch.tensor([1 if problems else 0], dtype=torch.int32, device=mesh.device_type)
    groups = groups_of(mesh)
    for group in groups:
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
    if flag.item() == 0:
        return []
    by_rank = {dist.get_rank(): list(problems)}
    for group in groups:
        gathered: list[dict[int, list[str]] | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, by_rank, group=group)
        for part in gathered:
            by_rank.update(part or {})
    found = dict.fromkeys(problems)
    elsewhere: dict[str, int] = {}
    for rank in sorted(by_rank):
        for text in by_rank[rank]:
            if text not in found:
                elsewhere.setdefault(text, rank)
    return [*found, *(f"rank {rank}: {text}" for text, rank in elsewhere.items())]
