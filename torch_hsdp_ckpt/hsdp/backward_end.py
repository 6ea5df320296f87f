"""How the backwards of one outermost module end: the last one with all gradients taken, or all of
them together by ``finalize_backward``."""

from typing import Any

import torch.distributed as dist
import torch.distributed.fsdp as torchs

from .root import BackwardEnd, PendingReduction, Root

# torch 2.15's; before, nobody asks for it by isinstance.
_TorchsHandle: Any = getattr(torchs, "GradientReductionHandle", object)


class GradientReductionHandle(_TorchsHandle):  # type: ignore[misc]
    """Reductions that ``FSDPModule.finalize_backward(async_op=True)`` has started."""

    def __init__(self, root: Root | None, pending: PendingReduction) -> None:
        self._root, self._pending = root, pending

    def wait(self) -> None:
        """The gradients are there when this returns. RuntimeError if ``reset_iter_state`` has
        ended the reductions meanwhile."""
        root, self._root = self._root, None
        if root is None:
            return
        if self._pending.was_reset:
            raise RuntimeError(
                f"rank {dist.get_rank()}: module {root.units[0].core.name}: reset_iter_state has "
                "ended this reduction of gradients"
            )
        if root.pending_reduction is self._pending:  # else zero_grad, say, has waited for it
            root.pending_reduction = None
            with root.turn():
                root.schedule.finish_reductions()


def set_manual_finalization(root: Root | None, end: BackwardEnd, enabled: bool) -> None:
    """Whether the backwards to come end by :func:`finalize_backward`. RuntimeError within a forward
    or backward, and where backwards wait for their end."""
    if root is not None:
        root.check_not_running("set_manual_backward_finalization")
        if end.is_open and enabled != end.is_manual:
            raise RuntimeError(
                f"rank {dist.get_rank()}: module {root.units[0].core.name}: its backwards so far "
                "wait for finalize_backward, or reset_iter_state: "
                "set_manual_backward_finalization comes after it"
            )
    end.is_manual = enabled
    if root is not None:
        root.tell_backward_end()


def finalize_backward(root: Root | None, async_op: bool) -> GradientReductionHandle | None:
    """Reduces what the backwards so far have kept. Nothing without ``root``: no forward has run.

    RuntimeError within a forward or backward, and before the last handle was waited for."""
    pending = PendingReduction()
    if root is not None:
        root.check_not_running("finalize_backward")
        if root.pending_reduction is not None:
            raise RuntimeError(
                f"rank {dist.get_rank()}: module {root.units[0].core.name}: wait for the handle of "
                "the last finalize_backward before the next one"
            )
        root.schedule.finalize_backward(wait=not async_op)
        root.backward_end.is_open = False
        root.pending_reduction = pending if async_op else None
    return GradientReductionHandle(root, pending) if async_op else None
