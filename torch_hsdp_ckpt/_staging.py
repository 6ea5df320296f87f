"""Host memory that a snapshot is copied to, kept from one save to the next."""

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 64  # every dtype's, and a cache line


class StagingPool:
    """One block of host memory, as large as the largest snapshot so far; pinned if one came from a CUDA device.

    One snapshot at a time: :meth:`copy` overwrites what the call before has returned.
    """

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)

    def reserve(self, size: int, pinned: bool) -> Tensor:
        """The block, of at least ``size`` bytes. Raises RuntimeError without memory."""
        if self._block.numel() < size or (pinned and not self._block.is_pinned()):
            self._block = torch.empty(0, dtype=torch.uint8)  # the old one goes first: never two at a time
            self._block = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        return self._block

    def copy(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Contiguous copies of plain tensors, in host memory, complete on return. Raises RuntimeError without memory."""
        starts, size = [], 0
        for tensor in tensors:
            starts.append(size)
            size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self.reserve(size, any(tensor.is_cuda for tensor in tensors))
        copies = []
        with torch.no_grad():
            for tensor, start in zip(tensors, starts, strict=True):
                raw = self._block[start : start + tensor.nbytes]
                copies.append(raw.view(tensor.dtype).view(tensor.shape).copy_(tensor))
        return copies
