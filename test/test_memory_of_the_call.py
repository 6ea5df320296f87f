"""An asynchronous save reads the memory that tensors had at its call, whatever they have since."""

import time
from pathlib import Path
from typing import Any

import torch
from ranks import run_ranks
from torch import nn

import torch_hsdp_ckpt as h


def _exchanged(rank: int, root: str) -> None:
    # A plain tensor that the gate guards, and which so is not copied in the call.
    model = nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.full((1, 4), rank + 1.0)).sum().backward()
    optimizer.step()
    momentum: torch.Tensor = optimizer.state[model.weight]["momentum_buffer"]
    state: dict[str, Any] = {"all": torch.ones(2), f"of rank {rank}": momentum}
    h.async_save(state, checkpoint_id=f"{root}/first").result(60)  # makes the ranks' groups
    exchanged = Path(root) / "exchanged"
    while rank == 0 and not exchanged.exists():  # no rank plans before
        time.sleep(0.01)
    future = h.async_save(state, checkpoint_id=f"{root}/second")
    if rank == 1:
        momentum.data = torch.full((4, 4), 7.0)
        exchanged.touch()
    future.result(60)
    target = {"of rank 0": torch.zeros(4, 4), "of rank 1": torch.zeros(4, 4)}
    h.load(target, checkpoint_id=f"{root}/second")
    values = [tensor.unique().tolist() for tensor in target.values()]
    assert values == [[1.0], [2.0]]


def test_tensors_of_one_rank_whose_memory_is_exchanged(tmp_path: Path) -> None:
    """By the plan that a rank makes alone another rank writes them."""
    run_ranks(_exchanged, 2, str(tmp_path))
