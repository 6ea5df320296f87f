"""The rounds of a plan, carried out: gather, compute, scatter, each behind the one before.

While a round is computed the next one's blocks come in, and the results of the one before go out.
All ranks queue their collectives in one order, whatever they own of a round."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .plan import Hop, Plan, Round, Share
from .transfer import Transfer, start_all_gather, start_all_to_all

_Blocks = dict[int, torch.Tensor]  # what this rank holds of each tensor of a round


class Work(Protocol):
    """What is done with tensors, which are named by their position in the plan."""

    def local(self, tensor: int) -> torch.Tensor:
        """This rank's part, of the plan's dtype. Asked for when the tensor's round begins, on the
        ranks whose parts are needed."""

    def compute(self, tensor: int, whole: torch.Tensor) -> torch.Tensor:
        """The result, of the shape and dtype of ``whole``. On the owner only."""

    def store(self, tensor: int, local: torch.Tensor) -> None:
        """Takes this rank's part of the result: a view of memory that goes with its round."""


def run_rounds(mesh: DeviceMesh, plan: Plan, work: Work, device: torch.device) -> None:
    """Does ``work`` on all tensors of ``plan``, which all ranks of ``mesh`` have made alike, and
    which lie on ``device``. Collective over the mesh."""
    lines = [_Line(mesh, plan, each, device) for each in plan.rounds]
    ahead = [_start_gather(lines[0], work)] if lines else []
    behind: list[_OnItsWay] = []
    for number, line in enumerate(lines):
        wholes = _finish_gather(ahead.pop())
        if number + 1 < len(lines):
            ahead.append(_start_gather(lines[number + 1], work))
        results = {i: _computed(plan, work, i, wholes.pop(i)) for i in line.round.owned}
        if behind:
            _finish_scatter(behind.pop(), work)
        behind.append(_start_scatter(line, results))
    if behind:
        _finish_scatter(behind.pop(), work)


def _computed(plan: Plan, work: Work, tensor: int, whole: torch.Tensor) -> torch.Tensor:
    result = work.compute(tensor, whole)
    layout = plan.layouts[tensor]
    if tuple(result.shape) != layout.shape or result.dtype != layout.dtype:
        raise ValueError(
            f"rank {dist.get_rank()}: the result for tensor {tensor} is of shape "
            f"{tuple(result.shape)} and {result.dtype}: expected {layout.shape} and {layout.dtype}"
        )
    return result


@dataclass(frozen=True)
class _Line:
    """One round, and the collectives along the mesh's dimensions that move its blocks."""

    mesh: DeviceMesh
    plan: Plan
    round: Round
    device: torch.device

    def empty(self) -> torch.Tensor:
        return torch.empty(0, dtype=self.plan.layouts[0].dtype, device=self.device)

    def start_gather(self, hop: Hop, blocks: _Blocks) -> Transfer:
        outgoing = [[blocks.pop(block.tensor) for block in sent] for sent in hop.sent]
        return start_all_to_all(outgoing, hop.received, self.empty(), self.mesh.get_group(hop.dim))

    def finish_gather(self, hop: Hop, arriving: Transfer, blocks: _Blocks) -> None:
        """Puts together what has come and what was here."""
        layouts, here = self.plan.layouts, self.plan.place[hop.dim]
        parts = arriving.wait()
        for grown in hop.grown:
            block = self.empty().new_empty(grown.shape)
            layouts[grown.tensor].paste(block, hop.dim, here, blocks[grown.tensor])
            blocks[grown.tensor] = block
        for peer, received in enumerate(hop.received):
            for each, part in zip(received, parts[peer], strict=True):
                layouts[each.tensor].paste(blocks[each.tensor], hop.dim, peer, part)

    def start_scatter(self, hop: Hop, blocks: _Blocks) -> Transfer:
        layouts, here = self.plan.layouts, self.plan.place[hop.dim]
        outgoing = [
            [layouts[each.tensor].cut(blocks[each.tensor], hop.dim, peer) for each in received]
            for peer, received in enumerate(hop.received)
        ]
        sent = start_all_to_all(outgoing, hop.sent, self.empty(), self.mesh.get_group(hop.dim))
        for grown in hop.grown:  # copies, so that the whole ones go
            own = layouts[grown.tensor].cut(blocks[grown.tensor], hop.dim, here)
            blocks[grown.tensor] = own.clone()
        return sent

    def finish_scatter(self, hop: Hop, arriving: Transfer, blocks: _Blocks) -> None:
        for sent, parts in zip(hop.sent, arriving.wait(), strict=True):
            for each, part in zip(sent, parts, strict=True):
                blocks[each.tensor] = part

    def share(self, share: Share, blocks: _Blocks) -> None:
        given = [blocks[each.tensor] for each in share.given[self.plan.place[share.dim]]]
        group = self.mesh.get_group(share.dim)
        arriving = start_all_gather(given, share.given, self.empty(), group)
        for of_peer, parts in zip(share.given, arriving.wait(), strict=True):
            for each, part in zip(of_peer, parts, strict=True):
                blocks[each.tensor] = part


@dataclass(frozen=True)
class _OnItsWay:
    """A gather or a scatter whose first hop has been started, if it has any."""

    line: _Line
    blocks: _Blocks
    first: Transfer | None


def _start_gather(line: _Line, work: Work) -> _OnItsWay:
    blocks = {i: work.local(i) for i in line.round.gathered}
    hops = line.round.hops
    return _OnItsWay(line, blocks, line.start_gather(hops[0], blocks) if hops else None)


def _finish_gather(gather: _OnItsWay) -> _Blocks:
    """Returns the whole tensors that this rank owns."""
    line, blocks, arriving = gather.line, gather.blocks, gather.first
    for hop in line.round.hops:
        line.finish_gather(hop, arriving or line.start_gather(hop, blocks), blocks)
        arriving = None
    return blocks


def _start_scatter(line: _Line, results: _Blocks) -> _OnItsWay:
    hops = line.round.hops
    return _OnItsWay(line, results, line.start_scatter(hops[-1], results) if hops else None)


def _finish_scatter(scatter: _OnItsWay, work: Work) -> None:
    """Hands this rank's parts of the results over."""
    line, blocks, arriving = scatter.line, scatter.blocks, scatter.first
    for hop in reversed(line.round.hops):
        line.finish_scatter(hop, arriving or line.start_scatter(hop, blocks), blocks)
        arriving = None
    for share in line.round.shares:
        line.share(share, blocks)
    for i in line.round.tensors:
        work.store(i, blocks[i])
