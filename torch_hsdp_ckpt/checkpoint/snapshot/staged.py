"""What a rank's files are written from, once training may go on: copies, and what had no place
among them."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from ... import _C
from ...common.gate import CHANGED
from ...common.tensors import local_of
from ...errors import CheckpointError
from ..storage.data_file import StagedRecord, checksum
from ..storage.staging import FileImage, Image, Layout, StagingPool
from ..storage.writer import FileSystemWriter, add_items, write_result

Objects = list[tuple[str, memoryview]]  # names and records


@dataclasses.dataclass
class Staged:
    """A rank's records but for its objects, in the order of its files.

    ``in_place``: how many of them, the first ones, are the live tensors themselves; the others are
    in the image, or will be. ``rest_in_place``: so are the tensors that DCP planned. ``copies``:
    those that sum what they copy. ``sources``: what can be read again, each with its checksum."""

    records: Sequence[Tensor | StagedRecord]
    image: Image
    in_place: int = 0
    rest_in_place: bool = False
    copies: list[_C.StagingCopy] = dataclasses.field(default_factory=list)
    sources: list[tuple[str, Tensor | StagedRecord, int]] = dataclasses.field(default_factory=list)

    @property
    def reads_state(self) -> bool:
        return self.in_place > 0 or self.rest_in_place

    @property
    def copied_bytes(self) -> int:
        return sum(
            it.size if isinstance(it, StagedRecord) else it.nbytes
            for it in self.records[self.in_place :]
        )

    def watch(self, names: Iterable[str], sources: Iterable[Tensor | StagedRecord]) -> None:
        """:meth:`check_sources` will compare these, the first records' tensors, with what is
        written of them."""
        watched = zip(names, sources, self.records, strict=False)
        self.sources = [(name, source, checksum(record)) for name, source, record in watched]

    def check_sources(self) -> None:
        """CheckpointError if one of them has changed. Before anybody may change it by right;
        once."""
        sources, self.sources = self.sources, []
        for name, source, expected in sources:
            if checksum(source) != expected:
                raise CheckpointError(f"{name}: {CHANGED}")


def stage_tensors(
    tensors: Sequence[Tensor],
    files: Sequence[_C.PlannedFile],
    objects: int,
    pool: StagingPool,
    limit: int | None,
) -> Staged:
    """Copies plain tensors of any layout and device, those that find room. Complete on return; on
    CUDA devices the others are then what they are to be."""
    layout = Layout(files, objects, limit)
    image = pool.image(layout, any(tensor.is_cuda for tensor in tensors), limit)
    in_place = layout.first - objects
    copies = [image.view(objects + i, tensor) for i, tensor in enumerate(tensors) if i >= in_place]
    with torch.no_grad():
        for copied, tensor in zip(copies, tensors[in_place:], strict=True):
            copied.copy_(tensor)
    for device in {tensor.device for tensor in tensors[:in_place] if tensor.is_cuda}:
        torch.cuda.current_stream(
            device
        ).synchronize()  # another thread will read them, on a stream of its own
    return Staged([*tensors[:in_place], *copies], image, in_place)


def held_by(value: Any) -> float:
    """Bytes that a copy of a tensor holds; infinitely many where only its class knows. Objects are
    not counted."""
    if not isinstance(value, Tensor):
        return float("inf") if hasattr(value, "__create_write_items__") else 0
    local = local_of(value)
    plain = type(local) in (Tensor, torch.nn.Parameter) and local.layout == torch.strided
    return local.untyped_storage().nbytes() if plain else float("inf")


def write_files(
    writer: FileSystemWriter,
    name: Callable[[int], str],
    files: Sequence[_C.PlannedFile],
    records: Iterable[tuple[str, Any]],
    staged: Staged | None,
    rest: list[WriteItem],
    planner: SavePlanner,
    written_names: list[str],
    on_read: Callable[[], None],
) -> tuple[list[WriteResult], int]:
    """Writes a rank's files: records in the planned places, then what DCP planned. Results of the
    latter, and all files' bytes.

    Args: name: of the file of a number. ``written_names`` is told the names of those that are
        finished. records: the planned ones: names, each with an object's bytes, a tensor, or a
        StagedRecord. on_read: called once, when nothing more is read of the live tensors: at the
        start if there are none.
    """
    single = writer.single_file_per_rank
    groups = ([rest] if rest else []) if single else [[item] for item in rest]
    images, copies = ([], []) if staged is None else (staged.image.files, staged.copies)
    first_staged = sum(map(len, files)) - (
        0 if staged is None else len(staged.records) - staged.in_place
    )
    pending = [on_read]
    if staged is None or not staged.reads_state:
        pending.pop()()
    results: list[WriteResult] = []
    total = done = 0
    records = iter(records)
    count = max(len(files), len(groups)) if single else len(files) + len(groups)
    for number in range(count):
        planned = files[number] if number < len(files) else None
        items = (
            groups[0 if single else number - len(files)]
            if rest and (single or number >= len(files))
            else []
        )
        image = images[number] if number < len(images) else FileImage()
        size, last = (0, done) if planned is None else (planned.size, done + len(planned))
        file = writer._data_file(name(number), size, image, copies, planned)
        try:
            for i, (record, value) in zip(range(done, last), records, strict=False):
                if (
                    pending
                    and i == first_staged
                    and staged is not None
                    and not staged.rest_in_place
                ):
                    file.flush()
                    pending.pop()()
                if isinstance(value, StagedRecord):
                    file.add_staged(record, value)
                elif isinstance(value, memoryview):
                    file.add_objects([(record, value)])
                else:
                    file.add_tensor(record, value)
            written = add_items(file, items, planner)
            if pending and number + 1 == count:
                file.flush()
                pending.pop()()
            file_size = file.finish()
        except BaseException:
            file.discard()
            raise
        written_names.append(name(number))
        if planned is not None and (
            file.written < len(planned) or (not items and file_size != planned.size)
        ):
            raise CheckpointError(
                f"{writer.path}/{name(number)}: its records are not those of the plan"
            )
        done = last
        total += file_size
        extra = zip(written, file.places, strict=True)
        results += [write_result(item, name(number), place, file_size) for item, place in extra]
    return results, total
