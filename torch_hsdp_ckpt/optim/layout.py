"""Which part of a tensor each place of a mesh holds, mesh dimension by mesh dimension.

DTensor applies placements from the first mesh dimension to the last, each to what the ones before
have left. The block *at level d* is what a place holds after the first ``d`` of them: level 0 is
the whole tensor, the mesh's number of dimensions is the local one."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from .. import _C

Coordinate = tuple[int, ...]
_Range = tuple[int, int]  # the first index and how many


@dataclass(frozen=True)
class Layout:
    """How a tensor of ``shape`` and ``dtype`` lies on a mesh of ``mesh_shape``."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    placements: tuple[Placement, ...]
    mesh_shape: tuple[int, ...]

    @functools.cached_property
    def sharded(self) -> tuple[int, ...]:
        """The mesh dimensions over which it is cut, ascending; those of one rank cut nothing."""
        return tuple(d for d in self._dims() if not self.placements[d].is_replicate())

    @functools.cached_property
    def replicated(self) -> tuple[int, ...]:
        """The mesh dimensions along which ranks hold equal parts, ascending."""
        return tuple(d for d in self._dims() if self.placements[d].is_replicate())

    def _dims(self) -> list[int]:
        return [dim for dim, size in enumerate(self.mesh_shape) if size > 1]

    def block_shape(self, place: Coordinate, level: int) -> tuple[int, ...]:
        """The shape of what ``place`` holds at a level."""
        shape = list(self.shape)
        for dim in self.sharded:
            if dim < level:
                shape[self._cut_dim(dim)] = sum(n for _, n in self._ranges(shape, dim)[place[dim]])
        return tuple(shape)

    def cut(self, block: torch.Tensor, dim: int, at: int) -> torch.Tensor:
        """Of a block at level ``dim``, the part at the mesh dimension's coordinate ``at``: a view
        where its rows are adjacent."""
        ranges = self._ranges(block.shape, dim)[at]
        parts = [block.narrow(self._cut_dim(dim), *each) for each in ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self._cut_dim(dim))

    def paste(self, block: torch.Tensor, dim: int, at: int, part: torch.Tensor) -> None:
        """Puts into a block at level ``dim`` what :meth:`cut` takes out."""
        ranges = self._ranges(block.shape, dim)[at]
        parts = torch.split(part, [count for _, count in ranges], self._cut_dim(dim))
        for each, rows in zip(ranges, parts, strict=True):
            block.narrow(self._cut_dim(dim), *each).copy_(rows)

    def _cut_dim(self, dim: int) -> int:
        placement: Any = self.placements[dim]
        tensor_dim: int = placement.dim
        return tensor_dim

    def _ranges(self, shape: Any, dim: int) -> tuple[tuple[_Range, ...], ...]:
        placement: Any = self.placements[dim]
        factor = placement.split_factor if isinstance(placement, _StridedShard) else 1
        return _ranges(shape[placement.dim], self.mesh_shape[dim], factor)


def layout_of(tensor: DTensor, dtype: torch.dtype) -> Layout:
    """The layout of a tensor of ``dtype`` that is placed as ``tensor`` is. ValueError, which says
    of what kind it is, for what is neither cut nor replicated."""
    if problem := _why_not(tensor):
        raise ValueError(f"of shape {tuple(tensor.shape)}, placed {tensor.placements}, {problem}")
    mesh_shape = tuple(tensor.device_mesh.shape)
    layout = Layout(tuple(tensor.shape), dtype, tuple(tensor.placements), mesh_shape)
    place = tuple(tensor.device_mesh.get_coordinate() or ())
    expected, found = layout.block_shape(place, len(mesh_shape)), tensor._local_tensor.shape
    if expected != tuple(found):
        raise ValueError(
            f"of shape {tuple(tensor.shape)}, placed {tensor.placements} on a mesh of shape "
            f"{mesh_shape}, has a local part of shape {tuple(found)} where that of DTensor is "
            f"{expected}: it is cut unevenly in a way that DTensor does not describe"
        )
    return layout


def _why_not(tensor: DTensor) -> str:
    for placement in tensor.placements:
        if not isinstance(placement, (Shard, _StridedShard, Replicate)):
            return "has parts that are neither shards nor replicas: redistribute it first"
    spec = tensor._spec
    order = spec.shard_order  # None where _StridedShard says it
    if order is not None and order != spec.compute_default_shard_order(spec.placements):
        return "is cut over the mesh's dimensions in another order than from first to last"
    return ""


@functools.lru_cache(maxsize=4096)
def _ranges(size: int, count: int, factor: int) -> tuple[tuple[_Range, ...], ...]:
    """For each of ``count`` coordinates, the ranges of ``size`` indices that are its own: those of
    ``torch.chunk``, applied to each of ``factor`` chunks (``_StridedShard``, by which torch says
    that a later mesh dimension has cut first)."""
    parts: list[list[_Range]] = [[] for _ in range(count)]
    for outer in _chunks((0, size), factor):
        for at, inner in enumerate(_chunks(outer, count)):
            parts[at].append(inner)
    return tuple(tuple(each) for each in parts)


def _chunks(whole: _Range, count: int) -> list[_Range]:
    first, size = whole
    rows = [_C.shard_rows(size, count, at) for at in range(count)]
    return [(first + each.first, each.count) for each in rows]
