"""What all ranks together write, as the coordinator knows it: from its own plan where all hold the
same, else from what each role tells of its own."""

import dataclasses
import pickle
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ... import _C
from ..snapshot.staged import Objects
from .division import Held, Kind, add_held, refuse_contradictions
from .local_state import LocalState
from .static_plan import PlanSource, StaticPlan, TensorSource

ObjectSizes = Sequence[tuple[str, int]]  # names, and bytes of the records


@dataclasses.dataclass(frozen=True)
class WholePlan:
    """``names``: of the plan's tensors. ``objects``: by the rank that writes them. ``paths``: of
    all names in the nested state dict; None if that is not flattened."""

    plan: _C.SavePlan
    names: Sequence[str]
    objects: Mapping[int, ObjectSizes]
    paths: Mapping[str, Any] | None

    def all_names(self) -> list[str]:
        """As the metadata lists them: the tensors, then each rank's objects."""
        written = (name for rank in sorted(self.objects) for name, _ in self.objects[rank])
        return [*self.names, *written]


def own_as_whole(static: StaticPlan, objects: Objects, state: LocalState) -> WholePlan:
    """The coordinator's own plan, where all ranks hold the same."""
    return WholePlan(static.plan, static.names, {0: _sizes(objects)}, state.paths)


class RolePlan(NamedTuple):
    """What ranks of one role hold. ``objects``: what its first rank writes."""

    source: PlanSource
    objects: ObjectSizes
    objects_held: Sequence[str]
    paths: Mapping[str, Any] | None


def packed_role_plan(static: StaticPlan, objects: Objects, state: LocalState) -> bytes:
    """What the first rank of a role tells the coordinator."""
    assert static.source is not None
    paths = state.paths_of([*static.names, *static.objects_held])
    return pickle.dumps(RolePlan(static.source, _sizes(objects), static.objects_held, paths))


def _sizes(objects: Objects) -> ObjectSizes:
    return [(name, len(data)) for name, data in objects]


def put_together(roles: Sequence[int], packed: Sequence[bytes], gathered: Held) -> WholePlan:
    """The plan of all roles. ``roles``: of each rank, the first of its role; ``packed``: of each
    rank, what it has told; ``gathered``: what ranks hold of what DCP has planned.

    Raises CheckpointError for a key under which ranks hold different things."""
    plans = {role: RolePlan(*pickle.loads(packed[role])) for role in sorted(set(roles))}
    sources = dict(zip(plans, _renumbered([plan.source for plan in plans.values()]), strict=True))
    held: Held = {name: dict(kinds) for name, kinds in gathered.items()}
    for role, plan in plans.items():
        ranks = [rank for rank, first in enumerate(roles) if first == role]
        _add_role(held, sources[role], plan.objects_held, ranks)
    refuse_contradictions(held)
    source = _united(list(sources.values()))
    paths: dict[str, Any] | None = {}
    for plan in plans.values():
        paths = None if paths is None or plan.paths is None else {**plan.paths, **paths}
    return WholePlan(
        plan=source.plan(),
        names=[tensor.name for tensor in source.tensors],
        objects={role: plan.objects for role, plan in plans.items()},
        paths=paths,
    )


def _renumbered(sources: Sequence[PlanSource]) -> list[PlanSource]:
    """The same with the shardings of all of them."""
    shardings = sorted({sharding for source in sources for sharding in source.shardings})
    numbers = {sharding: number for number, sharding in enumerate(shardings)}
    return [
        PlanSource(
            shardings,
            [
                tensor._replace(sharding=numbers[source.shardings[tensor.sharding]])
                for tensor in source.tensors
            ],
        )
        for source in sources
    ]


def _add_role(held: Held, source: PlanSource, objects: Sequence[str], ranks: Sequence[int]) -> None:
    for tensor in source.tensors:
        text = source.shardings[tensor.sharding].describe(tensor)
        add_held(held, tensor.name, Kind(text, tensor.sharding), ranks)
    for name in objects:
        add_held(held, name, Kind("an object"), ranks)


def _united(sources: Sequence[PlanSource]) -> PlanSource:
    """Of sources with the same shardings."""
    tensors: dict[str, TensorSource] = {}
    for source in sources:
        tensors = {tensor.name: tensor for tensor in source.tensors} | tensors
    return PlanSource(sources[0].shardings, [tensors[name] for name in sorted(tensors)])
