"""Which box of a tensor each place of a mesh holds.

DTensor cuts a tensor over one mesh dimension after the other, by ``torch.chunk``. Where FSDP2 has
sharded what tensor parallelism had cut before, along a mesh dimension further to the right, it
says so by ``_StridedShard``, whose split factor is the number of pieces that were there."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from .. import _C


class Cuts(NamedTuple):
    """``dims``: for each mesh dimension the tensor dimension that it cuts, or -1. ``order``: the
    mesh dimensions, in the order in which they cut."""

    dims: tuple[int, ...]
    order: tuple[int, ...]


def cuts_of(placements: Sequence[Placement], mesh_shape: Sequence[int]) -> Cuts | None:
    """None where a place may hold something else than one box: for partial sums, and for split
    factors that no cut further to the right explains."""
    dims, late = [], []
    for mesh_dim, placement in enumerate(placements):
        if type(placement) is Replicate:
            dims.append(-1)
        elif type(placement) is Shard:
            dims.append(placement.dim)
        elif type(placement) is _StridedShard:
            if placement.split_factor != _pieces(placements, mesh_shape, mesh_dim):
                return None
            dims.append(placement.dim)
            late.append(mesh_dim)
        else:
            return None
    early = [mesh_dim for mesh_dim in range(len(dims)) if mesh_dim not in late]
    return Cuts(tuple(dims), (*early, *late))


def _pieces(placements: Sequence[Any], mesh_shape: Sequence[int], mesh_dim: int) -> int:
    """Into how many pieces mesh dimensions to the right of one cut its tensor dimension."""
    dim = placements[mesh_dim].dim
    right = list(zip(placements, mesh_shape, strict=True))[mesh_dim + 1 :]
    return math.prod(size for cut, size in right if type(cut) is Shard and cut.dim == dim)


def box_at(
    shape: Sequence[int], cuts: Cuts, mesh_shape: Sequence[int], place: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Offsets and sizes of what ``place`` holds of a tensor of ``shape``; sizes may be 0."""
    offsets, sizes = [0] * len(shape), list(shape)
    for mesh_dim in cuts.order:
        dim = cuts.dims[mesh_dim]
        if dim >= 0:
            rows = _C.shard_rows(sizes[dim], mesh_shape[mesh_dim], place[mesh_dim])
            offsets[dim] += rows.first
            sizes[dim] = rows.count
    return offsets, sizes
