"""What torch's tutorials do, in their order: FSDP2's, with both of its ways to save and load whole
states, and DCP's conversions. On both sides, with the same numbers."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from device import DEVICE
from ranks import run_ranks
from sides import SIDES
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import (
    BroadcastingTorchSaveReader,
    DynamicMetaLoadPlanner,
    dcp_to_torch_save,
    torch_save_to_dcp,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    _init_optim_state,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from training import mesh_of

import torch_hsdp_ckpt as ours
from torch_hsdp_ckpt.compat import patch

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
WIDTH, WORDS = 16, 32


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(_Block() for _ in range(5))
        self.output = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words)
        for layer in self.layers:
            x = layer(x)
        return self.output(x).float()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()


def _sharded_on_meta(side: ModuleType, mixed: bool) -> nn.Module:
    with torch.device("meta"):
        model = _Model()
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else None
    given: dict[str, Any] = {"mesh": mesh_of((2, 2))} | ({"mp_policy": policy} if mixed else {})
    for layer in model.layers:
        side.fully_shard(layer, **given)
    side.fully_shard(model, **given)
    for i, layer in enumerate(model.layers):
        layer.set_modules_to_forward_prefetch(list(model.layers[i + 1 : i + 3]))
        layer.set_modules_to_backward_prefetch(list(model.layers[max(0, i - 2) : i])[::-1])
    return model


def _check_precision(model: nn.Module) -> None:
    model.unshard()
    assert all(p.dtype == torch.bfloat16 for p in model.parameters(recurse=False))
    model.reshard()
    assert all(p.dtype == torch.float32 and isinstance(p, DTensor) for p in model.parameters())


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: range) -> list:
    losses = []
    for step in steps:
        model.unshard()
        data = torch.Generator().manual_seed(4 * step + rank)
        words = torch.randint(0, WORDS, (4, 8), generator=data).to(DEVICE)
        loss = model(words).square().mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses += [loss.item(), norm.full_tensor().item()]
    return losses


def _whole_by_hand(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict, dict]:
    """``full_tensor`` of everything, as the tutorial's other way has it."""

    def whole(value: Any) -> Any:
        return value.full_tensor().cpu() if isinstance(value, DTensor) else value

    state = optimizer.state_dict()
    values = {
        number: {name: whole(value) for name, value in of_one.items()}
        for number, of_one in state["state"].items()
    }
    return (
        {name: whole(value) for name, value in model.state_dict().items()},
        {"state": values, "param_groups": state["param_groups"]},
    )


def _load_by_hand(model: nn.Module, whole: dict[str, Tensor]) -> None:
    sharded = model.state_dict()
    given = {
        name: nn.Parameter(
            distribute_tensor(value.to(DEVICE), sharded[name].device_mesh, sharded[name].placements)
        )
        for name, value in whole.items()
    }
    model.load_state_dict(given, strict=False, assign=True)


def _load_optimizer_by_hand(optimizer: torch.optim.Optimizer, whole: dict) -> None:
    _init_optim_state(optimizer)
    state = optimizer.state_dict()
    for number, of_one in state["state"].items():
        for name, value in of_one.items():
            given = whole["state"][number][name]
            if isinstance(value, DTensor):
                given = distribute_tensor(given.to(DEVICE), value.device_mesh, value.placements)
            of_one[name] = given
    optimizer.load_state_dict(state)


def _fsdp2(rank: int, dcp_api: bool, mixed: bool) -> None:
    outcomes = []
    for side in SIDES:
        torch.manual_seed(0)
        model = _sharded_on_meta(side, mixed)
        model.to_empty(device=DEVICE)
        model.reset_parameters()
        if mixed:
            _check_precision(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        losses = _train(model, optimizer, rank, range(3))
        if dcp_api:
            states = (
                get_model_state_dict(model, options=WHOLE),
                get_optimizer_state_dict(model, optimizer, options=WHOLE),
            )
            assert (rank == 0) == bool(states[0])
        else:
            states = _whole_by_hand(model, optimizer)
        states = copy.deepcopy(states)  # the tutorial writes them to a file
        losses += _train(model, optimizer, rank, range(3, 5))
        resumed = _sharded_on_meta(side, mixed)
        if dcp_api:
            set_model_state_dict(resumed, states[0], options=FROM_FIRST)
        else:
            _load_by_hand(resumed, states[0])
        second = torch.optim.Adam(resumed.parameters(), lr=1e-2)
        if dcp_api:
            set_optimizer_state_dict(resumed, second, states[1], options=FROM_FIRST)
        else:
            _load_optimizer_by_hand(second, states[1])
        assert _train(resumed, second, rank, range(3, 5)) == losses[6:]
        outcomes.append(losses)
    assert outcomes[0] == outcomes[1]


@contextlib.contextmanager
def _on_side(side: ModuleType) -> Iterator[None]:
    with patch() if side is ours else contextlib.nullcontext():
        yield


def _conversions(rank: int, path: str) -> None:
    """A checkpoint becomes one of torch.save's, which is read as it is, and one of DCP's again."""
    outcomes = []
    for side in SIDES:
        here = f"{path}/{side.__name__}"
        with _on_side(side):
            torch.manual_seed(0)
            model = _sharded_on_meta(side, mixed=False)
            model.to_empty(device=DEVICE)
            model.reset_parameters()
            dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=f"{here}/saved")
            if rank == 0:
                dcp_to_torch_save(f"{here}/saved", f"{here}/whole.pt")
                torch_save_to_dcp(f"{here}/whole.pt", f"{here}/again")
            dist.barrier()
            state = {name: torch.zeros_like(t) for name, t in model.state_dict().items()}
            dcp.load({"model": state}, checkpoint_id=f"{here}/again")
            for name, value in model.state_dict().items():
                assert torch.equal(state[name].to_local(), value.to_local()), name
            whole = {name: torch.zeros(t.shape) for name, t in state.items()}
            dcp.load(
                {"model": whole},
                checkpoint_id=f"{here}/whole.pt",
                planner=DynamicMetaLoadPlanner(),
                storage_reader=BroadcastingTorchSaveReader(),
            )
            for name, value in model.state_dict().items():
                assert torch.equal(whole[name], value.full_tensor().cpu()), name
            outcomes.append({name: t.full_tensor() for name, t in model.state_dict().items()})
    assert all(torch.equal(outcomes[0][name], outcomes[1][name]) for name in outcomes[0])


def test_fsdp2_with_the_state_dict_api() -> None:
    run_ranks(_fsdp2, 4, True, False)


def test_fsdp2_with_dtensors_by_hand() -> None:
    run_ranks(_fsdp2, 4, False, True)


@pytest.mark.skipif(DEVICE != "cpu", reason="torch's BroadcastingTorchSaveReader hangs with NCCL")
def test_conversions(tmp_path: Path) -> None:
    run_ranks(_conversions, 4, str(tmp_path))
