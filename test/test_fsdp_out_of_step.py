"""Ranks that part ways: errors on every rank that waits, within the groups' timeout."""

import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from device import not_on_device
from models import NETS, Block, batch
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from training import loss_of, mesh_of, wrap

from torch_hsdp_ckpt import FullyShardedDataParallel

pytestmark = not_on_device("NCCL waits for ranks that part ways until its own watchdog ends them")


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Block(6, 10), Block(6, 10), Block(6, 12)

    def forward(self, x: torch.Tensor, use: str) -> torch.Tensor:
        for name in use:
            x = getattr(self, name)(x)
        return x


def _short(shape: tuple[int, ...] = (2, 2), seconds: float = 3) -> DeviceMesh:
    warnings.simplefilter("ignore", FutureWarning)  # its name in torch 2.15 is another one
    mesh = mesh_of(shape)
    for dim in range(mesh.ndim):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), mesh.get_group(dim))
    return mesh


def _error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return ""


def _part_ways(rank: int, uses: list[list[str]], shape: tuple[int, ...]) -> str:
    """``uses``: by forward, by rank, which blocks run. Returns the error of the last forward and
    backward."""
    torch.manual_seed(0)
    ours = FullyShardedDataParallel(
        Branching(), device_mesh=_short(shape), auto_wrap_policy=ModuleWrapPolicy({Block})
    )
    x = torch.ones(2, 6, requires_grad=True)
    for step in uses[:-1]:
        ours(x, step[rank]).square().mean().backward()
    return _error_of(lambda: ours(x, uses[-1][rank]).square().mean().backward())


def test_ranks_that_run_different_modules_get_an_error() -> None:
    # At once where everybody asks: in a first pass, and where all leave the last one.
    for uses in ([["ab", "ab", "ac", "ab"]], [["abc"] * 4, ["ac", "ac", "ac", "a"]]):
        other = "module c (Block)" if len(uses) == 1 else "the end of forward"
        odd = 2 if len(uses) == 1 else 3
        for error in run_ranks(_part_ways, 4, uses, (2, 2)):
            assert (
                "ranks run different wrapped modules" in error and f"rank {odd}: {other}" in error
            ), error
    # Within the timeout where only one rank is on a way of its own.
    for shape in ((2, 2), (4, 1)):
        errors = run_ranks(_part_ways, 4, [["abc"] * 4, ["abc", "ac", "abc", "abc"]], shape)
        assert (
            "rank 1 has reached module c (Block)" in errors[1]
            and "ran module b (Block) here" in errors[1]
        ), errors
        waiting = errors[0]  # in the shard group of rank 1, or among its replicas
        assert "rank 0: the " in waiting and "of module" in waiting and "failed" in waiting, errors


def _wrap_differently(rank: int, what: str) -> str:
    width = 12 if what == "shape" and rank == 3 else 10
    net = nn.Sequential(Block(6, 10), Block(6, width), nn.Linear(6, 2))
    policy = ModuleWrapPolicy({Block} | ({nn.Linear} if what == "module" and rank == 1 else set()))
    ours = FullyShardedDataParallel(net, device_mesh=_short(), auto_wrap_policy=policy)
    return _error_of(lambda: ours(torch.ones(2, 6)))


def test_ranks_that_wrap_different_modules_get_an_error() -> None:
    for error in run_ranks(_wrap_differently, 4, "shape"):
        assert "ranks have wrapped different modules" in error
        assert (
            "rank 3: module 1 (Block)" in error
            and "up.weight (12, 6)" in error
            and "up.weight (10, 6)" in error
        )
    for error in run_ranks(_wrap_differently, 4, "module"):
        assert (
            "rank 1: module (outermost) (Sequential) on a mesh of (2, 2), with parameters: none"
            in error
        )


def _never_comes(rank: int, when: str) -> str:
    net = NETS["even"]()
    ours = FullyShardedDataParallel(
        net, device_mesh=_short(), auto_wrap_policy=ModuleWrapPolicy({Block})
    )
    x = batch(net, 0, rank)
    if when != "first":
        loss_of(ours, x).backward()
    if when == "backward":
        loss = loss_of(ours, x)
    if rank == 1:
        time.sleep(6)  # there, but busy with something else
        return ""
    return _error_of(loss.backward if when == "backward" else lambda: ours(x))


def test_a_rank_that_never_comes_is_an_error_within_the_timeout() -> None:
    first, later, backward = (
        run_ranks(_never_comes, 4, when) for when in ("first", "later", "backward")
    )
    for rank in (0, 2, 3):
        assert f"rank {rank} is at the first forward of module (outermost) (Net)" in first[rank], (
            first
        )
    assert "rank 0: the all-gather of module (outermost) (Net) failed" in later[0], later
    assert "rank 0: the " in backward[0] and "of module" in backward[0], backward


def _destroyed(rank: int) -> str:
    net = NETS["even"]()
    ours = wrap(net, (2,))
    loss_of(ours, batch(net, 0, rank)).backward()
    dist.destroy_process_group()
    return _error_of(lambda: ours(batch(net, 0, rank)))


def test_forward_after_destroy_process_group() -> None:
    for error in run_ranks(_destroyed, 2):
        assert "destroy_process_group" in error and "wrap the module anew" in error, error
