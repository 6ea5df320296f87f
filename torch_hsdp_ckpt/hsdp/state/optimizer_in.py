"""How an optimizer's state goes in: from a state by names to what ``Optimizer.load_state_dict``
takes. The plan, in which everything was checked, is applied: whole tensors are cut, and those that
only the first rank has are sent."""

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from ...common.tensors import dtensor_around, local_of
from ..layout import spec_with_dtype
from .cut import shard_of
from .from_first_rank import DTensorOnFirstRank, FirstRank, TensorOnFirstRank
from .nested import map_leaves
from .optimizer_mismatch import ParameterState
from .optimizer_plan import (
    OptimizerLoadPlan,
    OptimizerLoadRequest,
    StateEntry,
    plan_optimizer_load,
)

_Whole = torch.Tensor | TensorOnFirstRank
_WHOLE = (torch.Tensor, TensorOnFirstRank)


def loadable_state(request: OptimizerLoadRequest) -> dict[str, Any]:
    """What ``Optimizer.load_state_dict`` takes. Collective over the mesh: ValueError on all ranks,
    which lists what does not fit, or on none."""
    return _apply(plan_optimizer_load(request))


def _apply(plan: OptimizerLoadPlan) -> dict[str, Any]:
    """Cuts the whole tensors of the plan; those of the first rank are sent. Collective if there
    are such."""
    loadable: dict[str, Any] = {
        "state": {key: _placed_entry(entry, plan.sender) for key, entry in plan.entries.items()}
    }
    if plan.param_groups is not None:
        loadable["param_groups"] = plan.param_groups
    return loadable


def _placed_entry(entry: StateEntry, sender: FirstRank | None) -> Any:
    if not isinstance(entry.value, dict):
        return entry.value
    return {key: _placed_item(key, item, entry.target, sender) for key, item in entry.value.items()}


def _placed_item(
    key: Any, item: Any, target: ParameterState | None, sender: FirstRank | None
) -> Any:
    """``item`` with its tensors, also those in dicts and lists inside, as the optimizer keeps
    them."""
    if isinstance(item, DTensor):
        return item
    current = None
    if target is not None and isinstance(item, _WHOLE):
        current = target.current.get(key)

    def place(leaf: Any) -> Any:
        if isinstance(leaf, DTensorOnFirstRank):
            raise ValueError(f"{key} holds a sharded tensor on the first rank: it has to be whole")
        if isinstance(leaf, DTensor) or not isinstance(leaf, _WHOLE):
            return leaf
        if target is None or (spec := _spec_of(key, leaf, target, current)) is None:
            return _received(leaf, None, sender)
        return _placed_tensor(_received(leaf, spec, sender), spec, local_of(target.parameter))

    return map_leaves(item, place)


def _received(value: _Whole, spec: DTensorSpec | None, sender: FirstRank | None) -> torch.Tensor:
    if not isinstance(value, TensorOnFirstRank):
        return value
    assert sender is not None
    return sender.receive(value, spec)


def _placed_tensor(value: torch.Tensor, spec: DTensorSpec, parameter: torch.Tensor) -> torch.Tensor:
    """``value`` as the optimizer keeps it: cut, where this rank's part of the ``parameter`` is."""
    if isinstance(value, DTensor):
        return value
    device = spec.mesh.device_type if parameter.is_meta else parameter.device
    local = local_of(shard_of(value, spec)).to(device).contiguous()
    # A copy is kept: the whole tensor may go, and the caller's stays as it is.
    if local.untyped_storage()._cdata == value.untyped_storage()._cdata:
        local = local.clone()
    return dtensor_around(local, spec)


def _spec_of(key: Any, value: _Whole, target: ParameterState, current: Any) -> DTensorSpec | None:
    """How ``value`` is placed in the optimizer; None if it is a plain tensor there."""
    like = _placed_like(target, current)
    if like is None:
        return None
    shape = tuple(value.shape)
    if shape == tuple(like.shape) and not _is_single_value(key, value, target, current):
        return spec_with_dtype(like._spec, value.dtype)
    if shape == (target.elements,):
        return _replicated(like.device_mesh, value)
    return None


def _is_single_value(key: Any, value: _Whole, target: ParameterState, current: Any) -> bool:
    """Whether it is one beside a parameter without dimensions, like Adam's ``step``, rather than
    the state of the parameter's one element."""
    is_known = isinstance(current, torch.Tensor)
    return not (is_known or len(value.shape) > 0 or str(key) in target.like_parameters)


def _placed_like(target: ParameterState, current: Any) -> DTensor | None:
    """What the optimizer has already, else the parameter; None if that is a plain tensor."""
    if not isinstance(target.parameter, DTensor):
        return None
    like = current if isinstance(current, torch.Tensor) else target.parameter
    return like if isinstance(like, DTensor) else None


def _replicated(mesh: DeviceMesh, value: _Whole) -> DTensorSpec:
    """For a tensor of all parameters end to end, which every rank has whole."""
    meta = TensorMeta(torch.Size(value.shape), (1,), value.dtype)
    return DTensorSpec(mesh, (Replicate(),) * mesh.ndim, tensor_meta=meta)
