"""What the tests of loads share: a sharded state with a few plain values, saved and loaded on any
mesh, and a planner that is planned for as DCP does."""

from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor, distribute_tensor

ROWS = {"even": 512, "uneven": 301, "few": 3, "one": 1}


def full_tensors(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(rows, 1024, generator=g) for name, rows in ROWS.items()}


def sharded(full: dict[str, torch.Tensor], mesh: Any, placements: list[Any]) -> dict[str, Any]:
    return {k: distribute_tensor(v, mesh, placements) for k, v in full.items()}


def blank_state(
    mesh: Any, placements: list[Any], dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    state: dict[str, Any] = sharded(
        {k: torch.zeros(v, 1024, dtype=dtype) for k, v in ROWS.items()}, mesh, placements
    )
    return {
        "w": state,
        "step": torch.tensor(0),
        "plain": torch.zeros(400, 1000),
        "nested": [{"lr": None}],
    }


def check_state(
    state: dict[str, Any], full: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32
) -> None:
    for name, tensor in state["w"].items():
        assert isinstance(tensor, DTensor)
        assert torch.equal(tensor.full_tensor(), full[name].to(dtype)), name
    assert state["step"] == 7
    assert torch.equal(state["plain"], torch.full((400, 1000), 0.5))
    assert state["nested"] == [{"lr": 0.1}]


def save_state(
    full: dict[str, torch.Tensor], mesh: Any, placements: list[Any], path: str, writer: Any
) -> None:
    state = {"w": sharded(full, mesh, placements), "step": torch.tensor(7)}
    dcp.save(
        state | {"plain": torch.full((400, 1000), 0.5), "nested": [{"lr": 0.1}]},
        storage_writer=writer(path),
    )


class OtherPlanner(dcp.DefaultLoadPlanner):
    """Not the default planner, as far as one can tell."""

    committed = 0

    def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
        self.committed += 1
