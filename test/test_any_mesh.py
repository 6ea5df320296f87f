"""Units beside tensor, expert, context and pipeline parallelism: torch's ``fully_shard`` on one
mesh, bit for bit where groups have two ranks."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.fsdp as torchs
from device import DEVICE
from parallel_models import (
    Language,
    distributed,
    language,
    loss_of,
    mesh_of,
    mixture,
    shard_all,
    spread_experts,
    tensor_parallel,
)
from ranks import run_checks, run_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel
from training import full

import torch_hsdp_ckpt as ours

Face = Callable[..., nn.Module]


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to train. ``make(face)`` builds and shards the model. ``replicas``: how many batches
    there are. ``exact``: sums are of two ranks, and have one order."""

    mesh: dict[str, int]
    make: Callable[[Face, DeviceMesh], Language]
    exact: bool = True
    loss_parallel: bool = False


def _beside_tp(face: Face, mesh: DeviceMesh, **options) -> Language:
    model = tensor_parallel(language(), mesh["tp"])
    return shard_all(face, model, mesh=mesh["replicate", "shard"], **options)


def _tied(face: Face, mesh: DeviceMesh) -> Language:
    model = tensor_parallel(language(tied=True), mesh["tp"], sequence=False)
    return shard_all(face, model, mesh=mesh["replicate", "shard"])


def _sharded_only(face: Face, mesh: DeviceMesh) -> Language:
    model = tensor_parallel(language(), mesh["tp"])
    return shard_all(face, model, mesh=mesh["shard"])


def _in_parts(face: Face, mesh: DeviceMesh) -> Language:
    model = tensor_parallel(language(), mesh["tp"], whole_logits=False)
    return shard_all(face, model, mesh=mesh["replicate", "shard"])


def _within_pipeline(face: Face, mesh: DeviceMesh) -> Language:
    return shard_all(face, language(), mesh=mesh["replicate", "shard"])


def _flattened(face: Face, mesh: DeviceMesh) -> Language:
    sharded = mesh["shard", "cp"]._flatten("shard_cp")
    return shard_all(face, language(), mesh=sharded)


def _last_dimension(parameter: nn.Parameter) -> Shard | None:
    return Shard(-1) if parameter.ndim > 1 else None


def _on_columns(face: Face, mesh: DeviceMesh) -> Language:
    options = {"mesh": mesh["replicate", "shard"], "shard_placement_fn": _last_dimension}
    return shard_all(face, language(), **options)


def _on_columns_beside_tp(face: Face, mesh: DeviceMesh) -> Language:
    return _beside_tp(face, mesh, shard_placement_fn=_last_dimension)


def _kept_among_two(face: Face, mesh: DeviceMesh) -> Language:
    options = {"mesh": mesh["replicate", "shard"], "reshard_after_forward": 2}
    return shard_all(face, language(), **options)


def _mixed(reduce_dtype: torch.dtype | None) -> Callable[[Face, DeviceMesh], Language]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
    return lambda face, mesh: _beside_tp(face, mesh, mp_policy=policy)


def _on_whole_mesh(**dims: Any) -> Callable[[Face, DeviceMesh], Language]:
    """Parameters and activations are DTensors on the whole mesh."""

    def make(face: Face, mesh: DeviceMesh) -> Language:
        model = distributed(language(), mesh)
        return shard_all(face, model, mesh=mesh, dp_mesh_dims=torchs.DataParallelMeshDims(**dims))

    return make


def _experts(face: Face, mesh: DeviceMesh) -> Language:
    """Experts over ``ep``, sharded over the rest, which is another mesh than that of the others."""
    model = mixture()
    mesh["efsdp", "ep"]._flatten("fsdp")
    for block in model.blocks:
        spread_experts(block.experts, mesh["ep"])
        face(block.experts, mesh=mesh["replicate", "efsdp"])
        face(block, mesh=mesh["replicate", "fsdp"])
    face(model, mesh=mesh["replicate", "fsdp"])
    return model


def _mesh_of_its_own(face: Face, mesh: DeviceMesh) -> Language:
    """Vectors are sharded over two ranks, and not replicated."""
    common: Any = importlib.import_module("torch.distributed.fsdp._fully_shard._fsdp_common")
    info = common.FSDPMeshInfo(mesh["shard"], shard_mesh_dim=0)

    def place(parameter: nn.Parameter) -> Any:
        return common.ShardPlacementResult(Shard(0), info) if parameter.ndim == 1 else None

    return shard_all(face, language(), mesh=mesh["replicate", "shard"], shard_placement_fn=place)


HSDP_TP = {"replicate": 2, "shard": 2, "tp": 2}
CASES = {
    "beside TP": Case(HSDP_TP, _beside_tp),
    "tied beside TP": Case(HSDP_TP, _tied),
    "1-D beside TP": Case({"shard": 4, "tp": 2}, _sharded_only, exact=False),
    "loss in parts": Case(HSDP_TP, _in_parts, loss_parallel=True),
    "within PP": Case({"pp": 2, "replicate": 2, "shard": 2}, _within_pipeline),
    "flattened": Case({"pp": 2, "shard": 2, "cp": 2}, _flattened, exact=False),
    "on columns": Case({"pp": 2, "replicate": 2, "shard": 2}, _on_columns),
    "on columns beside TP": Case(HSDP_TP, _on_columns_beside_tp),
    "kept among two ranks": Case({"replicate": 2, "shard": 4}, _kept_among_two, exact=False),
    "bfloat16 beside TP": Case(HSDP_TP, _mixed(None)),
    "bfloat16 summed in float32 beside TP": Case(HSDP_TP, _mixed(torch.float32)),
    "experts on another mesh": Case({"replicate": 2, "efsdp": 2, "ep": 2}, _experts, exact=False),
}
if hasattr(torchs, "DataParallelMeshDims"):
    CASES |= {
        "whole mesh, HSDP and TP": Case(
            HSDP_TP, _on_whole_mesh(shard="shard", replicate="replicate")
        ),
        "whole mesh, two dimensions of shards": Case(
            {"shard": 2, "cp": 2, "tp": 2}, _on_whole_mesh(shard=("shard", "cp")), exact=False
        ),
        "whole mesh, flattened shards and TP": Case(
            {"replicate": 2, "shard": 2, "cp": 2},
            _on_whole_mesh(shard=("shard", "cp"), replicate="replicate"),
            exact=False,
        ),
        "whole mesh, replicas only": Case(
            HSDP_TP, _on_whole_mesh(replicate=("replicate", "shard")), exact=False
        ),
        "a mesh of its own": Case({"replicate": 2, "shard": 2, "pp": 2}, _mesh_of_its_own),
    }


def _replica(mesh: DeviceMesh) -> int:
    """Which batch this rank has: one for each coordinate in data-parallel dimensions."""
    number = 0
    for name in ("replicate", "shard", "cp", "efsdp", "ep"):
        if name in mesh.mesh_dim_names:
            number = number * mesh[name].size() + mesh[name].get_local_rank()
    return number


def train(
    case: Case, face: Face, mesh: DeviceMesh, steps: int
) -> tuple[Language, torch.optim.Optimizer, list[float]]:
    """Adam, clipping by value, and every third step two backwards of which the first does not
    reduce."""
    model = case.make(face, mesh)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, foreach=False)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(1 + (step % 3 == 2)):
            model.set_requires_gradient_sync(part == step % 3 // 2)
            loss = _loss(case, model, 2 * step + part, _replica(mesh))
            losses.append(loss)
        for parameter in model.parameters():
            local = parameter.grad.to_local()
            local.clamp_(-0.1, 0.1)
        optimizer.step()
    return model, optimizer, losses


def _loss(case: Case, model: Language, step: int, replica: int) -> float:
    if not case.loss_parallel:
        loss = loss_of(model, step, replica)
        loss.backward()
        return loss.item()
    with loss_parallel():
        loss = loss_of(model, step, replica)
        loss.backward()
    return loss.full_tensor().item()


def _check(case: Case) -> None:
    mesh = mesh_of(**case.mesh)
    expected, _, expected_losses = train(case, torchs.fully_shard, mesh, 10)
    model, _, losses = train(case, ours.fully_shard, mesh, 10)
    tolerance = {"rtol": 0.0, "atol": 0.0} if case.exact else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(losses, expected_losses, **tolerance)
    named = zip(model.named_parameters(), expected.named_parameters(), strict=True)
    for (name, parameter), (expected_name, wanted) in named:
        assert name == expected_name
        _check_same(name, parameter, wanted, tolerance)
        _check_same(f"the gradient of {name}", parameter.grad, wanted.grad, tolerance)


def _check_same(name: str, found: DTensor, wanted: DTensor, tolerance: dict[str, float]) -> None:
    assert found._spec.mesh == wanted._spec.mesh, name
    assert found.placements == wanted.placements, name
    assert found.shape == wanted.shape and found.stride() == wanted.stride(), name
    torch.testing.assert_close(found.to_local(), wanted.to_local(), msg=name, **tolerance)


def _check_all(rank: int, names: list[str]) -> None:
    for name in names:
        try:
            _check(CASES[name])
        except BaseException as error:
            raise AssertionError(name) from error


def _compiled_beside_tp(rank: int) -> None:
    """Blocks that are compiled before they become units, as torchtitan does it, and after: the
    numbers are those without. (torch's own fully_shard loses the embedding's gradient there.)"""
    mesh = mesh_of(**HSDP_TP)
    expected, _, losses = train(CASES["beside TP"], torchs.fully_shard, mesh, 4)

    def compiled_before(face: Face, mesh: DeviceMesh) -> Language:
        model = tensor_parallel(language(), mesh["tp"])
        for block in model.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
        return shard_all(face, model, mesh=mesh["replicate", "shard"])

    def compiled_after(face: Face, mesh: DeviceMesh) -> Language:
        model = _beside_tp(face, mesh)
        for block in model.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
        return model

    for make in (compiled_before, compiled_after):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model, _, found = train(Case(HSDP_TP, make), ours.fully_shard, mesh, 4)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
        torch.testing.assert_close(found, losses, rtol=1e-5, atol=1e-6)
        named = zip(model.named_parameters(), expected.named_parameters(), strict=True)
        for (name, parameter), (_, wanted) in named:
            _check_same(name, parameter, wanted, {"rtol": 1e-5, "atol": 1e-6})


def _kept_beside_tp(rank: int) -> None:
    """torch refuses it: the numbers are those without."""
    mesh = mesh_of(shard=4, tp=2)
    found = []
    for reshard in (2, True):

        def make(face: Face, mesh: DeviceMesh, reshard: bool | int = reshard) -> Language:
            model = tensor_parallel(language(), mesh["tp"])
            return shard_all(face, model, mesh=mesh["shard"], reshard_after_forward=reshard)

        model, _, losses = train(Case({}, make), ours.fully_shard, mesh, 3)
        found.append((losses, [p.to_local() for p in model.parameters()]))
    assert found[0][0] == found[1][0]
    assert all(map(torch.equal, found[0][1], found[1][1]))


def _numbers_of_ranks(rank: int) -> None:
    mesh = mesh_of(shard=4, tp=2)["shard"]
    for wrong in (3, 0, -1, 8, 2.0, "2"):
        with pytest.raises(ValueError, match=f"reshard_after_forward={wrong!r}"):
            ours.fully_shard(nn.Linear(4, 4), mesh=mesh, reshard_after_forward=wrong)
    with pytest.warns(UserWarning, match="keeps the parameters whole"):
        kept = ours.fully_shard(nn.Linear(4, 4), mesh=mesh, reshard_after_forward=1)
    kept(torch.ones(1, 4))
    assert not isinstance(kept.weight, DTensor)
    freed = ours.fully_shard(nn.Linear(4, 4), mesh=mesh, reshard_after_forward=4)
    freed(torch.ones(1, 4))
    assert isinstance(freed.weight, DTensor)


def _sequential(mesh: DeviceMesh, norm_type: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One process's norm, and gradients clipped by it."""
    model = language()
    replicas = mesh["replicate"].size() * mesh["shard"].size()
    for replica in range(replicas):
        (loss_of(model, 0, replica) / replicas).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1, norm_type)
    return norm, {name: p.grad for name, p in model.named_parameters()}


def _clips_as_one_process(rank: int) -> None:
    """Parameters beside TP and others are on two meshes; torch's own function raises."""
    mesh = mesh_of(**HSDP_TP)
    for norm_type in (2.0, 1.0, float("inf")):
        model = tensor_parallel(language(), mesh["tp"], sequence=False)
        shard_all(ours.fully_shard, model, mesh=mesh["replicate", "shard"])
        loss_of(model, 0, _replica(mesh)).backward()
        norm = ours.clip_grad_norm_(model.parameters(), 0.1, norm_type)
        wanted, grads = _sequential(mesh, norm_type)
        torch.testing.assert_close(norm, wanted, rtol=1e-5, atol=1e-6)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(full(parameter.grad), grads[name], rtol=1e-4, atol=1e-6)
    with pytest.raises(RuntimeError):
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def _refusals(rank: int) -> None:
    """At construction, on every rank, with the parameter, its mesh and what is asked for."""
    mesh = mesh_of(**HSDP_TP)
    data, start = (
        mesh["replicate", "shard"],
        f"^rank {rank}: module Linear: parameter weight of shape ",
    )

    def refuses(linear: nn.Linear, message: str, **arguments: Any) -> None:
        with pytest.raises(ValueError, match=start + message):
            ours.fully_shard(linear, **{"mesh": data, **arguments})
        assert type(linear) is nn.Linear

    def placed(where: DeviceMesh, *placements: Any) -> nn.Linear:
        linear = nn.Linear(4, 6, bias=False, device=DEVICE)
        weight = distribute_tensor(linear.weight.detach(), where, placements)
        linear.weight = nn.Parameter(weight)
        return linear

    other = init_device_mesh(DEVICE, (8,), mesh_dim_names=("elsewhere",))
    refuses(placed(other, Replicate()), r"\(6, 4\) is a DTensor on .*elsewhere=8.* wrap it once")
    refuses(
        placed(mesh["shard", "tp"], Shard(0), Replicate()), ".*other dimensions of the same root"
    )
    partial = placed(mesh["tp"], Replicate())
    local = partial.weight.to_local()
    partial.weight = nn.Parameter(DTensor.from_local(local, mesh["tp"], [Partial()]))
    refuses(partial, r".*\(Partial.* has to be Replicate or Shard")
    columns = {"shard_placement_fn": lambda p: Shard(1)}
    refuses(nn.Linear(5, 6, bias=False), r".*dimension 1 of 5 .* evenly among 2 shards", **columns)
    refuses(
        nn.Linear(4, 6, bias=False), ".* gives a Shard", shard_placement_fn=lambda p: Replicate()
    )
    sparse = nn.Embedding(6, 4, sparse=True)
    with pytest.raises(ValueError, match=f"^rank {rank}: module Embedding: .* sparse gradients"):
        ours.fully_shard(sparse, mesh=data)
    if hasattr(torchs, "DataParallelMeshDims"):
        dims = ours.DataParallelMeshDims(shard="shard", replicate="replicate")
        whole = {"mesh": mesh, "dp_mesh_dims": dims}
        refuses(nn.Linear(4, 6, bias=False), ".*is a plain tensor", **whole)
        refuses(placed(mesh["tp"], Shard(0)), ".*the mesh that fully_shard is given", **whole)
        cut = placed(mesh, Replicate(), Shard(0), Replicate())
        refuses(cut, ".*dimension 1 of that mesh it has to be Replicate", **whole)
        for wrong in ({"shard": "nowhere"}, {"shard": ("shard", "shard")}):
            with pytest.raises(
                ValueError, match=f"^rank {rank}: module Linear: dp_mesh_dims names"
            ):
                asked = ours.DataParallelMeshDims(**wrong)
                ours.fully_shard(nn.Linear(4, 6), mesh=mesh, dp_mesh_dims=asked)


def test_clipping_and_refusals() -> None:
    run_checks(8, _clips_as_one_process, _refusals)


def test_resharding_to_fewer_ranks() -> None:
    run_checks(8, _kept_beside_tp, _numbers_of_ranks)


def test_compiled_blocks() -> None:
    run_checks(8, _compiled_beside_tp)


@pytest.mark.parametrize("part", range(4))
def test_training_is_torchs(part: int) -> None:
    run_ranks(_check_all, 8, list(CASES)[part::4], timeout=400.0)
