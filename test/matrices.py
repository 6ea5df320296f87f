"""What the tests of optimizers over sharded matrices share: matrices, cut or whole, and gradients
that are given to them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from training import full

SIZES = ((8, 16), (16, 8), (13, 7), (3, 5), (1, 4), (33, 65))


def cut(whole: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Any]) -> DTensor:
    return distribute_tensor(whole.clone(), mesh, placements, src_data_rank=None)


def random_matrix(
    shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameters_of(
    mesh: DeviceMesh | None,
    placements: Sequence[Any] = (),
    dtype: torch.dtype = torch.float32,
    sizes: Sequence[tuple[int, int]] = SIZES,
) -> list[nn.Parameter]:
    """Sharded ones, or, without a mesh, those of one process."""
    wholes = [random_matrix(size, i, dtype) for i, size in enumerate(sizes)]
    if mesh is None:
        return [nn.Parameter(whole) for whole in wholes]
    return [nn.Parameter(cut(whole, mesh, placements)) for whole in wholes]


def give_gradients(parameters: Sequence[nn.Parameter], step: int) -> None:
    for i, parameter in enumerate(parameters):
        whole = random_matrix(parameter.shape, 100 * step + i, parameter.dtype)
        if isinstance(parameter, DTensor):
            whole = cut(whole, parameter.device_mesh, parameter.placements)
        parameter.grad = whole


def assert_equal(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(full(ours), full(theirs)), i


def momenta_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [optimizer.state[parameter]["momentum_buffer"] for parameter in parameters]


def matrices_of(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.ndim == 2]
