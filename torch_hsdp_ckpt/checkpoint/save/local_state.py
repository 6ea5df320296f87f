"""A rank's flattened state dict: who can plan each value, and digests to compare ranks by."""

import dataclasses
import functools
import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed.checkpoint.planner_helpers as _helpers
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement

from ...common.cuts import Cuts, cuts_of
from ...common.tensors import (
    RECORD_DTYPES,
    check_storage,
    is_plain,
    is_plain_subclass,
    why_not_saved,
    without_subclass,
)
from ...errors import CheckpointError
from .division import DIGEST_BYTES, Holdings, MeshHolding

_COMMON = frozenset((Tensor, torch.nn.Parameter, DTensor))
# torch 2.15's tensors that say themselves which chunks of a larger one they hold.
_is_checkpointable = getattr(_helpers, "_is_checkpointable_tensor", lambda value: False)


@dataclasses.dataclass(frozen=True)
class SortedNames:
    """A state's names, by who can plan their values, each list sorted.

    ``dtensors`` and ``tensors``: what the static plan takes; each plain tensor is written by one
    rank, whole. ``objects``: everything that is pickled. ``gathered``: what only DCP's planning
    knows how to divide: ShardedTensors, tensor subclasses, placements of which a rank may hold more
    than one box."""

    dtensors: list[str] = dataclasses.field(default_factory=list)
    tensors: list[str] = dataclasses.field(default_factory=list)
    objects: list[str] = dataclasses.field(default_factory=list)
    gathered: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Sharding:
    """A mesh, the digest of its shape and ranks, and how it cuts a tensor."""

    mesh: DeviceMesh
    digest: bytes
    cuts: Cuts


class LocalState:
    """A rank's flattened state dict, from DCP's planner; it holds the live values until
    :meth:`release`."""

    def __init__(self, planner: DefaultSavePlanner) -> None:
        self.planner = planner
        self.values: Mapping[str, Any] = planner.state_dict
        self.paths: Mapping[str, Any] | None = (
            planner.mappings if planner.flatten_state_dict else None
        )
        # Some thousand tensors share a few meshes and placements: what follows from one is kept.
        self._mesh_digests: dict[int, bytes] = {}
        self._shardings: dict[tuple[int, tuple[Placement, ...]], Sharding | None] = {}

    @functools.cached_property
    def names(self) -> SortedNames:
        """Raises CheckpointError for a name without UTF-8, and for a tensor without memory or of a
        kind that is not saved."""
        names = SortedNames()
        subclasses: dict[str, Tensor] = {}
        for name, value in self.values.items():
            _check_name(name)
            if isinstance(value, Tensor) and type(value) not in _COMMON:
                value = _saved_form(value, name)
                if value is not self.values[name]:
                    subclasses[name] = value
            self._list_for(value, name, names).append(name)
        # Ranks lay out what they hold in one order, whatever order their dicts have.
        for listed in (names.dtensors, names.tensors, names.objects, names.gathered):
            listed.sort()
        if subclasses:
            # Not in place: without flattening it is the caller's own dict.
            self.planner.state_dict = {**self.values, **subclasses}
            self.values = self.planner.state_dict
        return names

    def _list_for(self, value: Any, name: str, names: SortedNames) -> list[str]:
        """The one of the lists of ``names`` that a value's name belongs to."""
        if isinstance(value, DTensor):
            if self._is_plain_dtensor(value):
                return names.dtensors
            _refuse_kind(value._local_tensor, name)
            return names.gathered
        if isinstance(value, Tensor):
            plain = value.data if type(value) is torch.nn.Parameter else value
            if not is_plain(plain):
                _refuse_kind(value, name)
                return names.gathered
            check_storage(plain, name)
            return names.tensors
        if isinstance(value, ShardedTensor) or hasattr(value, "__create_write_items__"):
            return names.gathered
        return names.objects

    def _is_plain_dtensor(self, value: DTensor) -> bool:
        if type(value) is not DTensor or self.sharding_of(value) is None:
            return False
        return is_plain(value._local_tensor)

    def sharding_of(self, tensor: DTensor) -> Sharding | None:
        """None if the tensor's placements are not all there is to be said of how it is cut."""
        spec = tensor._spec
        key = (id(spec.mesh), spec.placements)
        try:
            return self._shardings[key]  # hashing placements is slow: once, not twice
        except KeyError:
            cuts = cuts_of(spec.placements, tuple(spec.mesh.shape))
            sharding = None
            if cuts is not None:
                sharding = Sharding(spec.mesh, self._mesh_digest(spec.mesh), cuts)
            self._shardings[key] = sharding
            return sharding

    def holdings(self, global_ranks: Sequence[int]) -> Holdings:
        """What is held of all that ``global_ranks``, the saving group's, can plan themselves."""
        meshes = self._mesh_holdings(global_ranks)
        cut = sorted((holding.mesh, holding.tensors) for holding in meshes)
        names = sorted(self.names.tensors + self.names.objects)
        return Holdings(_digest(cut), _digest(self._other_keys()), meshes, names)

    def _mesh_holdings(self, global_ranks: Sequence[int]) -> list[MeshHolding]:
        meshes: dict[bytes, DeviceMesh] = {}
        tensors: dict[bytes, Any] = {}
        for name in self.names.dtensors:
            tensor, sharding = self.values[name], self._known_sharding(name)
            mesh, digest = sharding.mesh, sharding.digest
            if digest not in meshes:
                meshes[digest] = mesh
                tensors[digest] = _new_digest(tuple(mesh.shape))
            key = name, str(tensor.dtype), tuple(tensor.shape), *sharding.cuts, self._path(name)
            _add(tensors[digest], key)
        return [
            _mesh_holding(digest, tensors[digest].digest(), mesh, global_ranks)
            for digest, mesh in meshes.items()
        ]

    def _known_sharding(self, name: str) -> Sharding:
        """Of one of the ``dtensors``."""
        sharding = self.sharding_of(self.values[name])
        assert sharding is not None
        return sharding

    def dtensors_on(self, meshes: Collection[bytes]) -> dict[str, str]:
        """The DTensors on some meshes, and what they are."""
        named = ((name, self.values[name]) for name in self.names.dtensors)
        return {
            name: f"a sharded tensor {list(value.shape)} of {RECORD_DTYPES[value.dtype]}"
            for name, value in named
            if self._known_sharding(name).digest in meshes
        }

    def _other_keys(self) -> Iterator[tuple[Any, ...]]:
        for name in self.names.tensors:
            tensor = self.values[name]
            yield name, str(tensor.dtype), tuple(tensor.shape), self._path(name)
        for name in self.names.objects:
            kind = type(self.values[name]).__qualname__
            yield name, kind, (), self._path(name)

    def _mesh_digest(self, mesh: DeviceMesh) -> bytes:
        """Of a mesh's shape and ranks."""
        digest = self._mesh_digests.get(id(mesh))
        if digest is None:
            ranks = mesh.mesh
            digest = _digest((tuple(ranks.shape), ranks.numpy().tobytes()))
            self._mesh_digests[id(mesh)] = digest
        return digest

    def _path(self, name: str) -> Any:
        return None if self.paths is None else self.paths[name]

    def paths_of(self, names: Iterable[str]) -> dict[str, Any] | None:
        return None if self.paths is None else {name: self.paths[name] for name in names}

    def items_of(self, names: Iterable[str]) -> list[WriteItem]:
        """What DCP's planner would have this rank write, before ranks that hold the same are told
        apart."""
        items: list[WriteItem] = []
        for name in names:
            value = self.values[name]
            # A DTensor of a mesh without this rank has nothing here.
            if not isinstance(value, DTensor) or value.device_mesh.get_coordinate() is not None:
                items += _helpers._create_write_items(name, value)
        return items

    def release(self, keep: Iterable[str] = ()) -> None:
        """Lets go of the values, but for those named, which the planner will be asked for.

        The live state goes when the caller lets it go, not when the save is done."""
        kept = {name: self.values[name] for name in keep if name in self.values}
        self.planner.state_dict, self.planner.mappings = kept, {}
        self.values, self.paths = {}, None
        self._shardings.clear()


def _refuse_kind(tensor: Tensor, name: str) -> None:
    if isinstance(tensor, ShardedTensor):  # answers no question of this kind
        return
    if reason := why_not_saved(tensor):
        raise CheckpointError(f"{name}: {reason}")


def _saved_form(tensor: Tensor, name: str) -> Tensor:
    """What is saved of a tensor of a subclass: the plain tensor that it is, or itself, if DCP can
    plan it. Raises CheckpointError if it can't."""
    if isinstance(tensor, (DTensor, ShardedTensor)) or _is_checkpointable(tensor):
        return tensor
    _refuse_kind(tensor, name)
    if is_plain_subclass(tensor):
        return without_subclass(tensor)
    try:
        _helpers._create_write_items(name, tensor)
    except Exception as error:
        kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
        raise CheckpointError(
            f"{name}: a tensor of class {kind} is not saved: {type(error).__name__}: {error}"
        ) from error
    return tensor


def _check_name(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{name!r}: a name that has no UTF-8 can't be saved") from None


def _mesh_holding(
    mesh_digest: bytes, tensors: bytes, mesh: DeviceMesh, global_ranks: Sequence[int]
) -> MeshHolding:
    ranks, place = mesh.mesh.flatten().tolist(), -1
    if mesh.get_coordinate() is not None:
        place = ranks.index(mesh.get_rank())
    present = len(set(ranks).intersection(global_ranks))
    return MeshHolding(mesh_digest, tensors, place, present, len(ranks))


def _digest(values: Iterable[Any]) -> bytes:
    return bytes(_new_digest(*values).digest())


def _new_digest(*values: Any) -> "hashlib.blake2b":
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for value in values:
        _add(digest, value)
    return digest


def _add(digest: "hashlib.blake2b", value: Any) -> None:
    digest.update(repr(value).encode("utf-8", "surrogatepass"))
