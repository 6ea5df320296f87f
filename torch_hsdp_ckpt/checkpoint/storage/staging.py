"""Host memory that a snapshot is copied to: laid out as the files that will be written from it,
kept from save to save."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _C
from ...common.tensors import scratch
from .pinned import PinnedBlock

PAGE = 4096  # direct I/O's: of addresses, offsets and sizes
# A file's objects lie in its image only if they are few: they are in memory already.
_FEW = 1 << 20
_NO_MEMORY = torch.empty(0, dtype=torch.uint8, device="cpu")


class Layout:
    """Where the records of a rank's files lie in memory that is laid out as the files are, each
    from a page on.

    Args: files: as planned. objects: how many of the first records are objects. limit: bytes that
        the memory may take. If it is too small, the first tensors have no place in it. None: no
        limit.

    ``images``: for each file the memory, by addresses from 0 on. ``payloads``: of each record,
    objects among them. ``first``: the first record of a tensor that has a place. ``size``: of the
    memory, bytes."""

    def __init__(
        self, files: Sequence[_C.PlannedFile], objects: int, limit: int | None = None
    ) -> None:
        self.files = files
        fit = _fit_from_the_end(files, objects, limit)
        self.first = fit.first
        self.images: list[_C.FileImage] = []
        self.payloads: list[int] = []
        self.size = 0
        for begin, file in zip(fit.begins, files, strict=True):
            offset = 0 if begin < _FEW and limit is None else begin
            size = _round_up(file.size) - offset
            self.images.append(_C.FileImage(offset, self.size, size))
            self.payloads += [self.size + payload - offset for payload in file.payloads]
            self.size += size


class _Fit(NamedTuple):
    """What finds room in memory: records from ``first`` on, each file from ``begins`` on."""

    first: int
    begins: list[int]


def _fit_from_the_end(files: Sequence[_C.PlannedFile], objects: int, limit: int | None) -> _Fit:
    """What comes last in the files is written last, so it is what is copied."""
    first = sum(map(len, files))
    begins = [_round_up(file.size) for file in files]
    room: float = float("inf") if limit is None else limit - PAGE
    for number in reversed(range(len(files))):
        end, begin = begins[number], begins[number]
        for offset, _ in reversed(files[number].places()):
            page = offset // PAGE * PAGE
            if first == objects or end - page > room:
                begins[number] = begin
                return _Fit(first, begins)
            first, begin = first - 1, page
        begins[number] = begin
        room -= end - begin
    return _Fit(first, begins)


def _round_up(size: int) -> int:
    """To the end of a page."""
    return -(-size // PAGE) * PAGE


class Image:
    """A layout in memory, with real addresses."""

    def __init__(self, block: Tensor, layout: Layout) -> None:
        self.layout, self._block = layout, block
        self._start = -block.data_ptr() % PAGE
        self.base = block.data_ptr() + self._start
        self.files = [
            _C.FileImage(image.offset, self.base + image.address, image.size)
            for image in layout.images
        ]

    def view(self, record: int, like: Tensor) -> Tensor:
        """A record's place, as a contiguous tensor of the dtype and the shape of ``like``."""
        start = self._start + self.layout.payloads[record]
        return self._block[start : start + like.nbytes].view(like.dtype).view(like.shape)

    def close(self) -> None:
        """Lets go of the memory, which the pool keeps, or gives back when it makes more."""
        self._block = _NO_MEMORY


class StagingPool:
    """One block of host memory, as large as the largest image so far; pinned, if that can be, if
    one was for a device's tensors.

    One image at a time: :meth:`image` hands out the memory of the one before again.
    """

    def __init__(self) -> None:
        self._block = _NO_MEMORY
        self._pinned: PinnedBlock | None = None

    def image(self, layout: Layout, pinned: bool, limit: int | None = None) -> Image:
        """Memory for a layout, contents undefined. Raises OSError without memory.

        ``limit``: bytes; an older block that is larger is given back.
        """
        size = layout.size + PAGE if layout.size else 0
        is_small = self._block.numel() < size or (pinned and size > 0 and self._pinned is None)
        is_large = limit is not None and self._block.numel() > limit
        if is_small or is_large:
            self._free()  # the old one goes first: never two at a time
            if pinned and size:
                self._pinned = PinnedBlock(size)
                self._block = self._pinned.memory
            elif size:
                self._block = scratch(size, huge=True)
        return Image(self._block, layout)

    def _free(self) -> None:
        pinned, self._pinned = self._pinned, None
        if pinned is not None:
            pinned.free()
        self._block = _NO_MEMORY
