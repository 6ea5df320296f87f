"""Who makes which tensor whole, and what moves for that in which round.

A plan is made from layouts and costs alone, so that every rank makes the same one without a word.

A tensor goes to its owner along one mesh dimension after the other, from the last one that it is
cut over to the first, as DTensor gathers: a *hop* along a dimension brings the blocks of a line of
ranks to the one that has the owner's coordinate there. Results go the same way back. Along mesh
dimensions with replicas nothing has to be gathered, since the owner's replica has all parts; the
results' parts go to the other replicas at the end. So no process groups are needed but the mesh's
own, and each rank of a shard group sends to other replicas what it holds itself, no more."""

import functools
import hashlib
import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .layout import Coordinate, Layout


@dataclass(frozen=True)
class Block:
    """A part of a tensor, which is named by its position in the plan's layouts."""

    tensor: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Hop:
    """What this rank does along mesh dimension ``dim`` when blocks are gathered. ``sent`` and
    ``received``: by the coordinate of the peer. ``grown``: what they become here. Results are
    scattered the other way: ``received`` is sent then."""

    dim: int
    sent: tuple[tuple[Block, ...], ...]
    received: tuple[tuple[Block, ...], ...]
    grown: tuple[Block, ...]


@dataclass(frozen=True)
class Share:
    """Parts of results that the ranks along a dimension with replicas give each other. ``given``:
    by the coordinate of the giver."""

    dim: int
    given: tuple[tuple[Block, ...], ...]


@dataclass(frozen=True)
class Round:
    """``tensors``: all that are in it. ``owned``: those that this rank makes whole. ``hops``: in
    the order of a gather. ``gathered``: tensors whose gather this rank's parts are needed for."""

    tensors: tuple[int, ...]
    owned: tuple[int, ...]
    gathered: tuple[int, ...]
    hops: tuple[Hop, ...]
    shares: tuple[Share, ...]


@dataclass(frozen=True)
class Plan:
    layouts: tuple[Layout, ...]
    owners: tuple[Coordinate, ...]
    place: Coordinate  # this rank's
    rounds: tuple[Round, ...]
    digest: bytes  # the same on ranks whose plans fit together


@functools.lru_cache(maxsize=64)
def plan_for(
    layouts: tuple[Layout, ...], costs: tuple[float, ...], place: Coordinate, round_bytes: int
) -> Plan:
    """The plan of the rank at ``place`` for tensors on one mesh. ``costs``: of what is done with
    each when it is whole, in any unit. ``round_bytes``: see ``map_whole_tensors``."""
    described = repr((layouts, costs, round_bytes)).encode()
    digest = hashlib.blake2b(described, digest_size=16).digest()
    if not layouts:
        return Plan((), (), place, (), digest)
    mesh_shape = layouts[0].mesh_shape
    numbers = assign(costs, math.prod(mesh_shape))
    owners = tuple(_place_of(number, mesh_shape) for number in numbers)
    order = sorted(range(len(layouts)), key=lambda i: -costs[i])
    rounds = tuple(
        _Planner(layouts, owners, place).round(tensors)
        for tensors in _rounds(layouts, owners, order, round_bytes)
    )
    return Plan(layouts, owners, place, rounds, digest)


def assign(costs: Sequence[float], ranks: int) -> list[int]:
    """The rank that each piece of work goes to: the most costly piece first, each to the rank with
    the least to do so far, of equals to the first (longest processing time first; R. L. Graham,
    "Bounds on Multiprocessing Timing Anomalies", 1969: at most 4/3 of the best)."""
    owners = [0] * len(costs)
    loads = [(0.0, rank) for rank in range(ranks)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, rank = heapq.heappop(loads)
        owners[i] = rank
        heapq.heappush(loads, (load + costs[i], rank))
    return owners


def _place_of(number: int, mesh_shape: tuple[int, ...]) -> Coordinate:
    place: list[int] = []
    for size in reversed(mesh_shape):
        number, at = divmod(number, size)
        place.insert(0, at)
    return tuple(place)


def _rounds(
    layouts: Sequence[Layout],
    owners: Sequence[Coordinate],
    order: Iterable[int],
    round_bytes: int,
) -> list[list[int]]:
    """In a round each owner has ``round_bytes`` of whole tensors at the most, or a single larger
    one; the most costly ones come first, so that the owners' parts of a round are alike."""
    rounds: list[list[int]] = []
    filled: dict[Coordinate, tuple[int, int]] = {}  # an owner's last round, and its bytes there
    for i in order:
        size = math.prod(layouts[i].shape) * layouts[i].dtype.itemsize
        number, used = filled.get(owners[i], (0, 0))
        if used and used + size > round_bytes:
            number, used = number + 1, 0
        filled[owners[i]] = number, used + size
        if number == len(rounds):
            rounds.append([])
        rounds[number].append(i)
    return rounds


@dataclass(frozen=True)
class _Planner:
    """Plans the rounds of the rank at ``place``."""

    layouts: Sequence[Layout]
    owners: Sequence[Coordinate]
    place: Coordinate

    def round(self, tensors: Sequence[int]) -> Round:
        dims = range(len(self.place))
        cut = [d for d in reversed(dims) if any(d in self.layouts[i].sharded for i in tensors)]
        shared = [d for d in dims if any(d in self.layouts[i].replicated for i in tensors)]
        return Round(
            tensors=tuple(tensors),
            owned=tuple(i for i in tensors if self.owners[i] == self.place),
            gathered=tuple(i for i in tensors if self._is_at(i, self.layouts[i].replicated)),
            hops=tuple(self._hop(tensors, dim) for dim in cut),
            shares=tuple(self._share(tensors, dim) for dim in shared),
        )

    def _is_at(self, tensor: int, dims: Iterable[int]) -> bool:
        """Whether this rank has the owner's coordinates in ``dims``."""
        return all(self.place[dim] == self.owners[tensor][dim] for dim in dims)

    def _hop(self, tensors: Sequence[int], dim: int) -> Hop:
        size = self.layouts[0].mesh_shape[dim]
        sent: list[list[Block]] = [[] for _ in range(size)]
        received: list[list[Block]] = [[] for _ in range(size)]
        grown = []
        for i in tensors:
            layout, at = self.layouts[i], self.owners[i][dim]
            # Along later dimensions the blocks have come to the owner's coordinate already.
            later = [d for d in layout.sharded if d > dim]
            if dim not in layout.sharded or not self._is_at(i, (*layout.replicated, *later)):
                continue
            if self.place[dim] != at:
                sent[at].append(Block(i, layout.block_shape(self.place, dim + 1)))
                continue
            grown.append(Block(i, layout.block_shape(self.place, dim)))
            for peer in range(size):
                if peer != at:
                    shape = layout.block_shape(self._with(dim, peer), dim + 1)
                    received[peer].append(Block(i, shape))
        return Hop(dim, tuple(map(tuple, sent)), tuple(map(tuple, received)), tuple(grown))

    def _with(self, dim: int, at: int) -> Coordinate:
        return (*self.place[:dim], at, *self.place[dim + 1 :])

    def _share(self, tensors: Sequence[int], dim: int) -> Share:
        given: list[list[Block]] = [[] for _ in range(self.layouts[0].mesh_shape[dim])]
        for i in tensors:
            layout = self.layouts[i]
            later = [d for d in layout.replicated if d > dim]
            if dim in layout.replicated and self._is_at(i, later):
                shape = layout.block_shape(self.place, len(self.place))
                given[self.owners[i][dim]].append(Block(i, shape))
        return Share(dim, tuple(map(tuple, given)))
