"""An optimizer state that only the mesh's first rank has: its form goes to all ranks at once, each
of its tensors when it is placed."""

import pickle
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from .cut import broadcast, broadcast_object, scatter
from .mismatch import is_dense
from .nested import map_leaves
from .placement import is_first, shards_rows_only


class TensorOnFirstRank(NamedTuple):
    """Stands for the ``number``-th tensor there."""

    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class DTensorOnFirstRank(NamedTuple):
    """Stands for a DTensor there, or a ShardedTensor, which is not sent: a mismatch."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class FirstRank:
    """The sender. ``tensors``: all that it has, on the first rank itself; empty on the others."""

    mesh: DeviceMesh
    tensors: list[torch.Tensor]

    def receive(self, wanted: TensorOnFirstRank, spec: DTensorSpec | None) -> torch.Tensor:
        """The tensor on every rank, as a DTensor if it can be scattered with ``spec``, whole
        otherwise. Collective."""
        tensor = self.tensors[wanted.number] if self.tensors else None
        if spec is not None and shards_rows_only(spec) and spec.mesh == self.mesh:
            return scatter(tensor, spec)
        return broadcast(tensor, wanted.shape, wanted.dtype, self.mesh)


class ReceivedState(NamedTuple):
    """``state``: the first rank's, with placeholders for its tensors. ``problem``: why it could not
    be sent, else empty. ``sender``: None if every rank has its own state, and nothing was sent."""

    state: Any
    problem: str
    sender: FirstRank | None


def receive_state(state: Any, mesh: DeviceMesh) -> ReceivedState:
    """The first rank's ``state`` on every rank; what the others pass is ignored. Collective."""
    tensors: list[torch.Tensor] = []
    packed = b""
    if is_first(mesh):
        try:
            without_tensors = map_leaves(state, lambda leaf: _placeholder(leaf, tensors))
            packed = pickle.dumps((without_tensors, ""))
        except Exception as error:  # The other ranks wait, for an answer at least.
            problem = f"the first rank's state can't be sent: {type(error).__name__}: {error}"
            packed = pickle.dumps((None, problem))
    received, problem = pickle.loads(broadcast_object(packed, mesh))
    return ReceivedState(received, problem, FirstRank(mesh, tensors))


def _placeholder(value: Any, tensors: list[torch.Tensor]) -> Any:
    """What stands for ``value`` in a message: a tensor with dimensions is added to ``tensors``."""
    if not isinstance(value, torch.Tensor):
        return value
    if isinstance(value, DTensor):
        return DTensorOnFirstRank(tuple(value.shape), value.dtype)
    if isinstance(value, ShardedTensor):
        meta = value.metadata()
        return DTensorOnFirstRank(tuple(meta.size), meta.tensor_properties.dtype)
    if value.is_meta:
        return value  # It has no values to send, which the check of the load says on all ranks.
    if not value.ndim or not is_dense(value):
        return value.cpu()
    tensors.append(value)
    return TensorOnFirstRank(len(tensors) - 1, tuple(value.shape), value.dtype)
