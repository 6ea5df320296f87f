"""Where a captured state is copied to, and the copies: some in the call, the others behind the
gate."""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Sequence

import torch

from ... import _C
from ...common.devices import has_streams
from ..snapshot.device_copy import CopyPair, DeviceCopy, SnapshotCopy
from ..snapshot.staged import Objects, Source, StagedRecords
from ..storage.data_file import HostRecord
from ..storage.staging import Image, Layout
from .capture import Captured, LocalChunk
from .open import SaveRequest
from .plan import lay_out, pickled
from .stage import StagingLimits


@dataclasses.dataclass(frozen=True)
class PlacedRecords:
    """A place in memory for each record that this rank will write, but for the first ones, if the
    limit is too small for all.

    ``live``: how many of the tensors' records have none: they are written from the tensors
    themselves. ``records``: of tensors; their bytes may have still to come."""

    objects: Objects
    files: Sequence[_C.PlannedFile]
    image: Image
    live: int
    records: Sequence[Source]

    @property
    def copied_bytes(self) -> int:
        copied = self.records[self.live :]
        return sum(record.size for record in copied if isinstance(record, HostRecord))

    def staged(self, copies: Sequence[_C.StagingCopy]) -> StagedRecords:
        return StagedRecords(self.records, self.image.files, self.live, copies)


def place_records(request: SaveRequest, captured: Captured, limits: StagingLimits) -> PlacedRecords:
    """Places for what this rank will write, in the pool's memory. The planner must have the
    values."""
    structure = captured.structure
    objects = pickled(request, structure.static.objects, captured.planner.state_dict)
    files = lay_out(request, structure.static, objects)
    layout = Layout(files, len(objects), limits.limit)
    image = limits.pool.image(layout, bool(structure.devices), limits.limit)
    live = layout.first - len(objects)
    records: list[Source] = [_live_record(captured, chunk) for chunk in structure.chunks[:live]]
    places = layout.payloads[layout.first :]
    records += [
        HostRecord(chunk.kind, chunk.shape, image.base + place, chunk.size)
        for chunk, place in zip(structure.chunks[live:], places, strict=True)
    ]
    return PlacedRecords(objects, files, image, live, records)


def _live_record(captured: Captured, chunk: LocalChunk) -> Source:
    """A record that is read from the tensor itself."""
    if chunk.size and captured.structure.devices:
        elements = _elements(captured.memory(chunk.tensor), chunk)
        if has_streams(elements.device):
            return elements.view(chunk.shape)
    address = captured.live.address(chunk.tensor) + chunk.first
    return HostRecord(chunk.kind, chunk.shape, address, chunk.size)


def _elements(memory: torch.Tensor, chunk: LocalChunk) -> torch.Tensor:
    """A record's elements, of those of its tensor."""
    first = chunk.first // memory.itemsize
    return memory[first : first + chunk.size // memory.itemsize]


@dataclasses.dataclass(frozen=True)
class CopiesToMake:
    """Copies of some tensors' records: what the CPU does, and what devices do."""

    host: _C.StagingCopy
    on_devices: Sequence[CopyPair]

    def start(self, device: DeviceCopy | None) -> SnapshotCopy:
        """Queues the devices' copies; the CPU's are done by who runs the result."""
        if device is not None:
            device.start(self.on_devices)
        return SnapshotCopy(self.host, device)


def copies_of(captured: Captured, placed: PlacedRecords, tensors: Iterable[int]) -> CopiesToMake:
    """The copies of these tensors of the state, to the places of their records."""
    structure, wanted = captured.structure, set(tensors)
    on_devices: list[CopyPair] = []
    if structure.devices:
        on_devices = list(_pairs_on_devices(captured, placed, wanted))
    places = placed.image.layout.payloads[len(placed.objects) :]
    host = captured.live.copies(
        structure.chunk_parts, placed.live, placed.image.base, places, sorted(wanted)
    )
    return CopiesToMake(host, on_devices)


def _pairs_on_devices(
    captured: Captured, placed: PlacedRecords, wanted: Collection[int]
) -> Iterator[CopyPair]:
    chunks = captured.structure.chunks[placed.live :]
    for record, chunk in enumerate(chunks, start=len(placed.objects) + placed.live):
        if chunk.size == 0 or chunk.tensor not in wanted:
            continue
        source = _elements(captured.memory(chunk.tensor), chunk)
        if has_streams(source.device):
            yield CopyPair(source, placed.image.view(record, source))


def other_tensors(captured: Captured, tensors: Collection[int]) -> list[int]:
    """The tensors of the state that are not among these."""
    excluded = set(tensors)
    return [i for i in range(len(captured.structure.places)) if i not in excluded]
