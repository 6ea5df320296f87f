"""Muon over sharded matrices: torch's numbers, and errors on all ranks."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from device import DEVICE
from matrices import assert_equal, cut, give_gradients, matrices_of, momenta_of, parameters_of
from models import NETS, batch
from ranks import run_checks, run_ranks
from states import fully_sharded, mesh_of, wrapped
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard as torchs_fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard
from training import full, loss_of, wrap_fsdp2

import torch_hsdp_ckpt as h


def _step_both(
    mesh: DeviceMesh,
    placements: Sequence[Any],
    steps: int,
    group: Callable[[list[nn.Parameter]], Any] = list,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters that ours has stepped, and those of torch's in one process. Their momenta have the
    same bits."""
    sharded, whole = parameters_of(mesh, placements, dtype), parameters_of(None, dtype=dtype)
    versions = [parameter._version for parameter in sharded]
    ours = h.Muon(group(sharded), **options)
    theirs = torch.optim.Muon(group(whole), **options)
    for step in range(steps):
        for parameters, optimizer in ((sharded, ours), (whole, theirs)):
            give_gradients(parameters, step)
            optimizer.step()
    assert_equal(momenta_of(ours), momenta_of(theirs))
    for parameter, momentum in zip(sharded, momenta_of(ours), strict=True):
        assert momentum.placements == parameter.placements
    assert not any(map(torch.equal, whole, parameters_of(None, dtype=dtype)))
    # A backward that needs them as they were has to find out.
    assert all(p._version > version for p, version in zip(sharded, versions, strict=True))
    return sharded, whole


def _meshes(rank: int) -> None:
    """On 2 x 2, 1-D, without replicas and without shards; matrices with fewer rows than ranks."""
    for shape in ((2, 2), (4,), (1, 4), (4, 1)):
        placements = (Replicate(), Shard(0))[-len(shape) :]
        assert_equal(*_step_both(mesh_of(*shape), placements, 10, lr=0.02))


def _placements(rank: int) -> None:
    """Columns, two mesh dimensions in either order, and what each rank has whole."""
    mesh = mesh_of(2, 2)
    for placements in (
        (Replicate(), Shard(1)),
        (Shard(0), Shard(1)),
        (Shard(1), Shard(0)),
        (Shard(0), Shard(0)),
        (_StridedShard(0, split_factor=2), Shard(0)),
        (Replicate(), Replicate()),
    ):
        assert_equal(*_step_both(mesh, placements, 2, lr=0.02))


def _options(rank: int) -> None:
    mesh, placements = mesh_of(2, 2), (Replicate(), Shard(0))
    for options in (
        {"nesterov": False},
        {"momentum": 0.0, "weight_decay": 0.0},
        {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5)},
        {"lr": torch.tensor(0.01), "weight_decay": 0.3, "eps": 1e-3},
    ):
        assert_equal(*_step_both(mesh, placements, 3, **options))

    def two_groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [
            {"params": parameters[:2]},
            {"params": parameters[2:], "lr": 0.1, "nesterov": False, "ns_steps": 2},
        ]

    assert_equal(*_step_both(mesh, placements, 3, two_groups, lr=0.02))


def _low_precision(rank: int) -> None:
    """In bfloat16 the CPU's kernels round the end of a tensor, and transposed updates, in another
    way than the rest: the last bit may differ."""
    sharded = parameters_of(mesh_of(2, 2), (Replicate(), Shard(0)), torch.bfloat16)
    whole = parameters_of(None, dtype=torch.bfloat16)
    for kind, parameters in ((h.Muon, sharded), (torch.optim.Muon, whole)):
        optimizer = kind(parameters, lr=0.02)
        give_gradients(parameters, 0)
        optimizer.step()
    for ours, theirs in zip(sharded, whole, strict=True):
        torch.testing.assert_close(full(ours), theirs.detach(), rtol=2**-7, atol=0)
    # The iteration works on a copy of the momentum (torch 2.11's own changes it).
    optimizer = h.Muon(sharded, nesterov=False, momentum=0.75)
    optimizer.step()
    expected = [torch.zeros_like(p).lerp(p.grad, 0.25) for p in sharded]
    assert_equal(momenta_of(optimizer), expected)


def _without_gradients(rank: int) -> None:
    """Matrices without a gradient stay, as torch's; a group is added; closures are called once."""
    mesh, placements = mesh_of(2, 2), (Replicate(), Shard(0))
    sharded, whole = parameters_of(mesh, placements), parameters_of(None)
    outcomes = []
    for kind, parameters in ((h.Muon, sharded), (torch.optim.Muon, whole)):
        optimizer = kind(parameters[:4], lr=0.02)
        calls: list[bool] = []

        def closure(parameters=parameters, calls=calls) -> float:
            calls.append(torch.is_grad_enabled())
            give_gradients(parameters, len(calls))
            parameters[1].grad = parameters[2].grad = None
            return 7.0

        assert optimizer.step(closure) == 7.0
        optimizer.add_param_group({"params": parameters[4:], "lr": 0.1})
        assert optimizer.step(closure) == 7.0 and calls == [True, True]
        optimizer.zero_grad()
        optimizer.step()
        outcomes.append(optimizer)
    assert_equal(sharded, whole)
    assert [p in outcomes[0].state for p in sharded] == [p in outcomes[1].state for p in whole]
    assert sharded[1] not in outcomes[0].state


def _plain_ones(rank: int) -> None:
    """Matrices that are no DTensors, in one group with some that are, are stepped as by torch."""
    sharded, whole = parameters_of(mesh_of(2, 2), (Replicate(), Shard(0))), parameters_of(None)
    sharded[0], sharded[3] = parameters_of(None)[0], parameters_of(None)[3]
    for kind, parameters in ((h.Muon, sharded), (torch.optim.Muon, whole)):
        optimizer = kind(parameters, lr=0.02)
        for step in range(3):
            give_gradients(parameters, step)
            optimizer.step()
    assert_equal(sharded, whole)


def _summed_gradients(rank: int) -> None:
    """Gradients that are placed in another way than their parameters, as sums of which each rank
    has a part, are reduced first."""
    mesh, placements = mesh_of(2, 2), (Replicate(), Shard(0))
    sharded, whole = parameters_of(mesh, placements), parameters_of(None)
    give_gradients(whole, 0)
    for parameter, reference in zip(sharded, whole, strict=True):
        part = reference.grad * 0.25
        parameter.grad = DTensor.from_local(part, mesh, (Partial(), Partial()))
    for kind, parameters in ((h.Muon, sharded), (torch.optim.Muon, whole)):
        optimizer = kind(parameters, lr=0.02)
        optimizer.step()
    assert_equal(sharded, whole)


def test_the_bits_of_one_process() -> None:
    run_checks(4, _meshes, _placements, _options)


def test_the_bits_with_other_parameters_and_gradients() -> None:
    run_checks(4, _low_precision, _without_gradients, _plain_ones, _summed_gradients)


# ---- models in training --------------------------------------------------------------------------
def _check_training(
    model: nn.Module, optimizer: torch.optim.Optimizer, kind: str, data_rank: int, steps: int = 3
) -> None:
    """Trains the model's matrices; in one process torch's Muon, with the same gradients, has their
    bits."""
    net = NETS[kind]()
    whole = [nn.Parameter(full(parameter).clone()) for parameter in matrices_of(model)]
    reference = torch.optim.Muon(whole, lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch(net, step, data_rank)).backward()
        for parameter, sharded in zip(whole, matrices_of(model), strict=True):
            parameter.grad = full(sharded.grad)
        optimizer.step()
        reference.step()
    assert_equal(matrices_of(model), whole)


def _wrapped_models(rank: int) -> None:
    for face, shape in itertools.product((wrapped, fully_sharded), ((2, 2), (4,))):
        model = face(NETS["uneven"](), mesh_of(*shape))
        steps = 10 if face is fully_sharded else 3
        _check_training(model, h.Muon(matrices_of(model), lr=0.05), "uneven", rank, steps)


def _made_before_wrapping(rank: int) -> None:
    for face in (wrapped, fully_sharded):
        net = NETS["uneven"]()
        optimizer = h.Muon(matrices_of(net), lr=0.05)
        _check_training(face(net, mesh_of(2, 2)), optimizer, "uneven", rank)


def _torchs_wrapper(rank: int) -> None:
    """On torch's fully_shard the bits are one process's, and torch's own Muon agrees within the
    rounding of its sums, which it makes in bfloat16 and in another order. (It has no step for a
    matrix with fewer rows than ranks.)"""
    for shape in ((2, 2), (4,)):
        model = wrap_fsdp2(NETS["uneven"](), shape)
        _check_training(model, h.Muon(matrices_of(model), lr=0.05), "uneven", rank)
        models = [wrap_fsdp2(NETS["even"](), shape) for _ in range(2)]
        for each, kind in zip(models, (h.Muon, torch.optim.Muon), strict=True):
            # Random ones: a gradient of low rank would make much of the rounding.
            give_gradients(matrices_of(each), 0)
            kind(matrices_of(each), lr=0.1).step()
        before = matrices_of(NETS["even"]())
        for p, q, r in zip(*map(matrices_of, models), before, strict=True):
            torch.testing.assert_close(full(p), full(q), rtol=0, atol=0.01)
            assert (full(p) - r).abs().max() > 0.05


def _tensor_parallel(rank: int) -> None:
    """Under torch's tensor parallelism and fully_shard: matrices cut twice by rows, and by rows and
    columns. Rows are cut evenly, as torch needs them."""
    mesh = init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("dp", "tp"))
    model = NETS["even"]()
    for block in model.blocks:
        parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        torchs_fully_shard(block, mesh=mesh["dp"])
    torchs_fully_shard(model, mesh=mesh["dp"])
    placements = [parameter.placements for parameter in matrices_of(model)]
    assert (_StridedShard(0, split_factor=2), Shard(0)) in placements
    assert (Shard(0), Shard(1)) in placements
    _check_training(model, h.Muon(matrices_of(model), lr=0.05), "even", mesh.get_local_rank("dp"))


def test_training() -> None:
    run_checks(4, _wrapped_models, _made_before_wrapping, _torchs_wrapper)


def test_under_tensor_parallelism() -> None:
    run_checks(4, _tensor_parallel)


# ---- errors --------------------------------------------------------------------------------------
def _gradients_on_some_ranks(rank: int) -> None:
    """All ranks say so, and nothing has changed; the next step is a good one."""
    for shape, lacking in (((2, 2), 1), ((4,), 3), ((2, 2), 2)):
        placements = (Replicate(), Shard(0))[-len(shape) :]
        parameters = parameters_of(mesh_of(*shape), placements)
        optimizer = h.Muon([{"params": parameters[:2]}, {"params": parameters[2:]}])
        before = [full(parameter).clone() for parameter in parameters]
        give_gradients(parameters, 0)
        if rank == lacking:
            parameters[3].grad = None
        expected = r"parameter 1 of group 1 of shape \(3, 5\) is there on rank \d and not on rank"
        with pytest.raises(RuntimeError, match=f"{expected} {lacking}"):
            optimizer.step()
        assert not optimizer.state
        assert_equal(parameters, before)
        give_gradients(parameters, 0)
        optimizer.step()


def _on_a_part_of_the_ranks(rank: int) -> None:
    """Meshes that hold half of the ranks: those of the other half hear nothing of an error."""
    mesh = mesh_of(2, 2)["shard"]
    parameters = parameters_of(mesh, (Shard(0),))
    optimizer = h.Muon(parameters)
    give_gradients(parameters, 0)
    if rank == 3:
        for parameter in parameters:
            parameter.grad = None
    if rank >= 2:
        with pytest.raises(RuntimeError, match="is there on rank 2 and not on rank 3"):
            optimizer.step()
    else:
        optimizer.step()


def _what_is_no_matrix(rank: int) -> None:
    mesh, placements = mesh_of(2, 2), (Replicate(), Shard(0))
    parameters = parameters_of(mesh, placements)
    optimizer = h.Muon(parameters)
    vector = nn.Parameter(cut(torch.ones(8), mesh, placements))
    optimizer.add_param_group({"params": [vector]})
    give_gradients([*parameters, vector], 0)
    with pytest.raises(ValueError, match=r"parameter 0 of group 1 of shape .* is no matrix"):
        optimizer.step()
    with pytest.raises(ValueError, match="2D"):
        h.Muon([vector])


def _misplaced_momentum(rank: int) -> None:
    """On one rank only: all of them raise its error."""
    parameters = parameters_of(mesh_of(2, 2), (Replicate(), Shard(0)))
    names = [f"layer{i}.weight" for i in range(len(parameters))]
    optimizer = h.Muon(list(zip(names, parameters, strict=True)))
    give_gradients(parameters, 0)
    optimizer.step()
    if rank == 1:
        optimizer.state[parameters[2]]["momentum_buffer"] = torch.zeros(13, 7)
    with pytest.raises(ValueError, match=r"rank 1: layer2\.weight has a momentum_buffer"):
        optimizer.step()


def _without_peers(rank: int) -> None:
    """Under torch's "fake" backend the other ranks do not exist, and are not waited for."""
    from torch.testing._internal.distributed import fake_pg

    dist.destroy_process_group()
    dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=0, world_size=4)
    parameters = parameters_of(mesh_of(2, 2, device="cpu"), (Replicate(), Shard(0)))
    give_gradients(parameters, 0)
    h.Muon(parameters).step()


def test_a_backend_without_peers() -> None:
    run_ranks(_without_peers, 1, backend="gloo")


def test_errors_reach_all_ranks() -> None:
    run_checks(
        4,
        _gradients_on_some_ranks,
        _on_a_part_of_the_ranks,
        _what_is_no_matrix,
        _misplaced_momentum,
    )
