"""States of models beside and within other parallelism: torch's ``get_`` and ``set_`` functions,
the module's own, and optimizers', as under torch's ``fully_shard`` on the same mesh."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp as torchs
from parallel_models import Language, mesh_of
from ranks import run_ranks
from sides import whole_in
from test_any_mesh import CASES, Case, train
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

import torch_hsdp_ckpt as ours

NAMES = ["beside TP", "on columns beside TP", "experts on another mesh", "within PP"]
NAMES += [name for name in ("whole mesh, HSDP and TP", "a mesh of its own") if name in CASES]


def _trained(case: Case, face: Any) -> tuple[Language, torch.optim.Optimizer]:
    model, optimizer, _ = train(case, face, mesh_of(**case.mesh), 2)
    return model, optimizer


# Of states from training that may sum in another order.
SUMMED = {"rtol": 1e-5, "atol": 1e-6}
EXACT = {"rtol": 0.0, "atol": 0.0}


def _same(found: Any, wanted: Any, tolerance: dict[str, float], at: str = "") -> None:
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), at
        for key in wanted:
            _same(found[key], wanted[key], tolerance, f"{at}.{key}")
    elif isinstance(wanted, (list, tuple)):
        for i, (each, other) in enumerate(zip(found, wanted, strict=True)):
            _same(each, other, tolerance, f"{at}[{i}]")
    elif isinstance(wanted, torch.Tensor):
        assert isinstance(found, DTensor) == isinstance(wanted, DTensor), at
        if isinstance(wanted, DTensor):
            assert found.placements == wanted.placements and found._spec.mesh == wanted._spec.mesh
            found, wanted = found.to_local(), wanted.to_local()
        assert found.device == wanted.device, at
        torch.testing.assert_close(found, wanted, **tolerance, msg=at)
    else:
        assert found == wanted, at


def _gets(case: Case) -> None:
    sides = [_trained(case, face) for face in (ours.fully_shard, torchs.fully_shard)]
    for options in (
        StateDictOptions(),
        StateDictOptions(full_state_dict=True),
        StateDictOptions(full_state_dict=True, cpu_offload=True),
        StateDictOptions(cpu_offload=True, flatten_optimizer_state_dict=True),
    ):
        found, wanted = (get_state_dict(*side, options=options) for side in sides)
        _same(found[0], wanted[0], SUMMED, "model")
        _same(found[1], wanted[1], SUMMED, "optimizer")
    _same(sides[0][0].state_dict(), sides[1][0].state_dict(), SUMMED)


def _sets(case: Case, face: Any = ours.fully_shard) -> None:
    """What one model gives, in each form, another one takes."""
    model, optimizer = _trained(case, face)
    wanted = get_state_dict(model, optimizer)
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    from_first = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    states = get_state_dict(model, optimizer, options=full)
    for options, (values, moments) in (
        (StateDictOptions(), wanted),
        (StateDictOptions(full_state_dict=True), whole_in(wanted)),
        (from_first, states if dist.get_rank() == 0 else ({}, {})),
    ):
        if options is from_first and not _spans_all(model):
            continue  # torch's function broadcasts from rank 0 to all
        fresh, other = _trained(case, face)
        with torch.no_grad():
            for parameter in fresh.parameters():
                parameter.to_local().add_(1.0)
        # Not set_state_dict, in which rank 0 waits forever.
        set_model_state_dict(fresh, values, options=options)
        set_optimizer_state_dict(fresh, other, moments, options=options)
        found = get_state_dict(fresh, other)
        _same(found, wanted, EXACT, str(options))


def _spans_all(model: Language) -> bool:
    return all(p.device_mesh.size() == dist.get_world_size() for p in model.parameters())


def _misfits(case: Case) -> None:
    """One rank's misfit is an error on all that share the model, and nothing has changed."""
    model, _ = _trained(case, ours.fully_shard)
    before = {name: p.to_local().clone() for name, p in model.named_parameters()}
    state = dict(model.state_dict())
    name = next(iter(state))
    if dist.get_rank() == 1:
        state[name] = state[name].to(torch.float64)
    ranks = {rank for p in model.parameters() for rank in p.device_mesh.mesh.flatten().tolist()}
    hears = pytest.raises(RuntimeError, match=f'"{name}"') if 1 in ranks else nullcontext()
    with hears:
        model.load_state_dict(state)
    for other, parameter in model.named_parameters():
        assert torch.equal(parameter.to_local(), before[other]), other
    set_model_state_dict(model, get_model_state_dict(model))


def _check(rank: int, name: str) -> None:
    for check in (_gets, _sets, _misfits):
        try:
            check(CASES[name])
        except BaseException as error:
            raise AssertionError(check.__name__) from error


@pytest.mark.parametrize("name", NAMES)
def test_states_are_torchs(name: str) -> None:
    run_ranks(_check, 8, name)
