"""Before a module is sharded: onto its device, out of the meta device, and the same values on all
ranks."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .precision import own_modules

_BUCKET_BYTES = 250 * 1024 * 1024  # of one broadcast, as in torch's wrappers


def move(module: nn.Module, device: torch.device) -> None:
    """To ``device``, what is not on the meta device."""
    module._apply(lambda t: t if t.is_meta else t.to(device))  # type: ignore[no-untyped-call]


def materialize(
    module: nn.Module,
    param_init_fn: Callable[[nn.Module], None] | None,
    device: torch.device,
    ignored_modules: set[nn.Module],
    ignored: set[nn.Parameter],
) -> None:
    """Gives memory and values to what no wrapped module inside holds, if any of it is on the meta
    device.

    ``param_init_fn`` is called for every such module; without it ``to_empty`` and
    ``reset_parameters`` of those that have parameters or buffers of their own. Parameters that were
    shared still are. Raises ValueError for a module that can't be initialised, or still is on the
    meta device."""
    owners = [owner for owner in own_modules(module) if owner not in ignored_modules]
    states = [
        t
        for o in owners
        for t in (*o._parameters.values(), *o._buffers.values())
        if t is not None and t not in ignored
    ]
    if not any(t.is_meta for t in states):
        return
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for owner in owners:
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((owner, name))
    with torch.no_grad():
        for owner in owners:
            if param_init_fn is not None:
                param_init_fn(owner)
            elif any(
                t is not None for t in (*owner._parameters.values(), *owner._buffers.values())
            ):
                owner.to_empty(device=device, recurse=False)
                if not hasattr(owner, "reset_parameters"):
                    raise ValueError(
                        f"a {type(owner).__name__} on the meta device has no reset_parameters to "
                        "give it values: write one, "
                        "or pass param_init_fn"
                    )
                owner.reset_parameters()  # type: ignore[operator]
    for aliases in places.values():
        (first, first_name), *others = aliases
        for owner, name in others:
            setattr(owner, name, first._parameters[first_name])
    for owner in owners:
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None and tensor.is_meta and tensor not in ignored:
                raise ValueError(
                    f"{name} of a {type(owner).__name__} still is on the meta device after its "
                    "initialisation"
                )


def synchronize(module: nn.Module, mesh: DeviceMesh, ignored: set[nn.Parameter]) -> None:
    """Rank (0, 0) of the mesh to all: down the replicas first, then along every shard group.

    What no wrapped module inside holds; every tensor once. Buffers are included, ignored parameters
    are not."""
    tensors: dict[int, torch.Tensor] = {}
    for owner in own_modules(module):
        for parameter in owner._parameters.values():
            if (
                parameter is not None
                and parameter not in ignored
                and not isinstance(parameter, DTensor)
            ):
                tensors[id(parameter)] = parameter.detach()
        for buffer in owner._buffers.values():
            if buffer is not None:
                tensors[id(buffer)] = buffer.detach()
    if not tensors:
        return
    for dim in range(mesh.ndim):
        dist._broadcast_coalesced(mesh.get_group(dim), list(tensors.values()), _BUCKET_BYTES, 0)  # type: ignore[attr-defined]
