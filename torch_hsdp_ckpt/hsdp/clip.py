"""Clipping by the norm of all gradients, of however many meshes, and plain ones."""

from collections.abc import Iterable
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def clip_grad_norm(
    parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float, device: torch.device
) -> torch.Tensor:
    """Scales gradients as ``FullyShardedDataParallel.clip_grad_norm_`` says and returns their norm
    before. The zero that stands for no gradients is on ``device``."""
    by_mesh = _with_grads_by_mesh(parameters)
    if not by_mesh:
        return torch.zeros((), device=device)
    norms = [_norm_of_grads(group, norm_type) for group in by_mesh.values()]
    norm = norms[0] if len(norms) == 1 else nn.utils.get_total_norm(norms, norm_type)
    for group in by_mesh.values():
        nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm


def _with_grads_by_mesh(
    parameters: Iterable[nn.Parameter],
) -> dict[DeviceMesh | None, list[nn.Parameter]]:
    """DTensors of one mesh and plain tensors do not mix in one operator. None: plain ones."""
    by_mesh: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            by_mesh.setdefault(mesh, []).append(parameter)
    return by_mesh


def _norm_of_grads(parameters: list[nn.Parameter], norm_type: float) -> torch.Tensor:
    grads = [cast(torch.Tensor, parameter.grad) for parameter in parameters]
    norm = nn.utils.get_total_norm(grads, norm_type)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
