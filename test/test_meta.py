"""Deferred initialisation: ``fully_shard`` on the meta device, memory and values after it; beside
torch's."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from device import DEVICE, cpu_only
from models import Net, batch, uneven_net
from ranks import run_checks, run_ranks
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard as torchs_fully_shard
from torch.distributed.tensor import DTensor
from training import full, mesh_of

from torch_hsdp_ckpt import FSDPModule, fully_shard, load, save

FACES = (fully_shard, torchs_fully_shard)


def _on_meta(face=fully_shard, shape: tuple[int, ...] = (2, 2)) -> Net:
    with torch.device("meta"):
        net = uneven_net()
    return _shard(net, face, shape)


def _shard(net: Net, face=fully_shard, shape: tuple[int, ...] = (2, 2)) -> Net:
    mesh = mesh_of(shape)
    for block in net.blocks:
        face(block, mesh=mesh)
    return face(net, mesh=mesh)


def _reset(model: Net) -> None:
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for buffer in model.buffers():
        buffer.zero_()


def _train(model: Net, rank: int) -> list[torch.Tensor]:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        losses.append(model(batch(uneven_net(), step, rank)).square().mean())
        losses[-1].backward()
        optimizer.step()
    return losses


def _deferred(rank: int) -> None:
    for shape in ((4,), (2, 2)):
        trained = []
        for face in FACES:
            model = _on_meta(face, shape)
            assert all(isinstance(p, DTensor) and p.is_meta for p in model.parameters())
            before = list(model.parameters())
            with pytest.raises(RuntimeError, match=r"from meta device.*head\.weight"):
                model(batch(uneven_net(), 0, rank))
            if face is torchs_fully_shard:  # torch's is of no more use
                model = _on_meta(face, shape)
                before = list(model.parameters())
            model.to_empty(device=DEVICE)
            assert all(p is q for p, q in zip(before, model.parameters(), strict=True))
            torch.manual_seed(0)  # as always on replicas
            _reset(model)
            trained.append((_train(model, rank), [p.to_local() for p in model.parameters()]))
        for ours, torchs in zip(*trained, strict=True):
            torch.testing.assert_close(ours, torchs)


def _only_the_root(rank: int) -> None:
    """A unit on the meta device within one that has values, and the other way round."""
    for inner_first in (True, False):
        with torch.device("meta"):
            lazy = uneven_net()
        net = uneven_net()
        if inner_first:
            net.blocks[0] = lazy.blocks[0]
        else:
            lazy.blocks[0] = net.blocks[0]
            net = lazy
        model = _shard(net)
        with pytest.raises(RuntimeError, match="materialized from meta device"):
            model(batch(uneven_net(), 0, rank))
        model.to_empty(device=DEVICE)
        _reset(model)
        _train(model, rank)


def _within_a_unit(rank: int) -> None:
    """One parameter of a unit has values, and keeps them, when the others are loaded."""
    net = uneven_net()
    whole = {name: value.clone() for name, value in net.state_dict().items()}
    net.head.bias = torch.nn.Parameter(net.head.bias.to("meta"))
    model = _shard(net)
    with pytest.raises(RuntimeError, match=r"these still are on it: head.bias\."):
        model(batch(uneven_net(), 0, rank))
    model.head.to_empty(device=DEVICE)  # past the unit, which finds it at the next forward
    with torch.no_grad():
        model.head.weight.fill_(1.0)
        model.head.bias.fill_(2.0)
    out = model(batch(uneven_net(), 0, rank))
    assert torch.equal(full(model.blocks[0].up.weight), whole["blocks.0.up.weight"])
    assert out.isfinite().all() and torch.equal(full(model.head.bias), torch.full((3,), 2.0))


@cpu_only("torch puts such values on the CPU where the default group has a CPU backend too")
def _from_the_first_rank(rank: int) -> None:
    whole = uneven_net().state_dict()
    for cpu_offload in (False, True):
        for broadcast in (True, False):
            options = StateDictOptions(
                broadcast_from_rank0=broadcast, full_state_dict=True, cpu_offload=cpu_offload
            )
            for face in FACES:
                model = _on_meta(face)
                given = whole if rank == 0 or not broadcast else {}
                given = {name: value.clone() for name, value in given.items()}
                set_model_state_dict(model, given, options=options)
                for name, value in model.state_dict().items():
                    assert torch.equal(full(value), whole[name]), name
                _train_with_buffers(model, rank)


def _train_with_buffers(model: Net, rank: int) -> None:
    model.scratch = torch.zeros(2)  # not in state dicts
    _train(model, rank)


def _assigned(rank: int) -> None:
    source = _shard(uneven_net()).state_dict()
    for face in FACES:
        model = _on_meta(face)
        model.load_state_dict({name: v.clone() for name, v in source.items()}, assign=True)
        for name, value in model.state_dict().items():
            assert torch.equal(full(value), full(source[name])), name
        _train_with_buffers(model, rank)


def _from_a_checkpoint(rank: int, directory: str) -> None:
    source = _shard(uneven_net()).state_dict()
    save({"model": source}, checkpoint_id=directory)
    for read in (dcp.load, load):
        model = _on_meta()
        state = {"model": get_model_state_dict(model)}
        read(state, checkpoint_id=directory)
        model.load_state_dict(state["model"], assign=True)
        for name, value in model.state_dict().items():
            assert torch.equal(full(value), full(source[name])), name
        _train_with_buffers(model, rank)


def _refused(rank: int) -> None:
    model = _on_meta()
    assert isinstance(model, FSDPModule)
    with pytest.raises(RuntimeError, match=r'"head\.bias" is on the meta device in the module'):
        model.load_state_dict(_shard(uneven_net()).state_dict())
    with pytest.raises(RuntimeError, match="materialized from meta device"):
        model.unshard()
    # One rank has no values: all hear of it.
    model = _shard(uneven_net()) if rank else _on_meta()
    with pytest.raises(RuntimeError, match=r"rank 0: .*from meta device before"):
        model(batch(uneven_net(), 0, rank))


def test_deferred_initialisation() -> None:
    run_checks(4, _deferred, _only_the_root, _within_a_unit, _refused)


def test_loading_into_meta() -> None:
    run_checks(4, _from_the_first_rank, _assigned)


def test_checkpoint_into_meta(tmp_path) -> None:
    run_ranks(_from_a_checkpoint, 4, str(tmp_path / "checkpoint"))
