"""Process groups that a model has besides its mesh's own: for reductions, and for what its ranks
ask each other."""

import dataclasses
from collections.abc import Sequence
from datetime import timedelta
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
        _reduce_group_names[group] = _new_group_name(
            dist.get_process_group_ranks(group),
            group_timeout(group, (mesh.device_type,)),
            str(dist.get_backend_config(group)),
            "hsdp_ckpt_reduce",
        )
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
        by_name: Any = dist.distributed_c10d._resolve_process_group
        group = by_name(self.name)
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
        timeout = group_timeout(group, (mesh.device_type,))
        names[ranks] = _new_group_name(ranks, timeout, "gloo", "hsdp_ckpt_peers")
    return PeerGroup(names[ranks], ranks)


def _new_group_name(
    ranks: Sequence[int], timeout: timedelta, backend: str, description: str
) -> str:
    group: Any = dist.new_group(
        list(ranks),
        timeout=timeout,
        backend=backend,
        use_local_synchronization=True,
        group_desc=description,
    )
    return str(group.group_name)
