"""Transforms of ``torch.func`` (``grad``, ``vmap``, ``jvp``, ...) around wrapped modules.

Within one, tensors are wrapped by the transform, those that are made there too: they have no memory
that a gather could write to. What this package computes for itself is none of a transform's."""

import contextlib

import torch
import torch.distributed as dist


def in_transform() -> bool:
    """Whether the code that asks is run by a transform."""
    return torch._C._are_functorch_transforms_active()


def makes_hidden_graph() -> bool:
    """Whether the code that asks is run by a transform that may make a graph of it, one of its own,
    in which no tensor that is found announces a backward. With ``no_grad`` within two transforms
    the outer one still may."""
    level = torch._C._functorch.maybe_current_level()
    may_make_one = torch.is_grad_enabled() or (level is not None and level > 1)
    return in_transform() and may_make_one


def outside_of_transforms() -> contextlib.AbstractContextManager[None]:
    """Within the block tensors are made and computed with as if there were no transform."""
    guard: contextlib.AbstractContextManager[None] = torch._C._DisableFuncTorch()
    return guard


def check_not_traced(name: str) -> None:
    """RuntimeError, for the module of this ``name``, within ``make_fx`` or
    ``torch.func.linearize``: the graph that they make keeps full parameters, and is run when these
    have no memory."""
    if torch._C._len_torch_dispatch_stack() == 0:
        return
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    if get_proxy_mode() is not None:
        raise RuntimeError(
            f"rank {dist.get_rank()}: module {name} is sharded, and can't be traced (make_fx, "
            "torch.func.linearize): its full parameters are there only while it computes. "
            "torch.func.jvp and vjp compute without a trace"
        )
