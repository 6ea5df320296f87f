"""Process groups that a model has besides its mesh's own: for reductions, and for what its ranks
ask each other."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .. import _C
from ..common.agreement import Agreement, group_timeout
from .own_groups import GroupRequest, OwnGroup, group_of_all, meet

_Shared = WeakValueDictionary[tuple[str, tuple[int, ...]], OwnGroup]

# Models on one mesh share these groups, as they cost threads and sockets. The keys are the mesh's
# own groups; whoever makes two meshes of the same ranks, for two threads say, has them apart.
_shared: "WeakKeyDictionary[dist.ProcessGroup, _Shared]" = WeakKeyDictionary()
_of_all_ranks: "WeakKeyDictionary[dist.ProcessGroup, str]" = WeakKeyDictionary()


class ReduceGroups(NamedTuple):
    """Names of process groups. ``replica``: None on a mesh without replicas."""

    shard: str
    replica: str | None


@dataclasses.dataclass(frozen=True)
class PeerGroup:
    """The Gloo group of all ranks of a mesh, that nothing but their questions uses. ``ranks``: in
    the default group, ascending."""

    name: str
    ranks: tuple[int, ...]

    def for_schedule(self, channel: int) -> _C.Peers:
        return _C.Peers(self.name, self.ranks, channel)

    def agreement(self, purpose: str) -> Agreement:
        by_name: Any = dist.distributed_c10d._resolve_process_group
        group = by_name(self.name)
        backend = group._get_backend(torch.device("cpu"))
        return Agreement(backend, self.ranks.index(dist.get_rank()), len(self.ranks), purpose)


class ModelGroups:
    """The groups of one outermost module and all wrapped inside. They live as long as a model does
    that has them, or until ``destroy_process_group``."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, str, tuple[int, ...]], OwnGroup] = {}

    def peers(self, meshes: Sequence[DeviceMesh]) -> PeerGroup | None:
        """All ranks of the meshes that units of this one shard over. None for one rank, and under
        torch's "fake" backend, where the other ranks do not exist. Collective over these ranks, who
        all have to find the same ones."""
        distinct = dict.fromkeys(meshes)
        ranks = tuple(sorted({int(rank) for mesh in distinct for rank in mesh.mesh.flatten()}))
        widest = max(distinct, key=lambda mesh: mesh.size())
        parent = widest.get_group(widest.ndim - 1)
        if len(ranks) == 1 or _is_fake(parent):
            return None
        return PeerGroup(self._own("peers", parent, ranks, widest.device_type), ranks)

    def reduce(self, mesh: DeviceMesh) -> ReduceGroups | None:
        """Other groups with the ranks of ``mesh``'s, or None where the mesh's own must do.
        Collective over the mesh.

        Ranks may find that a unit's gradients are complete at different moments of their backwards.
        In one group such a reduction would meet another rank's gather."""
        names = [self._reduce_group(mesh, dim) for dim in range(mesh.ndim)]
        if None in names:
            return None
        return ReduceGroups(str(names[-1]), names[0] if mesh.ndim == 2 else None)

    def _reduce_group(self, mesh: DeviceMesh, dim: int) -> str | None:
        parent = mesh.get_group(dim)
        if dist.get_world_size(parent) == 1:
            return str(parent.group_name)
        if _is_fake(parent):
            return None
        if _is_gloo(parent, mesh.device_type):
            ranks = tuple(dist.get_process_group_ranks(parent))
            return self._own("reduce", parent, ranks, mesh.device_type)
        if mesh.size() != dist.get_world_size():
            # NCCL may split the default communicator for a new group, which every rank of the job
            # would have to join.
            return None
        return _group_of_all(parent, mesh.device_type)

    def _own(
        self, purpose: str, parent: dist.ProcessGroup, ranks: tuple[int, ...], device_type: str
    ) -> str:
        held = (purpose, str(parent.group_name), ranks)
        if held not in self._held:
            self._held[held] = _shared_group(purpose, parent, ranks, device_type)
        return self._held[held].name


def _shared_group(
    purpose: str, parent: dist.ProcessGroup, ranks: tuple[int, ...], device_type: str
) -> OwnGroup:
    # Not all ranks of a 2-D mesh have the same parent; where they have, its name tells more.
    spans_all = len(ranks) == dist.get_world_size(parent)
    scope = f"{purpose}/{parent.group_name if spans_all else ''}"
    request = GroupRequest(scope, ranks, group_timeout(parent, (device_type,)))
    shared = _shared.setdefault(parent, WeakValueDictionary())
    group = meet(request, shared.get((purpose, ranks)))
    shared[purpose, ranks] = group
    return group


def _group_of_all(parent: dist.ProcessGroup, device_type: str) -> str:
    if parent not in _of_all_ranks:
        _of_all_ranks[parent] = group_of_all(parent, group_timeout(parent, (device_type,)))
    return _of_all_ranks[parent]


def _is_fake(group: dist.ProcessGroup) -> bool:
    return str(dist.get_backend(group)) == "fake"


def _is_gloo(group: dist.ProcessGroup, device_type: str) -> bool:
    return f"{device_type}:gloo" in str(dist.get_backend_config(group)).split(",")
