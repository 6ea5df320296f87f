"""What happens before a module is sharded: it goes onto its device, out of the meta device, and
gets the same values on all ranks."""

from collections.abc import Callable, Iterator, Set

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .module_tree import modules_of_unit
from .shards import check_is_not_shared, mark_as_replaced
from .slots import Slot

_BUCKET_BYTES = 250 * 1024 * 1024  # one broadcast sends so many, as in torch's wrappers


def move(module: nn.Module, device: torch.device) -> None:
    """Moves what no wrapped module inside holds, and is not on the meta device, to ``device``."""
    for owner in modules_of_unit(module):
        owner._apply(  # type: ignore[no-untyped-call]
            lambda tensor: tensor if tensor.is_meta else tensor.to(device), recurse=False
        )


def materialize(
    module: nn.Module,
    param_init_fn: Callable[[nn.Module], None] | None,
    device: torch.device,
    ignored_modules: set[nn.Module],
    ignored: Set[nn.Parameter],
) -> None:
    """Gives memory and values to what no wrapped module inside holds, if any of it is on the meta
    device.

    ``param_init_fn`` is called for every such module; without it ``to_empty`` and
    ``reset_parameters`` of those that have parameters or buffers of their own. Parameters that were
    shared still are. Raises ValueError for a module that can't be initialised, or still is on the
    meta device."""
    owners = [owner for owner in modules_of_unit(module) if owner not in ignored_modules]
    if not any(_meta_tensors(owner, ignored) for owner in owners):
        return
    initialize = _initialization(param_init_fn, device)
    aliases = _slots_of_parameters(owners)
    originals = [first.parameter for first, *_ in aliases]
    for first, *_ in aliases:
        check_is_not_shared(first)
    with torch.no_grad():
        for owner in owners:
            initialize(owner)
    for original, (first, *others) in zip(originals, aliases, strict=True):
        for slot in others:
            setattr(slot.module, slot.name, first.parameter)
        mark_as_replaced(original, first.parameter, first.name, is_sharded=False)
    for owner in owners:
        still_meta = _meta_tensors(owner, ignored)
        if still_meta:
            raise ValueError(
                f"{still_meta[0]} of a {type(owner).__name__} still is on the meta device after "
                "its initialisation"
            )


def _tensors_of(owner: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters and buffers that ``owner`` itself has registered."""
    for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
        if tensor is not None:
            yield name, tensor


def _meta_tensors(owner: nn.Module, ignored: Set[nn.Parameter]) -> list[str]:
    return [name for name, tensor in _tensors_of(owner) if tensor.is_meta and tensor not in ignored]


def _slots_of_parameters(owners: list[nn.Module]) -> list[list[Slot]]:
    """Where each parameter is registered; after the initialisation the slots of one parameter may
    hold several."""
    slots: dict[int, list[Slot]] = {}
    for owner in owners:
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                slots.setdefault(id(parameter), []).append(Slot(owner, name))
    return list(slots.values())


def _initialization(
    param_init_fn: Callable[[nn.Module], None] | None, device: torch.device
) -> Callable[[nn.Module], None]:
    if param_init_fn is None:
        return lambda owner: _reset_parameters(owner, device)
    if not callable(param_init_fn):
        raise ValueError(f"param_init_fn is called with a module; {param_init_fn!r} can't be")
    return param_init_fn


def _reset_parameters(owner: nn.Module, device: torch.device) -> None:
    if not any(True for _ in _tensors_of(owner)):
        return
    owner.to_empty(device=device, recurse=False)
    if not hasattr(owner, "reset_parameters"):
        raise ValueError(
            f"a {type(owner).__name__} on the meta device has no reset_parameters to give it "
            "values: write one, or pass param_init_fn"
        )
    owner.reset_parameters()  # type: ignore[operator]


def synchronize(module: nn.Module, mesh: DeviceMesh, ignored: Set[nn.Parameter]) -> None:
    """Sends the values of the mesh's rank (0, 0) to all: down the replicas first, then along every
    shard group.

    It sends what no wrapped module inside holds, every tensor once. Buffers are included, ignored
    parameters are not."""
    tensors: dict[int, torch.Tensor] = {}
    for owner in modules_of_unit(module):
        for _, tensor in _tensors_of(owner):
            if not _is_sharded(tensor) and tensor not in ignored:
                tensors[id(tensor)] = tensor.detach()
    if not tensors:
        return
    values = list(tensors.values())
    for dim in range(mesh.ndim):
        group = mesh.get_group(dim)
        dist._broadcast_coalesced(group, values, _BUCKET_BYTES, 0)  # type: ignore[attr-defined]


def _is_sharded(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and isinstance(tensor, DTensor)
