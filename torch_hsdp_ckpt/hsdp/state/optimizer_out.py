"""How an optimizer's state comes out: by parameter names, as it lies in the optimizer; or made
whole from that."""

import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ...common.agreement import is_same_on_all_ranks
from ..module_tree import without_wrappers
from .nested import map_leaves, sharded_leaves
from .optimizer_names import ParameterNames
from .placement import is_first
from .whole import gather

_Finish = Callable[[torch.Tensor], torch.Tensor]


def by_names(saved: dict[str, Any], names: ParameterNames) -> dict[str, Any]:
    """``optim.state_dict()`` with names in place of the optimizer's numbers: no communication, no
    copy."""
    flat = names.flat
    state = {}
    for key, values in saved["state"].items():
        name = flat[key] if isinstance(key, int) else without_wrappers(key)
        state[name] = dict(values) if isinstance(values, dict) else values
    named: dict[str, Any] = {"state": state}
    if "param_groups" in saved:
        named["param_groups"] = [
            {**group, "params": list(group_names)}
            for group, group_names in zip(saved["param_groups"], names.groups, strict=True)
        ]
    return named


def make_whole(
    named: dict[str, Any], mesh: DeviceMesh, first_only: bool, finish: _Finish
) -> dict[str, Any]:
    """``named``, a state by names, with whole tensors, copies that have gone through ``finish``;
    ``{}`` on other ranks than the mesh's first if ``first_only``. Collective: RuntimeError on all
    ranks if they hold states of different parameters."""
    leaves = list(sharded_leaves(named["state"]))
    _check_same_on_all_ranks(leaves, mesh)
    whole = gather([value for _, value in leaves], first_only, finish)
    if first_only and not is_first(mesh):
        return {}
    whole_of = {id(value): tensor for (_, value), tensor in zip(leaves, whole, strict=True)}
    state = map_leaves(named["state"], lambda leaf: _copy_of(leaf, whole_of, finish))
    return {**named, "state": state}


def _copy_of(leaf: Any, whole_of: dict[int, torch.Tensor | None], finish: _Finish) -> Any:
    if isinstance(leaf, DTensor):
        return whole_of[id(leaf)]
    return finish(leaf.clone()) if isinstance(leaf, torch.Tensor) else leaf


def _check_same_on_all_ranks(leaves: list[tuple[str, DTensor]], mesh: DeviceMesh) -> None:
    """Gathers of different tensors would wait for each other."""
    lines = [f"{path} {tuple(value.shape)} {value.dtype}" for path, value in leaves]
    digest = zlib.crc32("\n".join(lines).encode())
    if not is_same_on_all_ranks(mesh, digest):
        raise RuntimeError(
            f"the ranks hold optimizer states of different tensors (rank {dist.get_rank()} has "
            f"{len(lines)}): a whole state needs the same on all of them; did every rank take part "
            "in every step?"
        )
