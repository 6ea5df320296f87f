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
    """See ``FullyShardedDataParallel.clip_grad_norm_``. The zero that stands for no gradients is on
    ``device``."""
    # DTensors of one mesh and plain tensors do not mix in one operator.
    by_mesh: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            by_mesh.setdefault(mesh, []).append(parameter)
    if not by_mesh:
        return torch.zeros((), device=device)
    norms = [
        nn.utils.get_total_norm([cast(torch.Tensor, p.grad) for p in ps], norm_type)
        for ps in by_mesh.values()
    ]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    norm = norms[0] if len(norms) == 1 else nn.utils.get_total_norm(norms, norm_type)
    for ps in by_mesh.values():
        nn.utils.clip_grads_with_norm_(ps, max_norm, norm)
    return norm
