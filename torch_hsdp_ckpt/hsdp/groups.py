"""Process groups that a model has besides its mesh's own: for reductions, and for what its ranks
ask each other."""

import dataclasses
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .. import _C
from ..common.agreement import Agreement, group_timeout

# A process has one set of process groups; these are made once for each, as they cost threads and
# sockets. The keys are the groups whose ranks they have, or one of those that they span: an entry
# goes with its group.
_reduce_group_names: "WeakKeyDictionary[dist.ProcessGroup, str]" = WeakKeyDictionary()
_peer_group_names: "WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], str]]" = (
    WeakKeyDictionary()
)


class ReduceGroups(NamedTuple):
    """Names of process groups. ``replica``: None on a mesh without replicas."""

    shard: str
    replica: str | None


def reduce_groups_of(mesh: DeviceMesh) -> ReduceGroups | None:
    """Other groups with the ranks of ``mesh``'s, or None where the mesh's own must do. Collective
    over the mesh.

    Ranks may find that a unit's gradients are complete at different moments of their backwards. In
    one group such a reduction would meet another rank's gather."""
    if mesh.device_type != "cpu" and mesh.size() != dist.get_world_size():
        # NCCL may split the default communicator for a new group, which every rank of the job would
        # have to join.
        return None
    shard = _reduce_group_name(mesh, mesh.ndim - 1)
    return ReduceGroups(shard, _reduce_group_name(mesh, 0) if mesh.ndim == 2 else None)


def _reduce_group_name(mesh: DeviceMesh, dim: int) -> str:
    group = mesh.get_group(dim)
    if dist.get_world_size(group) == 1:
        return str(group.group_name)
    if group not in _reduce_group_names:
        new: Any = dist.new_group(
            dist.get_process_group_ranks(group),
            timeout=group_timeout(group, (mesh.device_type,)),
            backend=str(dist.get_backend_config(group)),
            use_local_synchronization=True,
            group_desc="hsdp_ckpt_reduce",
        )
        _reduce_group_names[group] = new.group_name
    return _reduce_group_names[group]


@dataclasses.dataclass(frozen=True)
class PeerGroup:
    """The Gloo group of all ranks of a mesh, that nothing but their questions uses. ``ranks``: in
    the default group, ascending."""

    name: str
    ranks: tuple[int, ...]

    def for_schedule(self) -> _C.Peers:
        return _C.Peers(self.name, self.ranks)

    def agreement(self, purpose: str) -> Agreement:
        group: Any = dist.distributed_c10d._resolve_process_group(self.name)  # type: ignore[arg-type]
        backend = group._get_backend(torch.device("cpu"))
        return Agreement(backend, self.ranks.index(dist.get_rank()), len(self.ranks), purpose)


def peer_group_of(mesh: DeviceMesh) -> PeerGroup | None:
    """Made once for a mesh's ranks; None for one rank, and under torch's "fake" backend, where the
    other ranks do not exist. Collective over the mesh."""
    ranks = tuple(sorted(int(rank) for rank in mesh.mesh.flatten()))
    group = mesh.get_group(mesh.ndim - 1)
    if len(ranks) == 1 or dist.get_backend(group) == "fake":
        return None
    names = _peer_group_names.setdefault(group, {})
    if ranks not in names:
        new: Any = dist.new_group(
            list(ranks),
            timeout=group_timeout(group, (mesh.device_type,)),
            backend="gloo",
            use_local_synchronization=True,
            group_desc="hsdp_ckpt_peers",
        )
        names[ranks] = new.group_name
    return PeerGroup(names[ranks], ranks)
