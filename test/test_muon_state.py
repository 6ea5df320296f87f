"""Muon's state: torch's own class takes it, and gives it; saves and loads; asynchronous saves."""

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from matrices import assert_equal, matrices_of, momenta_of
from models import NETS, batch
from ranks import run_checks, run_ranks
from states import fully_sharded, mesh_of
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from training import full, loss_of

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt import FullyShardedDataParallel as FSDP
from torch_hsdp_ckpt.checkpoint.save import async_job
from torch_hsdp_ckpt.common.tensors import local_of


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, batch(NETS["even"](), step, rank)).backward()
        optimizer.step()


def _with_muon(
    kind: type, shape: tuple[int, ...] = (2, 2), seed: int = 0
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model of which only matrices are trained. (Its matrices have no fewer rows than ranks, for
    which torch's Muon has no step.)"""
    model = fully_sharded(NETS["even"](seed), mesh_of(*shape))
    model.requires_grad_(False)
    for parameter in matrices_of(model):
        parameter.requires_grad_(True)
    return model, kind(matrices_of(model), lr=0.05)


def _from_either_to_the_other(rank: int) -> None:
    """A state of either class goes on in the other one, by torch's functions and by the optimizer's
    own: groups, momenta, and so the next step."""
    for kind, other in ((torch.optim.Muon, h.Muon), (h.Muon, torch.optim.Muon)):
        model, first = _with_muon(kind)
        _train(model, first, rank, range(3))
        weights, moments = copy.deepcopy(get_state_dict(model, first))
        second_model, second = _with_muon(other, seed=1)
        second.param_groups[0]["lr"] = 0.5
        set_state_dict(second_model, second, model_state_dict=weights, optim_state_dict=moments)
        third = other(matrices_of(model), lr=0.5)
        third.load_state_dict(copy.deepcopy(first.state_dict()))
        for optimizer in (second, third):
            assert_equal(momenta_of(optimizer), momenta_of(first))
            assert optimizer.param_groups[0].keys() == first.param_groups[0].keys()
            assert optimizer.param_groups[0]["lr"] == 0.05
        before = [full(parameter).clone() for parameter in matrices_of(model)]
        assert_equal(matrices_of(second_model), before)
        _train(second_model, second, rank, range(3, 4))
        _train(model, third, rank, range(3, 4))
        assert_equal(matrices_of(model), matrices_of(second_model))
        assert not any(map(torch.equal, map(full, matrices_of(model)), before))


def _initial_state(rank: int) -> None:
    """The state of before the first step is there to be loaded into, and the optimizer is as it
    was. What a step would lack is refused, as for torch's own."""
    model, optimizer = _with_muon(h.Muon)
    before = [full(parameter).clone() for parameter in matrices_of(model)]
    state = FSDP.optim_state_dict(model, optimizer)
    assert len(state["state"]) == len(before) and not optimizer.state
    assert all((full(each["momentum_buffer"]) == 0).all() for each in state["state"].values())
    assert_equal(matrices_of(model), before)
    FSDP.optim_state_dict_to_load(model, optimizer, state)
    del state["param_groups"][0]["ns_steps"]
    with pytest.raises(ValueError, match='the state has no "ns_steps", the optimizer has'):
        FSDP.optim_state_dict_to_load(model, optimizer, state)


def _checkpoint(rank: int, path: str) -> None:
    """Saved with torch's Muon, loaded with ours, on another mesh, and the other way round."""
    for i, (kind, other) in enumerate(((torch.optim.Muon, h.Muon), (h.Muon, torch.optim.Muon))):
        model, optimizer = _with_muon(kind)
        _train(model, optimizer, rank, range(3))
        weights, moments = get_state_dict(model, optimizer)
        h.save({"model": weights, "optim": moments}, checkpoint_id=f"{path}/{i}")
        onto, resumed = _with_muon(other, (4,), seed=1)
        resumed.param_groups[0]["lr"] = 0.5
        weights, moments = get_state_dict(onto, resumed)
        state = {"model": weights, "optim": moments}
        h.load(state, checkpoint_id=f"{path}/{i}")
        set_state_dict(
            onto, resumed, model_state_dict=state["model"], optim_state_dict=state["optim"]
        )
        assert_equal(matrices_of(onto), matrices_of(model))
        assert_equal(momenta_of(resumed), momenta_of(optimizer))
        assert resumed.param_groups[0]["lr"] == 0.05


def test_state_goes_to_torchs_class_and_back() -> None:
    run_checks(4, _from_either_to_the_other, _initial_state)


def test_checkpoints_go_to_torchs_class_and_back(tmp_path: Path) -> None:
    run_ranks(_checkpoint, 4, str(tmp_path))


def _async_save(rank: int, path: str) -> None:
    """Copying begins late: a step right behind the call of the save waits for it."""
    model, optimizer = _with_muon(h.Muon)
    _train(model, optimizer, rank, range(1))
    expected = [full(each).clone() for each in (*matrices_of(model), *momenta_of(optimizer))]
    loss_of(model, batch(NETS["even"](), 1, rank)).backward()
    weights, moments = get_state_dict(model, optimizer)
    begin, unchanged = async_job.begin_copy, []

    def values() -> torch.Tensor:
        return torch.cat([local_of(each).detach().flatten() for each in matrices_of(model)])

    def late(*arguments: Any) -> None:
        time.sleep(0.3)
        unchanged.append(torch.equal(values(), before))
        begin(*arguments)

    before = values()
    async_job.begin_copy = late
    try:
        job = h.async_save({"model": weights, "optim": moments}, checkpoint_id=path)
        optimizer.step()
        job.result()
    finally:
        async_job.begin_copy = begin
    assert unchanged == [True] and not torch.equal(values(), before)
    h.load({"model": weights, "optim": moments}, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    assert_equal([*matrices_of(model), *momenta_of(optimizer)], expected)


def test_a_step_waits_at_the_gate_of_an_asynchronous_save(tmp_path: Path) -> None:
    run_ranks(_async_save, 4, str(tmp_path / "save"))
