"""The helper that all tests of several ranks stand on: it must see failures, deaths and hangs."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, run_ranks


def _sum(rank: int, scale: float) -> torch.Tensor:
    value = torch.full((3,), scale * (rank + 1))
    dist.all_reduce(value)
    return value


def _fail(rank: int) -> None:
    if rank == 1:
        raise ValueError("boom on one")
    time.sleep(60)


def _die(rank: int) -> str:
    dist.barrier()
    if rank == 1:
        # Rank 0 is through the barrier too: it must not take the closed connection for a failure
        # of its own.
        time.sleep(1)
        os._exit(7)
    return "alive"


def _hang(rank: int) -> None:
    time.sleep(60)


def test_ranks_are_real_and_return_tensors() -> None:
    for value in run_ranks(_sum, 3, 2.0):
        assert torch.equal(value, torch.full((3,), 12.0))


def test_a_failure_a_death_and_a_hang_are_seen() -> None:
    with pytest.raises(RankError, match="boom on one"):
        run_ranks(_fail, 2)
    with pytest.raises(RankError, match="rank 1: died with exit code 7"):
        run_ranks(_die, 2)
    assert run_ranks(_die, 2, allow_death=(1,)) == ["alive", None]
    with pytest.raises(RankError, match="not done after 1 s"):
        run_ranks(_hang, 2, timeout=1)
