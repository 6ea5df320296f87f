"""Optimizers with groups that are empty or frozen, on every road to a checkpoint and back, and one
that torch has no step of for shards."""

import itertools

import pytest
import torch
from device import DEVICE
from models import NETS, batch
from ranks import run_checks
from states import fully_sharded, wrapped
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.torch_version import TorchVersion
from training import full, loss_of, mesh_of, wrap_fsdp2

from torch_hsdp_ckpt import FullyShardedDataParallel as FSDP
from torch_hsdp_ckpt import fully_shard

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
FACES = (wrapped, fully_sharded)


def _with_groups(model: nn.Module) -> torch.optim.Optimizer:
    """The first group's parameters are going to be frozen; the second group is empty."""
    parameters = list(model.parameters())
    groups = [{"params": parameters[:4]}, {"params": [], "lr": 0.3}, {"params": parameters[4:]}]
    return torch.optim.AdamW(groups, lr=0.05)


def _trained(model: nn.Module, rank: int, steps: int) -> torch.optim.Optimizer:
    optimizer = _with_groups(model)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch(NETS["even"](), step, rank)).backward()
        optimizer.step()
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.requires_grad_(False)
    return optimizer


def _state(optimizer: torch.optim.Optimizer) -> list[dict[str, torch.Tensor]]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [{key: full(value) for key, value in optimizer.state[p].items()} for p in parameters]


def _check_equal(found: torch.optim.Optimizer, expected: torch.optim.Optimizer) -> None:
    for ours, theirs in zip(_state(found), _state(expected), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert torch.equal(ours[key], value), key
    for ours, theirs in zip(found.param_groups, expected.param_groups, strict=True):
        assert ours["lr"] == theirs["lr"] and len(ours["params"]) == len(theirs["params"])


def _empty_and_frozen(rank: int) -> None:
    """FSDP's functions bring all states back, under both faces; a whole state too."""
    for face in FACES:
        model = face(NETS["even"](), mesh_of((2, 2)))
        optimizer = _trained(model, rank, steps=3)
        optimizer.param_groups[1]["lr"] = 0.7
        other = face(NETS["even"](seed=5), mesh_of((2, 2)))
        resumed = _trained(other, rank, steps=1)
        state = FSDP.optim_state_dict(model, optimizer)
        assert [len(group["params"]) for group in state["param_groups"]] == [4, 0, 10]
        resumed.load_state_dict(FSDP.optim_state_dict_to_load(other, resumed, state))
        _check_equal(resumed, optimizer)


def _traps_of_torchs(rank: int) -> None:
    """What docs/supported.md says of torch's own functions, here and on torch's FSDP2."""
    for face in (*FACES, lambda net, mesh: wrap_fsdp2(net, (2, 2))):
        model = face(NETS["even"](), mesh_of((2, 2)))
        optimizer = _trained(model, rank, steps=2)
        flat = get_optimizer_state_dict(model, optimizer, options=FLAT)
        assert not any(".lr" in key and flat[key] == 0.3 for key in flat), "no place for the empty"
        with pytest.raises(IndexError):
            set_optimizer_state_dict(model, optimizer, flat, options=FLAT)
        for parameter in optimizer.param_groups[0]["params"]:
            optimizer.state[parameter]["exp_avg"].zero_()
        nested = get_optimizer_state_dict(model, optimizer)
        for values in nested["state"].values():
            values["exp_avg"] = torch.ones_like(values["exp_avg"])
        set_optimizer_state_dict(model, optimizer, nested)
        frozen = _state(optimizer)[:4]
        assert all(not each or (each["exp_avg"] == 0).all() for each in frozen), "not loaded"
        assert all((each["exp_avg"] == 1).all() for each in _state(optimizer)[4:])


def _adafactor(rank: int) -> None:
    """Refused before anything changes. Torch's FSDP2 fails in the midst of a step, and with vectors
    alone each rank steps by another length."""
    expected = f"^rank {rank}: torch.optim.Adafactor has no step for a sharded parameter"
    x = batch(NETS["even"](), 0, rank)
    for face in FACES:
        model = face(NETS["even"](), mesh_of((2, 2)))
        optimizer = torch.optim.Adafactor(model.parameters(), lr=0.05)
        loss_of(model, x).backward()
        before = [full(p) for p in model.parameters()]
        with pytest.raises(NotImplementedError, match=expected):
            optimizer.step()
        assert not optimizer.state
        with pytest.raises(NotImplementedError, match=expected):
            FSDP.optim_state_dict(model, optimizer)
        assert all(map(torch.equal, before, map(full, model.parameters())))
        vectors = [p for p in model.parameters() if p.ndim == 1]
        with pytest.raises(NotImplementedError, match=expected):
            torch.optim.Adafactor(vectors).step()
        model.zero_grad()
        with pytest.raises(NotImplementedError, match=expected):
            get_optimizer_state_dict(model, torch.optim.Adafactor(model.parameters()))
    with pytest.raises((NotImplementedError, RuntimeError)):
        theirs = wrap_fsdp2(NETS["even"](), (2, 2))
        loss_of(theirs, x).backward()
        torch.optim.Adafactor(theirs.parameters()).step()


def _adafactor_made_before(rank: int) -> None:
    net = NETS["even"]()
    optimizer = torch.optim.Adafactor(net.parameters(), lr=0.05)
    model = wrapped(net, mesh_of((2, 2)))
    loss_of(model, batch(NETS["even"](), 0, rank)).backward()
    with pytest.raises(NotImplementedError, match="Adafactor has no step"):
        optimizer.step()
    matrices = [p for p in NETS["even"]().parameters() if p.ndim == 2]
    assert not any(isinstance(p, DTensor) for p in matrices)
    for p in matrices:
        p.grad = torch.ones_like(p)
    torch.optim.Adafactor(matrices, lr=0.05).step()  # whole ones are torch's as ever


def _mixed_groups(rank: int) -> None:
    """Sharded parameters and whole ones in one group: torch's functions for lists, the default on
    devices, take one kind only. On torch's FSDP2 they fail in the midst of a step."""
    x = batch(NETS["even"](), 0, rank)
    faces = (
        lambda net, whole: FSDP(net, device_mesh=mesh_of((2, 2)), ignored_states=whole),
        lambda net, whole: fully_shard(net, mesh=mesh_of((2, 2)), ignored_params=set(whole)),
    )
    for face in faces:
        stepped = []
        for is_mixed, foreach in ((True, None), (False, False), (True, True)):
            net = NETS["even"]().to(DEVICE)
            whole = list(net.head.parameters())
            model = face(net, whole)
            sharded = [p for p in model.parameters() if isinstance(p, DTensor)]
            groups = [[*sharded, *whole]] if is_mixed else [sharded, whole]
            options = [{"params": each, "foreach": foreach} for each in groups]
            optimizer = torch.optim.Adam(options, lr=0.05)
            loss_of(model, x).backward()
            if foreach:
                refused = f"^rank {rank}: a group of torch.optim.Adam has sharded .*foreach"
                with pytest.raises(NotImplementedError, match=refused):
                    optimizer.step()
                with pytest.raises(NotImplementedError, match=refused):
                    FSDP.optim_state_dict(model, optimizer)
                assert not optimizer.state
                continue
            if is_mixed:
                FSDP.optim_state_dict(model, optimizer)
            optimizer.step()
            assert [group["foreach"] for group in optimizer.param_groups] == [foreach] * len(groups)
            stepped.append([full(p) for group in groups for p in group])
        assert all(map(torch.equal, *stepped))


def _rprop(rank: int) -> None:
    """As on torch's FSDP2, whose parameters torch below 2.12 can't step with it either, and no
    torch by its foreach functions, which are the default on devices."""
    x = batch(NETS["even"](), 0, rank)
    has_masks = TorchVersion(torch.__version__) >= "2.12"
    for face, foreach in itertools.product(FACES, (False, True, None)):
        model = face(NETS["even"](), mesh_of((2, 2)))
        theirs = wrap_fsdp2(NETS["even"](), (2, 2))
        optimizers = [
            torch.optim.Rprop(m.parameters(), lr=0.05, foreach=foreach) for m in (model, theirs)
        ]
        for each in (model, theirs):
            loss_of(each, x).backward()
        if foreach or (foreach is None and DEVICE != "cpu") or not has_masks:
            why = "foreach=False" if has_masks else "masks"
            refused = f"^rank {rank}: torch.optim.Rprop has .*{why}"
            with pytest.raises(NotImplementedError, match=refused):
                optimizers[0].step()
            assert not optimizers[0].state
            with pytest.raises(NotImplementedError):
                optimizers[1].step()
        else:
            for optimizer in optimizers:
                optimizer.step()
            assert all(
                map(torch.equal, map(full, model.parameters()), map(full, theirs.parameters()))
            )


def test_empty_and_frozen_groups() -> None:
    run_checks(4, _empty_and_frozen)


def test_traps_of_torchs_own() -> None:
    run_checks(4, _traps_of_torchs)


def test_adafactor() -> None:
    run_checks(4, _adafactor, _adafactor_made_before)


def test_sharded_and_whole_parameters_in_one_group() -> None:
    run_checks(4, _mixed_groups)


def test_rprop() -> None:
    run_checks(4, _rprop)
