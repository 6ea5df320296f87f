"""How the backwards of one outermost module end: the last one with all gradients taken, or all of
them together by ``finalize_backward``."""

from typing import Any

import torch.distributed as dist
import torch.distributed.fsdp as torchs

from .root import Root

# torch 2.15's; before, nobody asks for it by isinstance.
_TorchsHandle: Any = getattr(torchs, "GradientReductionHandle", object)


class GradientReductionHandle(_TorchsHandle):  # type: ignore[misc]
    """Reductions that ``FSDPModule.finalize_backward(async_op=True)`` has started."""

    def __init__(self, root: Root | None) -> None:
        self._root = root

    def wait(self) -> None:
        """The gradients are there when this returns. RuntimeError if ``reset_iter_state`` has ended
        the reductions meanwhile."""
        root, self._root = self._root, None
        if root is None:
            return
        if root.pending_reduction is not self:
            raise RuntimeError(
                f"rank {dist.get_rank()}: module {root.units[0].core.name}: reset_iter_state has "
                "ended this reduction of gradients"
            )
        root.pending_reduction = None
        with root.turn():
            root.schedule.finish_reductions()


class BackwardEnd:
    """What a user has said of the backwards to come; kept for the root that is made later."""

    def __init__(self) -> None:
        self._is_last = True
        self._is_by_hand = False

    def set_last(self, root: Root | None, is_last: bool) -> None:
        """Whether the next backward ends with all of its gradients taken."""
        self._is_last = is_last
        self.tell(root)

    def set_by_hand(self, root: Root | None, is_by_hand: bool) -> None:
        """Whether the backwards end by :func:`finalize_backward`. This comes before
        :meth:`set_last`."""
        if root is not None:
            root.check_not_running("set_manual_backward_finalization")
        self._is_by_hand = is_by_hand
        self.tell(root)

    def tell(self, root: Root | None) -> None:
        """``root`` is that of the outermost module, if it is known."""
        if root is not None:
            root.schedule.set_last_backward(self._is_last and not self._is_by_hand)


def finalize_backward(root: Root | None, async_op: bool) -> GradientReductionHandle | None:
    """Reduces what the backwards so far have kept. Nothing without ``root``: no forward has run.

    RuntimeError within a forward or backward, and before the last handle was waited for."""
    handle = GradientReductionHandle(root) if async_op else None
    if root is None:
        return handle
    root.check_not_running("finalize_backward")
    if root.pending_reduction is not None:
        raise RuntimeError(
            f"rank {dist.get_rank()}: module {root.units[0].core.name}: wait for the handle of the "
            "last finalize_backward before the next one"
        )
    root.schedule.finalize_backward(wait=not async_op)
    root.pending_reduction = handle
    return handle
