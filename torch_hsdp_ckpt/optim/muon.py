"""``torch.optim.Muon`` over sharded matrices, each of which is orthogonalised on one rank only."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._compile import _disable_dynamo
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz, muon
from torch.optim.optimizer import _to_scalar

from ..common.tensors import local_of
from .plan import Plan
from .rounds import run_rounds
from .whole_tensors import ROUND_BYTES, Given, agreed_plan

# What torch's Newton-Schulz iteration casts its input to, and gives back.
_UPDATE_DTYPE = torch.bfloat16

# Those of a group that torch's function takes.
_OPTIONS = (
    "lr",
    "weight_decay",
    "momentum",
    "nesterov",
    "ns_coefficients",
    "eps",
    "ns_steps",
    "adjust_lr_fn",
)


class Muon(torch.optim.Muon):
    """torch's ``Muon``, whose step makes each sharded matrix whole on one rank, orthogonalises it
    there, and gives each rank its part of the update. The arguments, parameter groups and state
    (``momentum_buffer``, placed as its parameter is) are torch's, and state dicts and checkpoints
    of either class are the other's too.

    torch's own step on DTensors communicates within each of the iteration's matrix products. Here
    the matrices are dealt out to all ranks of their mesh, replicas included, evenly by the
    products' operations, and travel once each way, in bfloat16, which the iteration computes in
    (see ``map_whole_tensors``, which does this for other optimizers).

    Parameters: matrices that are DTensors, placed ``Shard``, ``_StridedShard`` or ``Replicate`` on
    any meshes (FSDP, HSDP, tensor parallelism with either), evenly or not, of this package's
    wrappers or torch's; plain ones are stepped by each rank, as by torch. Given equal gradients,
    the numbers are those of ``torch.optim.Muon`` in one process, for float32 parameters on CPUs to
    the last bit (in bfloat16 kernels round the end of a tensor in another way). Those of torch's
    own on DTensors differ by the order of its sums.

    ``round_bytes``: of whole matrices that a rank orthogonalises in a round (the class's attribute,
    which instances may set; 64 MiB). A rank holds six times that at the most, besides its own parts
    of a round's updates and what the iteration takes for one matrix.

    ``step`` is collective over the meshes. Ranks of which only some have a gradient for a matrix
    get a RuntimeError that names it, all of them, before anything changes; a parameter that is no
    matrix, or whose momentum is not placed as it is, is a ValueError on all of them.

    Source: K. Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024, in torch's
    own functions."""

    round_bytes: int = ROUND_BYTES

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs a single optimization step; torch's."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _step(self)
        return loss


@dataclass(frozen=True)
class _Matrix:
    """A sharded parameter that has a gradient, with this rank's parts of it, of the gradient and of
    the momentum. ``options``: its group's."""

    parameter: DTensor
    local: torch.Tensor
    gradient: torch.Tensor
    momentum: torch.Tensor
    options: dict[str, Any]


@_disable_dynamo  # ranks' collectives have to meet, whatever a graph would make of them
def _step(optimizer: Muon) -> None:
    plans = _agreed_plans(optimizer)
    by_mesh: dict[DeviceMesh, list[_Matrix]] = {mesh: [] for mesh in plans}
    for group in optimizer.param_groups:
        for matrix in _step_plain(optimizer, group):
            by_mesh[matrix.parameter.device_mesh].append(matrix)
    for mesh, matrices in by_mesh.items():
        for matrix in matrices:
            matrix.momentum.lerp_(matrix.gradient, 1 - matrix.options["momentum"])
        if matrices:
            work = _Orthogonalisation(matrices)
            run_rounds(mesh, plans[mesh], work, matrices[0].local.device)


def _agreed_plans(optimizer: Muon) -> dict[DeviceMesh, Plan]:
    """By mesh, what is to be done with its matrices that have gradients. Meshes of which none has
    one are among them: another rank may have one there."""
    given: dict[DeviceMesh, list[Given]] = {}
    problems: dict[DeviceMesh, str] = {}
    for number, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            if not isinstance(parameter, DTensor):
                continue
            mesh = parameter.device_mesh
            on_mesh = given.setdefault(mesh, [])
            if parameter.grad is None:
                continue
            name = _name(group, number, position)
            problem = _why_no_step(parameter, optimizer.state.get(parameter, {}))
            if problem:
                problems.setdefault(mesh, f"rank {dist.get_rank()}: {name} {problem}")
            else:
                on_mesh.append(Given(name, parameter, _operations(parameter, group)))
    return {
        mesh: agreed_plan(mesh, _UPDATE_DTYPE, each, optimizer.round_bytes, problems.get(mesh, ""))
        for mesh, each in given.items()
    }


def _name(group: dict[str, Any], number: int, position: int) -> str:
    names = group.get("param_names")
    return str(names[position]) if names else f"parameter {position} of group {number}"


def _why_no_step(parameter: DTensor, state: dict[str, Any]) -> str:
    """What a step can't take of a sharded parameter that has a gradient; "" if it can."""
    if parameter.ndim != 2:
        return f"of shape {tuple(parameter.shape)} is no matrix, which is what Muon is for"
    gradient, momentum = parameter.grad, state.get("momentum_buffer", parameter)
    if not isinstance(gradient, DTensor) or gradient.device_mesh != parameter.device_mesh:
        return "has a gradient that is no DTensor on its mesh"
    if not isinstance(momentum, DTensor) or (momentum.device_mesh, momentum.placements) != (
        parameter.device_mesh,
        parameter.placements,
    ):
        return (
            "has a momentum_buffer that is not placed as the parameter is: load it by torch's "
            "set_optimizer_state_dict, or distribute it"
        )
    return ""


def _operations(parameter: torch.Tensor, group: dict[str, Any]) -> float:
    """Multiplications and additions of the iteration, for m x n with m <= n: X X^T and the product
    with X take 2 m^2 n each, the square of the m x m matrix between them 2 m^3."""
    m, n = sorted(parameter.shape)
    return float(group["ns_steps"] * (4 * m * m * n + 2 * m**3))


def _place_gradients(parameters: Iterable[Any]) -> None:
    """As the parameters are placed."""
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, DTensor) and gradient.placements != parameter.placements:
            parameter.grad = gradient.redistribute(placements=parameter.placements)


def _step_plain(optimizer: Muon, group: dict[str, Any]) -> list[_Matrix]:
    """Makes torch's step with the group's plain parameters; returns the sharded ones."""
    _place_gradients(group["params"])
    parameters: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []
    momenta: list[torch.Tensor] = []
    has_complex = optimizer._init_group(group, parameters, gradients, momenta)
    found = list(zip(parameters, gradients, momenta, strict=True))
    plain = [each for each in found if not isinstance(each[0], DTensor)]
    options = {key: group[key] for key in _OPTIONS}
    lists = [list(each) for each in zip(*plain, strict=True)] or [[], [], []]
    muon(*lists, has_complex=has_complex, **options)
    return [
        _Matrix(parameter, local_of(parameter), local_of(gradient), local_of(momentum), group)
        for parameter, gradient, momentum in found
        if isinstance(parameter, DTensor)
    ]


@dataclass(frozen=True)
class _Orthogonalisation:
    """The work of a step on the matrices of one mesh, whose momenta are those of this step."""

    matrices: Sequence[_Matrix]

    def local(self, tensor: int) -> torch.Tensor:
        """This rank's part of what is to be orthogonalised: a copy, as torch 2.11 changes it."""
        matrix = self.matrices[tensor]
        if not matrix.options["nesterov"]:
            return matrix.momentum.to(_UPDATE_DTYPE, copy=True)
        ahead = matrix.gradient.lerp(matrix.momentum, matrix.options["momentum"])
        return ahead.to(_UPDATE_DTYPE)

    def compute(self, tensor: int, whole: torch.Tensor) -> torch.Tensor:
        options = self.matrices[tensor].options
        return _zeropower_via_newtonschulz(
            whole, options["ns_coefficients"], options["ns_steps"], options["eps"]
        )

    def store(self, tensor: int, local: torch.Tensor) -> None:
        matrix = self.matrices[tensor]
        options, whole_shape = matrix.options, matrix.parameter.shape
        lr = _to_scalar(options["lr"])
        adjusted = _adjust_lr(lr, options["adjust_lr_fn"], whole_shape)
        matrix.local.mul_(1 - lr * options["weight_decay"])
        matrix.local.add_(local, alpha=-adjusted)
        # Autograd looks at the DTensor's own counter.
        torch.autograd.graph.increment_version(matrix.parameter)
