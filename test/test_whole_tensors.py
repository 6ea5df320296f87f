"""Work on whole tensors whose parts lie on many ranks: who does it, in which rounds, and what is
refused."""

import itertools
import math
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from device import DEVICE
from matrices import assert_equal, cut, give_gradients, parameters_of
from ranks import run_checks, run_ranks
from states import mesh_of
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from training import full

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt.optim import muon, rounds
from torch_hsdp_ckpt.optim.plan import assign


class _Counted:
    """Calls of a module's function in this process, by the shape of their first tensor."""

    def __init__(self, module: Any, name: str) -> None:
        self.module, self.name, self.shapes = module, name, []

    def __enter__(self) -> "_Counted":
        self.counted = getattr(self.module, self.name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            self.shapes.append(tuple(arguments[0].shape))
            return self.counted(*arguments, **keywords)

        setattr(self.module, self.name, call)
        return self

    def __exit__(self, *_: object) -> None:
        setattr(self.module, self.name, self.counted)


def _counts(rank: int, shape: tuple[int, ...], sizes: list[tuple[int, int]]) -> dict[str, Any]:
    placements = (Replicate(), Shard(0))[-len(shape) :]
    mesh = mesh_of(*shape)
    parameters = parameters_of(mesh, placements, sizes=sizes)
    optimizer = h.Muon(parameters)
    give_gradients(parameters, 0)
    with (
        _Counted(muon, "_zeropower_via_newtonschulz") as iterations,
        _Counted(dist, "all_to_all_single") as exchanges,
        _Counted(dist, "all_gather_into_tensor") as gathers,
    ):
        optimizer.step()
    return {
        "shapes": iterations.shapes,
        "exchanges": len(exchanges.shapes),
        "gathers": len(gathers.shapes),
    }


@pytest.mark.parametrize("shape", [(2, 2), (4,)], ids=str)
def test_each_matrix_is_orthogonalised_on_one_rank(shape: tuple[int, ...]) -> None:
    """Evenly by operations: a matrix of twice the width is eight of the others. All of a round move
    at once: one exchange each way, and one among the replicas."""
    sizes = [(16, 16)] * 8 + [(32, 32)] * 3
    ranks = run_ranks(_counts, 4, shape, sizes)
    computed = [Counter(found["shapes"]) for found in ranks]
    assert sum(computed, Counter()) == Counter(sizes)
    assert sorted(computed, key=repr) == [{(16, 16): 8}, *[{(32, 32): 1}] * 3]
    assert [found["exchanges"] for found in ranks] == [2] * 4
    assert [found["gathers"] for found in ranks] == [1 if len(shape) == 2 else 0] * 4


def _rounds(rank: int) -> None:
    """A rank that may have two small matrices whole at a time has no more, and the results are the
    same; a larger one has a round of its own."""
    sizes = [(16, 16)] * 16 + [(64, 64)] * 2
    mesh, placements = mesh_of(2, 2), (Replicate(), Shard(0))
    outcomes, exchanges = [], []
    for round_bytes in (2 * 16 * 16 * 2, 1 << 30):
        parameters = parameters_of(mesh, placements, sizes=sizes)
        optimizer = h.Muon(parameters, lr=0.02)
        optimizer.round_bytes = round_bytes
        give_gradients(parameters, 0)
        with _Alive() as alive, _Counted(dist, "all_to_all_single") as counted:
            optimizer.step()
        outcomes.append(parameters)
        exchanges.append(len(counted.shapes))
        assert alive.most * 16 * 16 * 2 <= max(round_bytes, 64 * 64 * 2)
    # Two ranks have a large one each, the other two eight small ones each, two a round.
    assert exchanges == [2 * 4, 2]
    assert_equal(*outcomes)


class _Alive:
    """How much of whole matrices a rank has in a round, in matrices of 16 x 16."""

    def __enter__(self) -> "_Alive":
        self.most, self.finish = 0, rounds._finish_gather

        def finish(gather: Any) -> Any:
            wholes = self.finish(gather)
            owned = [wholes[i] for i in gather.line.round.owned]
            self.most = max(self.most, sum(whole.numel() for whole in owned) // 256)
            self.kept += [weakref.ref(whole) for whole in owned]
            return wholes

        self.kept: list[Any] = []
        rounds._finish_gather = finish
        return self

    def __exit__(self, *_: object) -> None:
        rounds._finish_gather = self.finish
        assert not any(reference() is not None for reference in self.kept), "still there"


def test_rounds_bound_what_is_whole() -> None:
    run_checks(4, _rounds)


def _own_function(rank: int) -> None:
    """Each tensor is whole in one call on one rank, whatever its dimensions, dtype and placement,
    and the results are placed as the tensors are."""
    mesh, line = mesh_of(2, 2), mesh_of(4)
    generator = torch.Generator().manual_seed(0)
    wholes = [
        torch.randn(size, generator=generator) for size in [(5, 3), (6, 4, 2), (9,), (4, 4), (8, 3)]
    ]
    given = [
        cut(wholes[0], mesh, (Shard(0), Shard(1))),
        cut(wholes[1].double(), line, (Shard(1),)),
        cut(wholes[2], mesh, (Replicate(), Shard(0))),
        wholes[3],
        cut(wholes[4], mesh, (_StridedShard(0, split_factor=2), Shard(0))),
    ]
    calls: list[int] = []

    def negate(i: int, whole: torch.Tensor) -> torch.Tensor:
        assert torch.equal(whole, wholes[i].to(whole.dtype))
        calls.append(i)
        return -whole

    results = h.map_whole_tensors(negate, given)
    for result, tensor in zip(results, given, strict=True):
        assert torch.equal(full(result), -full(tensor)) and type(result) is type(tensor)
        assert result.dtype == tensor.dtype
        if isinstance(tensor, DTensor):
            assert result.placements == tensor.placements
    called: list[Any] = [None] * 4
    dist.all_gather_object(called, calls)
    assert Counter(itertools.chain(*called)) == {0: 1, 1: 1, 2: 1, 3: 4, 4: 1}
    assert h.map_whole_tensors(negate, []) == []


def _wrong_calls(rank: int) -> None:
    alone = DeviceMesh(DEVICE, [rank])
    tensor = cut(torch.ones(2, 2), alone, (Shard(0),))
    with pytest.raises(ValueError, match=f"rank {rank}: the result for tensor 0 is of shape"):
        h.map_whole_tensors(lambda i, whole: whole[:1], [tensor])
    with pytest.raises(ValueError, match="costs has 2 numbers for 1 tensors"):
        h.map_whole_tensors(lambda i, whole: whole, [tensor], costs=[1.0, 2.0])
    partial = DTensor.from_local(torch.ones(2, 2), mesh_of(4), (Partial(),))
    with pytest.raises(ValueError, match=r"tensor 0 of shape .* neither shards nor replicas"):
        h.map_whole_tensors(lambda i, whole: whole, [partial])
    elsewhere = DeviceMesh(DEVICE, [(rank + 1) % 4])
    tensor = DTensor.from_local(torch.ones(2, 2), elsewhere, (Shard(0),))
    with pytest.raises(ValueError, match=f"rank {rank} is not in a mesh on which it has tensors"):
        h.map_whole_tensors(lambda i, whole: whole, [tensor])


def _different_tensors(rank: int) -> None:
    """Other shapes, other orders, other numbers of tensors: an error on all ranks."""
    mesh = mesh_of(4)
    rows = [
        cut(torch.ones(4 + (rank == 3), 2), mesh, (Shard(0),)),
        cut(torch.ones(4, 3), mesh, (Shard(0),)),
    ]
    expected = r"tensor 0 of shape \(4, 2\) is there on rank 0 and not on rank 3"
    with pytest.raises(RuntimeError, match=expected):
        h.map_whole_tensors(lambda i, whole: whole, rows)
    with pytest.raises(RuntimeError, match=r"tensor 1 .* is there on rank 0 and not on rank 3"):
        h.map_whole_tensors(lambda i, whole: whole, rows[1:] * (1 if rank == 3 else 2))
    with pytest.raises(RuntimeError, match="ranks 0 to 3 have the same tensors and different"):
        h.map_whole_tensors(lambda i, whole: whole, rows[1:], costs=[float(rank)])


def test_functions_of_ones_own() -> None:
    run_checks(4, _own_function, _wrong_calls, _different_tensors)


def test_assignment() -> None:
    assert assign([1, 1, 5, 2, 2, 3], 2) == [1, 1, 0, 1, 0, 1]
    assert assign([], 3) == []
    generator = torch.Generator().manual_seed(0)
    for ranks in (1, 3, 8):
        costs = torch.randint(1, 100, (40,), generator=generator).tolist()
        loads = Counter()
        for cost, rank in zip(costs, assign(costs, ranks), strict=True):
            loads[rank] += cost
        least = max(max(costs), math.ceil(sum(costs) / ranks))
        assert max(loads.values()) <= 4 / 3 * least
        assert sum(loads.values()) == sum(costs)
