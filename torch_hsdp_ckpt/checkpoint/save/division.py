"""Who writes what, where ranks hold different values: what they tell each other of it, and what
follows.

Ranks that hold the same have one *role*; a pipeline stage's, say. A DTensor is divided among the
ranks of its mesh, which mostly hold it alike, and other ranks need not know of it. A plain value is
written by ranks that hold it, so that roles tell each other the names of theirs; the ranks of a
mesh that do not hold the same DTensors do so too."""

import dataclasses
import pickle
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ...errors import CheckpointError

DIGEST_BYTES = 16
_SHOWN = 20  # keys in one error message


class Kind(NamedTuple):
    """What is held under a name: "a tensor [4] of float32". ``number``: tells shardings apart."""

    text: str
    number: int = -1


Held = dict[str, dict[Kind, list[int]]]  # the ranks that hold something, by name and kind


class MeshHolding(NamedTuple):
    """A rank's DTensors on one mesh.

    ``mesh``: digest of its shape and ranks. ``tensors``: of the mesh's shape, of what lies on it
    and how that is cut. ``place``: of this rank in the mesh, row-major, or -1. ``places``: those of
    the saving group's ranks, how many; all of the mesh's, how many."""

    mesh: bytes
    tensors: bytes
    place: int
    present: int
    places: int


@dataclasses.dataclass(frozen=True)
class Holdings:
    """What a rank holds that can be planned without DCP. ``dtensors`` and ``others``: digests, of
    ``meshes`` and of the plain values, whose ``names`` are sorted."""

    dtensors: bytes
    others: bytes
    meshes: Sequence[MeshHolding]
    names: Sequence[str]


class Role(NamedTuple):
    """What ranks of one role have in common."""

    dtensors: bytes
    others: bytes


@dataclasses.dataclass(frozen=True)
class Division:
    """What a rank has to know of the others' values to plan its own part.

    ``rank`` and ``size``: in the saving group. ``roles``: of each rank, the first one of the same
    role. ``holders``: the ranks that hold a plain value, where not all do, and those that hold a
    DTensor on one of the ``torn`` meshes, whose ranks do not hold the same. ``replicas``: by mesh,
    the ranks, row-major, of all meshes that hold the same tensors, one after the other, -1 for
    those outside of the group; only where there are several."""

    rank: int
    size: int
    roles: tuple[int, ...]
    holders: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    replicas: Mapping[bytes, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    torn: frozenset[bytes] = frozenset()

    @staticmethod
    def alike(rank: int, size: int) -> "Division":
        """All ranks hold the same."""
        return Division(rank, size, (0,) * size)

    @property
    def is_alike(self) -> bool:
        return not any(self.roles)

    @property
    def speaks(self) -> bool:
        """Whether this rank says what its role holds."""
        return self.roles[self.rank] == self.rank

    def ranks_with(self, name: str) -> Sequence[int]:
        """The ranks that hold a plain value."""
        return self.holders.get(name, range(self.size))

    def with_torn(self, told: Sequence[bytes]) -> "Division":
        """The same with the holders of DTensors on torn meshes. ``told``: of each rank, pickled,
        their names and what they are. Raises CheckpointError for one that other ranks hold as a
        plain value."""
        held: Held = {}
        for rank, data in enumerate(told):
            for name, kind in pickle.loads(data).items():
                add_held(held, name, Kind(kind), [rank])
        holders = {
            name: tuple(sorted(rank for ranks in kinds.values() for rank in ranks))
            for name, kinds in held.items()
        }
        for name in held.keys() & self.holders.keys():
            add_held(held, name, Kind("a value that is not sharded"), self.holders[name])
        refuse_contradictions(held)
        return dataclasses.replace(self, holders={**self.holders, **holders})


def roles_of(told: Sequence[Role]) -> tuple[int, ...]:
    """Of each rank, the first one of the same role."""
    first: dict[Role, int] = {}
    return tuple(first.setdefault(role, rank) for rank, role in enumerate(told))


def packed_holdings(holdings: Holdings, speaks: bool) -> bytes:
    """What ranks tell each other when they are not alike; names are told once a role."""
    return pickle.dumps((holdings.meshes, holdings.names if speaks else ()))


def divide(rank: int, told: Sequence[Role], packed: Sequence[bytes]) -> Division:
    """The division, from what all ranks have told: the roles, and ``packed_holdings``."""
    meshes: list[Sequence[MeshHolding]] = []
    names_of_others: dict[bytes, Sequence[str]] = {}
    for role, data in zip(told, packed, strict=True):
        rank_meshes, names = pickle.loads(data)
        meshes.append(rank_meshes)
        names_of_others.setdefault(role.others, names)
    own = {holding.mesh for holding in meshes[rank]}
    torn, replicas = _compare_meshes(meshes)
    return Division(
        rank=rank,
        size=len(told),
        roles=roles_of(told),
        holders=_holders([role.others for role in told], names_of_others),
        replicas={mesh: ranks for mesh, ranks in replicas.items() if mesh in own},
        torn=torn,
    )


def _holders(
    others: Sequence[bytes], names: Mapping[bytes, Sequence[str]]
) -> dict[str, tuple[int, ...]]:
    """The ranks that hold a value, for the names that some do not hold. ``others``: each rank's
    digest; ``names``: by that."""
    ranks: dict[str, list[int]] = {}
    for rank, digest in enumerate(others):
        for name in names[digest]:
            ranks.setdefault(name, []).append(rank)
    return {name: tuple(held) for name, held in ranks.items() if len(held) < len(others)}


def _compare_meshes(
    meshes: Sequence[Sequence[MeshHolding]],
) -> tuple[frozenset[bytes], dict[bytes, tuple[int, ...]]]:
    """The torn meshes and the replicas, of what each rank has told of its meshes."""
    within: dict[bytes, list[tuple[int, MeshHolding]]] = {}  # by mesh, with ranks
    for rank, holdings in enumerate(meshes):
        for holding in holdings:
            if holding.place >= 0:
                within.setdefault(holding.mesh, []).append((rank, holding))
    torn = set[bytes]()
    alike: dict[bytes, list[list[int]]] = {}  # the ranks of whole meshes, by what they hold
    of_mesh: dict[bytes, bytes] = {}
    for mesh, held in within.items():
        first = held[0][1]
        if len(held) < first.present or len({holding.tensors for _, holding in held}) > 1:
            torn.add(mesh)
            continue
        ranks = [-1] * first.places
        for rank, holding in held:
            ranks[holding.place] = rank
        alike.setdefault(first.tensors, []).append(ranks)
        of_mesh[mesh] = first.tensors
    replicas = {
        mesh: tuple(rank for ranks in alike[tensors] for rank in ranks)
        for mesh, tensors in of_mesh.items()
        if len(alike[tensors]) > 1
    }
    return frozenset(torn), replicas


def add_held(held: Held, name: str, kind: Kind, ranks: Iterable[int]) -> None:
    held.setdefault(name, {}).setdefault(kind, []).extend(ranks)


def refuse_contradictions(held: Held) -> None:
    """CheckpointError for a key under which ranks hold different things: the metadata has room for
    one, the others would be lost."""
    problems = [
        f"{name}: " + ", ".join(f"{kind.text} on ranks {ranks}" for kind, ranks in kinds.items())
        for name, kinds in held.items()
        if len(kinds) > 1
    ]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more keys" if len(problems) > _SHOWN else ""
        raise CheckpointError(
            "ranks hold different things under one key, of which a checkpoint can keep one; give "
            f"each rank keys of its own: {'; '.join(problems[:_SHOWN])}{more}"
        )
