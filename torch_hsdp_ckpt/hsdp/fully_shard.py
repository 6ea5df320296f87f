"""``fully_shard``: torch FSDP2's interface on the same C++ core as ``FullyShardedDataParallel``.

The module stays itself: its class is exchanged for one that is an ``FSDPModule`` too, its names
stay as they are."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, overload

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.tensor import Shard

from .. import _C
from ..common.gate import wait_at_gate
from .arguments import NotSupportedError, at, check_module
from .backward_end import GradientReductionHandle
from .data_parallel import DataParallel, data_parallel_of
from .fsdp_module import FSDPModule, UnshardHandle, fsdp_runner
from .materialize import move
from .meshes import device_of, mesh_of_all_ranks
from .precision import Precision
from .runner import Runner, runner_of
from .sharding import Place, UnitSettings, empty_unit, refusal, shard
from .slots import RegisteredParameter, parameters_of_unit
from .state.module_entries import checks_first
from .torchs_view import CommContext, register, state_of

# A process has each class once, and so the one that is made from it: ``type(a) is type(b)`` holds
# for two modules of a class after ``fully_shard`` as before it.
_fsdp_classes: dict[type[nn.Module], type[nn.Module]] = {}

__all__ = [
    "FSDPModule",
    "GradientReductionHandle",
    "UnshardHandle",
    "fully_shard",
    "register_fsdp_forward_method",
    "share_comm_ctx",
]


@overload
def fully_shard(
    module: nn.Module,
    *,
    mesh: DeviceMesh | None = ...,
    reshard_after_forward: bool | int | None = ...,
    shard_placement_fn: Callable[[nn.Parameter], Any] | None = ...,
    mp_policy: MixedPrecisionPolicy = ...,
    offload_policy: OffloadPolicy = ...,
    ignored_params: set[nn.Parameter] | None = ...,
    dp_mesh_dims: Any = ...,
) -> FSDPModule: ...


@overload
def fully_shard(
    module: list[nn.Module],
    *,
    mesh: DeviceMesh | None = ...,
    reshard_after_forward: bool | int | None = ...,
    shard_placement_fn: Callable[[nn.Parameter], Any] | None = ...,
    mp_policy: MixedPrecisionPolicy = ...,
    offload_policy: OffloadPolicy = ...,
    ignored_params: set[nn.Parameter] | None = ...,
    dp_mesh_dims: Any = ...,
) -> list[FSDPModule]: ...


def fully_shard(
    module: nn.Module | list[nn.Module],
    *,
    mesh: DeviceMesh | None = None,
    reshard_after_forward: bool | int | None = None,
    shard_placement_fn: Callable[[nn.Parameter], Any] | None = None,
    mp_policy: MixedPrecisionPolicy | None = None,
    offload_policy: OffloadPolicy | None = None,
    ignored_params: set[nn.Parameter] | None = None,
    dp_mesh_dims: Any = None,
) -> Any:
    """Shards ``module``'s parameters in place, those of ``fully_shard`` modules inside excepted.
    torch FSDP2's function.

    ``module``: or a list of modules, which become one unit; parameters on other meshes or with
    other placements are units of their own within it. ``mesh``: 1-D (shards) or 2-D (replicas,
    shards), a part of a larger one where parameters are DTensors on its other dimensions (tensor or
    expert parallelism); None: all ranks. ``dp_mesh_dims``: torch's ``DataParallelMeshDims``: which
    dimensions of ``mesh``, on all of which parameters are DTensors, these are.

    ``reshard_after_forward``: True frees full parameters after forward; False keeps them; a number
    that divides the shards keeps them cut among as many neighbouring ranks, of which backward
    gathers them; None frees except for what backward needs first: the outermost module and the last
    one to run.
    ``shard_placement_fn``: of a parameter, the ``Shard(dim)`` that cuts it (None: ``Shard(0)``),
    evenly but for dimension 0, or a ``ShardPlacementResult`` with a mesh of its own. ``mp_policy``,
    ``offload_policy``, ``ignored_params``: as torch's.

    On the meta device the sharded parameters are DTensors without values: ``to_empty`` and the
    modules' own initialisation, or ``load_state_dict(assign=True)``, come before the first forward.

    Returns what was given; each module now is an ``FSDPModule`` too. Raises ValueError for what is
    not supported, naming what to use instead, and for parameters that can't be sharded (see
    ``FullyShardedDataParallel``)."""
    modules = list(module) if isinstance(module, (list, tuple)) else [module]
    _check_modules(modules)
    precision = Precision.of(mp_policy, *modules)
    if mesh is None:
        mesh = mesh_of_all_ranks()
    data_parallel = data_parallel_of(mesh, dp_mesh_dims, *modules)
    device = device_of(mesh, None)
    registered = parameters_of_unit(modules, set(ignored_params or ()))
    places = [_place(each, shard_placement_fn, data_parallel) for each in registered]
    if device.type != "cpu":
        for each in modules:
            move(each, device)
    reshard = _reshard_after_forward(reshard_after_forward, data_parallel.mesh, modules)
    settings = UnitSettings(device, reshard, precision, _memory_of(offload_policy))
    units = shard(registered, places, settings) or [empty_unit(data_parallel, settings)]
    label = ", ".join(type(each).__name__ for each in modules)
    runner = Runner(modules[0], units, _C.BackwardPrefetch.PRE, precision, label)
    for each in modules[1:]:
        runner.add(each)
    for each in modules:
        _make_fsdp_module(each, runner)
    register(modules, runner)
    return module


def _check_modules(modules: Sequence[nn.Module]) -> None:
    if not modules:
        raise ValueError("fully_shard: the list of modules is empty")
    for module in modules:
        check_module(module, "fully_shard")
        if runner_of(module) is not None:
            raise ValueError(f"{at(module)}fully_shard has been applied to it already")


def _reshard_after_forward(
    given: bool | int | None, mesh: DeviceMesh, modules: Sequence[nn.Module]
) -> bool | int | None:
    """A number of ranks that is neither one nor all; else what torch takes it for."""
    if given is None or isinstance(given, bool):
        return given
    shards = mesh.size(mesh.ndim - 1)
    if not isinstance(given, int) or given < 1 or shards % given:
        raise NotSupportedError(
            f"{at(*modules)}reshard_after_forward={given!r} is neither True, False nor None, and "
            f"as a number of ranks it has to divide the {shards} shards; {mesh}"
        )
    if given == 1 and shards > 1:
        warnings.warn(
            f"{at(*modules)}reshard_after_forward=1 keeps the parameters whole on each rank, as "
            "False does; True frees them",
            stacklevel=3,
        )
    if given in (1, shards):
        return given != 1
    return given


def _memory_of(policy: OffloadPolicy | None) -> _C.ShardMemory:
    if not isinstance(policy, CPUOffloadPolicy):
        return _C.ShardMemory.DEVICE
    return _C.ShardMemory.PINNED if policy.pin_memory else _C.ShardMemory.HOST


def _place(
    registered: RegisteredParameter,
    shard_placement_fn: Callable[[nn.Parameter], Any] | None,
    default: DataParallel,
) -> Place:
    placement: Any = shard_placement_fn(registered.parameter) if shard_placement_fn else None
    data_parallel = default
    info = getattr(placement, "mesh_info", None)  # torch 2.15's ShardPlacementResult has one
    if info is not None:
        mesh, dims = info.mesh, info.dp_mesh_dims
        module = registered.slots[0].module
        data_parallel = data_parallel_of(mesh if dims is None else info.spmd_mesh, dims, module)
        placement = placement.placement
    if placement is None:
        return Place(data_parallel)
    if not isinstance(placement, Shard):
        problem = f"is to be placed as {placement} by shard_placement_fn, which gives a Shard"
        raise refusal(registered, problem)
    return Place(data_parallel, placement.dim)


def _fsdp_class_of(original: type[nn.Module]) -> type[nn.Module]:
    if original not in _fsdp_classes:
        bases, namespace = (FSDPModule, original), {"__module__": original.__module__}
        _fsdp_classes[original] = type(f"FSDP{original.__name__}", bases, namespace)
    return _fsdp_classes[original]


def _make_fsdp_module(module: nn.Module, runner: Runner) -> None:
    """Gives ``module`` the methods of ``FSDPModule``, and hooks around a load of its state dict."""
    module.__class__ = _fsdp_class_of(type(module))
    module.__dict__["_unit"] = runner.units[0]  # where the optimizer's state looks

    @checks_first
    def before_load(*_: Any) -> None:
        # load_state_dict has done so too. But a module around this one, or a user's hook, may have
        # come in between.
        wait_at_gate()
        runner.reset()

    @checks_first
    def after_load(*_: Any) -> None:
        runner.rebind()

    module.register_load_state_dict_pre_hook(before_load)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_post_hook(after_load)  # type: ignore[no-untyped-call]


def register_fsdp_forward_method(module: nn.Module, method_name: str) -> None:
    """Makes ``module.method_name`` gather before and free after, as forward does. No effect on
    modules without fully_shard.

    Raises ValueError if there is no such method.
    """
    runner = runner_of(module)
    if runner is None:
        return
    method = getattr(module, method_name, None)
    if method is None:
        raise ValueError(f"{type(module).__name__} has no method {method_name}")

    @functools.wraps(method)
    def forward_method(*args: Any, **kwargs: Any) -> Any:
        return runner.run(method, args, kwargs)

    setattr(module, method_name, forward_method)


def share_comm_ctx(modules: list[FSDPModule]) -> None:
    """torch's function for models of one process, pipeline stages say, that share their streams.
    Here all models do, on each device: this is only remembered, for torch's pipelining."""
    context = CommContext()
    for module in modules:
        state_of(fsdp_runner(module)).share(context)
