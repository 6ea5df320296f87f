"""How one unit communicates: over which groups, and by whose code."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .. import _C
from .callbacks import weak_callback, weak_function
from .comms import UnitComm
from .own_groups import group_of_ranks


def collectives_of(mesh: DeviceMesh) -> _C.Collectives:
    """The gathers and reductions of units on ``mesh``, on the mesh's own groups."""
    replica = mesh.get_group(0).group_name if mesh.ndim == 2 else None
    return _C.Collectives(mesh.get_group(mesh.ndim - 1).group_name, replica, dist.get_rank())


def _reshard_policy(after_forward: bool | int | None) -> _C.ReshardAfterForward:
    """A number of ranks, which is above one, frees as True does."""
    if after_forward is None:
        return _C.ReshardAfterForward.UNLESS_BACKWARD_IS_NEXT
    return _C.ReshardAfterForward.ALWAYS if after_forward else _C.ReshardAfterForward.NEVER


class UnitCommunication:
    """The settings of one unit's gathers and reductions, ``collectives`` on ``mesh``.

    A user's code is held here, where the garbage collector sees what it reaches, not in C++."""

    def __init__(self, mesh: DeviceMesh, collectives: _C.Collectives, core: _C.Unit) -> None:
        self._mesh, self._core = mesh, core
        self._collectives = collectives
        self._neighbours: _C.Collectives | None = None
        self._comms: dict[str, UnitComm] = {}
        self._comm_hook: Callable[..., Any] | None = None
        self._all_reduce_hook: Callable[[Tensor], None] | None = None

    @property
    def shard_group(self) -> dist.ProcessGroup:
        """The mesh's group of the ranks that share the parameters out."""
        return self._mesh.get_group(self._mesh.ndim - 1)

    def join(self, peers: _C.Peers) -> None:
        """``peers``: all ranks of the outermost module, who tell each other of errors."""
        self._collectives.set_peers(peers)
        if self._neighbours is not None:
            self._neighbours.set_peers(peers)

    def set_reduce_groups(self, shard: str, replica: str | None) -> None:
        """Reductions use these groups, by name, in place of the mesh's."""
        self._collectives.set_reduce_groups(shard, replica)

    def set_reshard_after_forward(self, after_forward: bool | int | None) -> None:
        """What forwards leave of the full parameters. A number of ranks, a divisor of the shards':
        each so many neighbours keep them sharded among themselves until backward. Collective over
        these."""
        self._core.reshard_after_forward = _reshard_policy(after_forward)
        is_number = type(after_forward) is int
        self._neighbours = self._among(int(after_forward or 0)) if is_number else None
        self._core.set_reshard_to(self._neighbours)

    def _among(self, count: int) -> _C.Collectives:
        ranks = dist.get_process_group_ranks(self.shard_group)
        first = ranks.index(dist.get_rank()) // count * count
        group = group_of_ranks(ranks[first : first + count], self.shard_group)
        return _C.Collectives(group.group_name, None, dist.get_rank())

    def set_gather_comm(self, comm: UnitComm) -> None:
        """``comm`` sends from the next gather on, or gives it memory."""
        self._comms["gather"] = comm
        run = weak_callback(comm.run) if comm.sends else None
        self._core.set_gather_comm(weak_function(comm.allocate), run)

    def set_reduce_comm(self, comm: UnitComm) -> None:
        """``comm`` sends from the next reduce-scatter on, or gives it memory."""
        self._comms["reduce"] = comm
        run = weak_callback(comm.run) if comm.sends else None
        self._core.set_reduce_comm(weak_function(comm.allocate), run)

    @property
    def has_user_comms(self) -> bool:
        """Whether a user's code sends."""
        return any(comm.sends for comm in self._comms.values())

    @property
    def has_comm_hook(self) -> bool:
        """Whether a user's hook reduces."""
        return self._comm_hook is not None

    def set_comm_hook(self, hook: Callable[..., Any]) -> None:
        """``hook(gradient)``, or ``hook(gradient, shard)`` where there are shards, reduces from the
        next reduction on."""
        self._comm_hook = hook
        self._core.set_comm_hook(weak_callback(self._call_comm_hook))

    def _call_comm_hook(self, gradient: Tensor, shard: Tensor | None) -> None:
        assert self._comm_hook is not None
        self._comm_hook(gradient) if shard is None else self._comm_hook(gradient, shard)

    def set_all_reduce_hook(self, hook: Callable[[Tensor], None] | None) -> None:
        """``hook`` gets the all-reduced averages from the next reduction on."""
        self._all_reduce_hook = hook
        self._core.set_all_reduce_hook(weak_callback(self._call_all_reduce_hook) if hook else None)

    def _call_all_reduce_hook(self, averages: Tensor) -> None:
        assert self._all_reduce_hook is not None
        self._all_reduce_hook(averages)
