"""What the wrappers of one outermost module share: the schedule, and groups that only its reductions use."""

import dataclasses
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_leaves

from . import _C
from ._unit import ShardedUnit, _weak

# By the group whose ranks they have; an entry goes with its group.
_reduce_group_names: "WeakKeyDictionary[dist.ProcessGroup, str]" = WeakKeyDictionary()


class Root:
    """``units``: of all wrappers, outermost first. ``prefetch``: 0 none, 1 before, 2 after a unit's backward."""

    def __init__(self, units: list[ShardedUnit], prefetch: int) -> None:
        self.units = units
        self.sync = True
        self.reading = False  # an outer wrapper's state_dict() is under way: the parameters are in their slots
        self.schedule = _C.Schedule(prefetch, _weak(self._end_backward))
        groups: dict[DeviceMesh, tuple[str, str | None] | None] = {}
        for unit in units:
            if unit.mesh not in groups:
                groups[unit.mesh] = _reduce_groups(unit.mesh)
            names = groups[unit.mesh]
            if names is not None:
                unit.collectives.set_reduce_groups(*names)
            unit.bind(self.schedule)

    @staticmethod
    def in_backward() -> bool:
        """Whether autograd is running: a forward now is a recomputation."""
        return torch._C._current_graph_task_id() != -1

    def _end_backward(self) -> None:
        for unit in self.units:
            unit.show_sharded()

    def set_sync(self, sync: bool) -> None:
        self.sync = sync
        self.schedule.set_sync(sync)

    def reset(self) -> None:
        self.schedule.reset()
        self._end_backward()


def _reduce_groups(mesh: DeviceMesh) -> tuple[str, str | None] | None:
    """Names of other groups with the ranks of ``mesh``'s, or None where the mesh's own must do.

    Ranks may find that a unit's gradients are complete at different moments of their backwards. In one group such a reduction
    would meet another rank's gather. Made once for each group of a mesh: they cost threads and sockets.
    """
    if mesh.device_type != "cpu" and mesh.size() != dist.get_world_size():
        # NCCL may split the default communicator for a new group, which every rank of the job would have to join.
        return None
    names: list[str | None] = []
    for dim in (mesh.ndim - 1, 0) if mesh.ndim == 2 else (0,):
        group = mesh.get_group(dim)
        if dist.get_world_size(group) == 1:
            names.append(group.group_name)
            continue
        if group not in _reduce_group_names:
            new: Any = dist.new_group(
                dist.get_process_group_ranks(group),
                backend=str(dist.get_backend_config(group)),
                use_local_synchronization=True,
                group_desc="hsdp_ckpt_reduce",
            )
            _reduce_group_names[group] = new.group_name
        names.append(_reduce_group_names[group])
    return str(names[0]), names[1] if mesh.ndim == 2 else None


def flat_tensors(outputs: Any) -> list[torch.Tensor]:
    """The tensors in a module's result, whatever pytree or dataclass they are in."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    found: list[torch.Tensor] = []
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            for field in dataclasses.fields(leaf):
                found += flat_tensors(getattr(leaf, field.name))
    return found
