"""Second phase of a save: what this rank writes, and where. Nothing is said to other ranks."""

import dataclasses
import io
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch

from ... import _C
from ..snapshot.staged import Objects
from .metadata_build import BuiltMetadata, start_metadata
from .open import Opened, SaveRequest
from .static_plan import StaticPlan, make_static_plan


class Pickled(NamedTuple):
    """An object that may change, as the record that it will be."""

    data: bytes


@dataclasses.dataclass(frozen=True)
class Planned:
    """This rank's part of a save.

    ``files``: where the planned records lie, objects first. ``metadata``: the coordinator's, on its
    way. ``plan_seconds``: from the call to here."""

    opened: Opened
    static: StaticPlan
    objects: Objects  # the coordinator's, as records
    files: Sequence[_C.PlannedFile]
    metadata: Future[BuiltMetadata] | None
    plan_seconds: float


def plan(opened: Opened) -> Planned:
    """Plans the live state of a save. Raises CheckpointError as ``make_static_plan`` does."""
    request, local = opened.request, opened.local
    names = opened.comparison.divide(local.names)
    static = make_static_plan(local, names, request.agreement.rank, request.global_ranks)
    objects: Objects = []
    if request.agreement.is_coordinator:
        objects = pickled(request, static.objects, local.values)
    files = lay_out(request, static, objects)
    return plan_kept(opened, static, objects, files)


def plan_kept(
    opened: Opened, static: StaticPlan, objects: Objects, files: Sequence[_C.PlannedFile]
) -> Planned:
    """The same with a plan that is there already. ``files``: as :func:`lay_out` has them."""
    metadata = None
    if opened.request.agreement.is_coordinator:
        metadata = start_metadata(opened, static, objects)
    # Tensors and names are in the plan; DCP's planner is asked for what was gathered.
    opened.local.release(keep={item.index.fqn for item in opened.gathered.items})
    return Planned(
        opened=opened,
        static=static,
        objects=objects,
        files=files,
        metadata=metadata,
        plan_seconds=time.perf_counter() - opened.request.started,
    )


def lay_out(request: SaveRequest, static: StaticPlan, objects: Objects) -> Sequence[_C.PlannedFile]:
    """Where this rank's records lie in its files."""
    lengths = [len(data) for _, data in objects]
    return static.plan.layout(static.chunks, lengths, request.writer.single_file_per_rank)


def pickled(request: SaveRequest, names: Sequence[str], values: Mapping[str, Any]) -> Objects:
    """The records of objects. Raises CheckpointError for one that would not be loaded."""
    objects = [(name, _pickled(values[name])) for name in names]
    for name, data in objects:
        request.check_object(name, data)
    return objects


def _pickled(value: Any) -> memoryview:
    """An object's record, as DCP's planner makes it."""
    if isinstance(value, Pickled):
        return memoryview(value.data)
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getbuffer()
