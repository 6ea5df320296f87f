"""Work on whole tensors whose parts lie on many ranks: each tensor becomes whole on one rank, once.

Optimizers that treat a matrix as a whole (Muon, Shampoo, SOAP) would gather every matrix on every
rank, or gather again for every product. Here the ranks share the matrices out among them."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..common.tensors import dtensor_around, local_of
from .agree import check_same_on_all_ranks
from .layout import layout_of
from .plan import Plan, plan_for
from .rounds import run_rounds

ROUND_BYTES = 64 << 20


@torch.no_grad()
def map_whole_tensors(
    function: Callable[[int, torch.Tensor], torch.Tensor],
    tensors: Sequence[torch.Tensor],
    costs: Sequence[float] | None = None,
    round_bytes: int = ROUND_BYTES,
) -> list[torch.Tensor]:
    """``function(i, whole)`` of each of ``tensors``, called for a DTensor on one rank only, which
    has it whole.

    ``tensors``: DTensors of any number of dimensions, placed ``Shard``, ``_StridedShard`` or
    ``Replicate`` on any meshes, evenly or not; the same ones in the same order on all ranks of
    their meshes. Of a plain tensor each rank calls the function itself. ``function``: its result
    has the shape and dtype of ``whole``, which it must not change in place. ``costs``: of each
    call, in any unit; by default the number of elements times the smallest dimension, as of a
    product of matrices. Each tensor goes to one of all ranks of its mesh, replicas included, evenly
    by cost: the most costly one first, to whoever has the least to do. As long as shapes,
    placements and costs are the same it is the same rank, and what ``function`` keeps of a tensor
    (Shampoo's preconditioner, say) stays there.

    Parts travel in the tensor's dtype, to the owner along the mesh dimensions that the tensor is
    cut over, and back; then replicas give each other the parts that they hold. That is one
    collective for a round, a mesh dimension and a way, for all tensors of a mesh and dtype, on the
    mesh's own groups. ``round_bytes`` bounds what a rank has whole in a round (a larger tensor has
    a round of its own). The next round's parts come in while one is computed, and those of the last
    one go out: a rank holds six times that at the most, besides its own parts of the results and
    what ``function`` takes.

    Returns new tensors, placed as the given ones. Collective over the meshes. ValueError for other
    placements, and RuntimeError where ranks come with different tensors, on all ranks, before
    anything is sent. An error that ``function`` raises is its rank's alone: the peers wait for that
    rank until the group's timeout, as in any collective.

    >>> def orthogonalized(i, matrix):  # the nearest orthogonal matrix, by SVD
    ...     u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    ...     return u @ vh
    >>> updates = map_whole_tensors(orthogonalized, [p.grad for p in matrices])
    """
    costs = [_cost(each) for each in tensors] if costs is None else list(costs)
    if len(costs) != len(tensors):
        raise ValueError(f"costs has {len(costs)} numbers for {len(tensors)} tensors")
    results: list[torch.Tensor | None] = [None] * len(tensors)
    by_kind: dict[tuple[DeviceMesh, torch.dtype], dict[int, DTensor]] = {}
    for i, tensor in enumerate(tensors):
        if isinstance(tensor, DTensor):
            by_kind.setdefault((tensor.device_mesh, tensor.dtype), {})[i] = tensor
        else:
            results[i] = function(i, tensor)
    plans = []
    for (mesh, dtype), cut in by_kind.items():
        given = [Given(f"tensor {i}", tensor, costs[i]) for i, tensor in cut.items()]
        plans.append(agreed_plan(mesh, dtype, given, round_bytes))
    for plan, ((mesh, _), cut) in zip(plans, by_kind.items(), strict=True):
        work = _Mapping(function, list(cut), list(cut.values()), results)
        run_rounds(mesh, plan, work, work.local(0).device)
    return [each for each in results if each is not None]


def _cost(tensor: torch.Tensor) -> float:
    return float(tensor.numel() * min(tensor.shape, default=1))


@dataclass(frozen=True)
class _Mapping:
    """The work of ``map_whole_tensors`` on the tensors of one mesh and dtype."""

    function: Callable[[int, torch.Tensor], torch.Tensor]
    numbers: Sequence[int]  # the tensors' positions among all
    tensors: Sequence[DTensor]
    results: list[torch.Tensor | None]

    def local(self, tensor: int) -> torch.Tensor:
        return local_of(self.tensors[tensor]).detach()

    def compute(self, tensor: int, whole: torch.Tensor) -> torch.Tensor:
        return self.function(self.numbers[tensor], whole)

    def store(self, tensor: int, local: torch.Tensor) -> None:
        spec = self.tensors[tensor]._spec
        own = local.clone(memory_format=torch.contiguous_format)
        self.results[self.numbers[tensor]] = dtensor_around(own, spec)


@dataclass(frozen=True)
class Given:
    """A tensor that is to become whole. ``name``: what it is called in errors, and by which the
    ranks know that they mean the same."""

    name: str
    tensor: DTensor
    cost: float

    def __str__(self) -> str:
        return f"{self.name} of shape {tuple(self.tensor.shape)}"


def agreed_plan(
    mesh: DeviceMesh,
    dtype: torch.dtype,
    given: Sequence[Given],
    round_bytes: int,
    problem: str = "",
) -> Plan:
    """The plan for tensors on ``mesh`` that travel as ``dtype``, if all its ranks make the same one
    and none has a ``problem``; see ``check_same_on_all_ranks``. Collective over the mesh."""
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(
            f"rank {dist.get_rank()} is not in a mesh on which it has tensors that are to become "
            f"whole: {mesh}"
        )
    place = tuple(coordinate)
    layouts = []
    for each in given:
        try:
            layouts.append(layout_of(each.tensor, dtype))
        except ValueError as error:
            problem = problem or f"rank {dist.get_rank()}: {each.name} {error}"
    costs = () if problem else tuple(each.cost for each in given)
    plan = plan_for(() if problem else tuple(layouts), costs, place, round_bytes)
    names = "\n".join(each.name for each in given)
    digest = hashlib.blake2b(names.encode() + plan.digest, digest_size=16).digest()
    check_same_on_all_ranks(mesh, digest, lambda: [str(each) for each in given], problem)
    return plan
