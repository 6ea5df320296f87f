"""One collective for all blocks that move along a mesh dimension in a round.

Blocks of one dtype are packed one behind the other. ``start_*`` launches the collective and returns
what is on its way, whose ``wait`` gives the blocks by the peer that has sent them. What is sent is
kept until then, as NCCL reads it on a stream of its own."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .plan import Block

_Blocks = Sequence[Block]


@dataclass(frozen=True)
class Transfer:
    """Blocks on their way. ``parts``: what comes of each peer, flat, and which blocks it holds."""

    work: Any
    sent: torch.Tensor
    parts: Sequence[torch.Tensor]
    blocks: Sequence[_Blocks]

    def wait(self) -> list[list[torch.Tensor]]:
        """By peer, the tensors of its blocks, in their shapes: views of what has come."""
        if self.work is not None:
            self.work.wait()
        return [
            _unpacked(part, blocks) for part, blocks in zip(self.parts, self.blocks, strict=True)
        ]


def start_all_to_all(
    outgoing: Sequence[Sequence[torch.Tensor]],
    incoming: Sequence[_Blocks],
    empty: torch.Tensor,
    group: dist.ProcessGroup,
) -> Transfer:
    """Sends ``outgoing[peer]`` to each peer of ``group`` and receives its ``incoming``. ``empty``:
    a tensor without elements, of the dtype and device of all blocks."""
    sent = _packed([tensor for tensors in outgoing for tensor in tensors], empty)
    given = [sum(tensor.numel() for tensor in tensors) for tensors in outgoing]
    taken = [_size(blocks) for blocks in incoming]
    received = empty.new_empty(sum(taken))
    work = dist.all_to_all_single(received, sent, taken, given, group=group, async_op=True)
    return Transfer(work, sent, torch.split(received, taken), incoming)


def start_all_gather(
    own: Sequence[torch.Tensor],
    given: Sequence[_Blocks],
    empty: torch.Tensor,
    group: dist.ProcessGroup,
) -> Transfer:
    """Gives all peers of ``group`` this rank's ``own``, and takes what each of them has ``given``.
    Padded to the largest, as an even all-gather is what all backends have."""
    sizes = [_size(blocks) for blocks in given]
    largest = max(sizes)
    padding = empty.new_zeros(largest - sum(tensor.numel() for tensor in own))
    sent = _packed([*own, padding], empty)
    received = empty.new_empty(len(sizes) * largest)
    work = dist.all_gather_into_tensor(received, sent, group=group, async_op=True)
    rows = received.view(len(sizes), largest)
    parts = [row[:size] for row, size in zip(rows, sizes, strict=True)]
    return Transfer(work, sent, parts, given)


def _packed(tensors: Sequence[torch.Tensor], empty: torch.Tensor) -> torch.Tensor:
    return torch.cat([empty, *(tensor.reshape(-1) for tensor in tensors)])


def _unpacked(part: torch.Tensor, blocks: _Blocks) -> list[torch.Tensor]:
    flat = torch.split(part, [math.prod(block.shape) for block in blocks]) if blocks else ()
    return [each.view(block.shape) for each, block in zip(flat, blocks, strict=True)]


def _size(blocks: _Blocks) -> int:
    return sum(math.prod(block.shape) for block in blocks)
