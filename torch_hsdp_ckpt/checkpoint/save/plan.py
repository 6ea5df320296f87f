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
from .whole_plan import own_as_whole, packed_role_plan


class Pickled(NamedTuple):
    """An object that may change, as the record that it will be."""

    data: bytes


@dataclasses.dataclass(frozen=True)
class Planned:
    """This rank's part of a save.

    ``files``: where the planned records lie, objects first. ``metadata``: on the coordinator, on
    its way, if all ranks hold the same; else ``role_plan`` is what the coordinator has to be told
    of this rank's role, on the first rank of each. ``plan_seconds``: from the call to here."""

    opened: Opened
    static: StaticPlan
    objects: Objects  # this rank's, as records
    files: Sequence[_C.PlannedFile]
    metadata: Future[BuiltMetadata] | None
    role_plan: bytes
    plan_seconds: float


def plan(opened: Opened) -> Planned:
    """Plans the live state of a save. Raises CheckpointError as ``make_static_plan`` does."""
    request, local = opened.request, opened.state.local
    kept = opened.state.kept
    if kept is not None:
        kept.prepare_anew()
    static = make_static_plan(local, opened.division, request.global_ranks)
    if kept is not None and not opened.is_gathered:
        kept.replace(opened.division, static)
    objects = pickled(request, static.objects, local.values)
    files = lay_out(request, static, objects)
    return plan_kept(opened, static, objects, files)


def plan_kept(
    opened: Opened, static: StaticPlan, objects: Objects, files: Sequence[_C.PlannedFile]
) -> Planned:
    """The same with a plan that is there already. ``files``: as :func:`lay_out` has them."""
    division, local = opened.division, opened.state.local
    metadata, role_plan = None, b""
    if not division.is_alike:
        role_plan = packed_role_plan(static, objects, local) if division.speaks else b""
    elif opened.request.agreement.is_coordinator:
        metadata = start_metadata(opened, own_as_whole(static, objects, local))
    # Tensors and names are in the plan; DCP's planner is asked for what was gathered.
    local.release(keep={item.index.fqn for item in opened.gathered.items})
    return Planned(
        opened=opened,
        static=static,
        objects=objects,
        files=files,
        metadata=metadata,
        role_plan=role_plan,
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
