"""Clipping by the norm of all gradients, of however many meshes, and plain ones."""

import math
from collections.abc import Iterable
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from ..common.tensors import local_of


@torch.no_grad()
def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor], max_norm: float, norm_type: float = 2.0
) -> torch.Tensor:
    """``torch.nn.utils.clip_grad_norm_`` for parameters of any meshes together, plain ones too:
    scales all gradients so that their norm is at most ``max_norm``. torch's raises where
    parameters beside tensor parallelism are on another mesh than the others.

    Of a DTensor the whole gradient counts, over all mesh dimensions that cut it; of a plain tensor
    what this rank has. Collective over the meshes. Returns the norm before, a plain 0-d tensor, the
    same on all ranks that hold the same model; zero if there are no gradients."""
    given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    device = given[0].device if given else torch.device("cpu")
    return clip_grad_norm(given, max_norm, norm_type, device)


def clip_grad_norm(
    parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float, device: torch.device
) -> torch.Tensor:
    """Scales gradients as ``FullyShardedDataParallel.clip_grad_norm_`` says and returns their norm
    before. The zero that stands for no gradients is on ``device``."""
    norm_type = float(norm_type)  # or a text: "inf"
    by_mesh = _with_grads_by_mesh(parameters)
    if not by_mesh:
        return torch.zeros((), device=device)
    norms = [_norm_of_grads(group, norm_type) for group in by_mesh.values()]
    norm = norms[0] if len(norms) == 1 else nn.utils.get_total_norm(norms, norm_type)
    for group in by_mesh.values():
        nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm


def _with_grads_by_mesh(
    parameters: Iterable[torch.Tensor],
) -> dict[DeviceMesh | None, list[torch.Tensor]]:
    """DTensors of one mesh and plain tensors do not mix in one operator. None: plain ones."""
    by_mesh: dict[DeviceMesh | None, list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            by_mesh.setdefault(mesh, []).append(parameter)
    return by_mesh


def _norm_of_grads(parameters: list[torch.Tensor], norm_type: float) -> torch.Tensor:
    grads = [cast(torch.Tensor, parameter.grad) for parameter in parameters]
    if isinstance(grads[0], DTensor):
        grads = _norms_of_sharded(cast(list[DTensor], grads), norm_type)
    return nn.utils.get_total_norm(grads, norm_type)


def _norms_of_sharded(grads: list[DTensor], norm_type: float) -> list[torch.Tensor]:
    """The norm of each, over all shards: an all-reduce for each dimension of the mesh that cuts
    any. (DTensor's own collectives have names that two threads of torch's Gloo may write at a
    time.)"""
    mesh = grads[0].device_mesh
    norms = torch.stack([_norm(local_of(grad), norm_type) for grad in grads])
    norms = norms.to(mesh.device_type)  # they may be offloaded, and the groups are not
    for dim in range(mesh.ndim):
        is_cut = [not isinstance(grad.placements[dim], Replicate) for grad in grads]
        if mesh.size(dim) == 1 or not any(is_cut):
            continue
        is_first = mesh.get_local_rank(dim) == 0
        counts = torch.tensor([cut or is_first for cut in is_cut], device=norms.device)
        norms = _over_shards(norms, norm_type, counts, mesh.get_group(dim))
    return list(norms.unbind())


def _norm(local: torch.Tensor, norm_type: float) -> torch.Tensor:
    """In float32 at least: the square of a float16 gradient's norm has no place in float16."""
    dtype = torch.promote_types(local.dtype, torch.float32)
    if local.numel() == 0:  # a rank without rows, for whom torch has no largest element
        identity = math.inf if norm_type == -math.inf else 0.0
        return local.new_full((), identity, dtype=dtype)
    norm: torch.Tensor = torch.linalg.vector_norm(local, norm_type, dtype=dtype)
    return norm


def _over_shards(
    norms: torch.Tensor, norm_type: float, counts: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    """The whole tensors' norms from this rank's parts. ``counts``: whether a part is one of this
    rank's alone, or the first rank's copy of what all of them have."""
    if math.isinf(norm_type):
        op = dist.ReduceOp.MAX if norm_type > 0 else dist.ReduceOp.MIN
        dist.all_reduce(norms, op, group)
        return norms
    power = norm_type or 1.0  # the zero norm counts elements
    sums = torch.where(counts, norms**power, 0.0)
    dist.all_reduce(sums, dist.ReduceOp.SUM, group)
    return sums ** (1.0 / power)
