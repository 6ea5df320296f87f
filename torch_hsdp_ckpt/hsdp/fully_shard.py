"""``fully_shard``: torch FSDP2's interface on the same C++ core as ``FullyShardedDataParallel``.

The module stays itself: its class is exchanged for one that is an ``FSDPModule`` too, its names
stay as they are."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, cast, overload

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.tensor import Shard

from .. import _C
from ..common.gate import wait_at_gate
from .arguments import at, check_mesh, check_module, check_offload
from .materialize import move
from .precision import Precision
from .runner import Runner, named_runners, runner_of
from .state.module_load import load, own
from .unit import ShardedUnit, device_of, own_slots, reshard_policy

_classes: dict[type[nn.Module], type[nn.Module]] = {}


class UnshardHandle:
    """A gather that ``FSDPModule.unshard(async_op=True)`` has started."""

    def __init__(self, runner: Runner) -> None:
        self._runner: Runner | None = runner

    def wait(self) -> None:
        """The full parameters are usable on the current stream, and in the module, when this
        returns."""
        if self._runner is not None:
            self._runner.hold(wait=True)
            self._runner = None


class FSDPModule:
    """What ``fully_shard`` adds to a module. Methods with ``recurse`` also set the wrapped modules
    inside."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A new object of the original class: what slicing a container makes, say."""
        original: Any = cls.__mro__[2]
        made = original.__new__(original)
        made.__init__(*args, **kwargs)  # type: ignore[misc]
        return made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _runner(self).run(super().__call__, args, kwargs)  # type: ignore[misc]

    def unshard(self, async_op: bool = False) -> UnshardHandle | None:
        """Gathers this module's parameters (not those of wrapped modules inside) for a forward to
        come. Collective.

        With ``async_op`` returns a handle at once; forward waits by itself, ``wait()`` is for a use
        before it."""
        runner = _runner(self)
        if runner.root is None:
            runner.make_root()
        runner.hold(wait=not async_op)
        return UnshardHandle(runner) if async_op else None

    def reshard(self) -> None:
        """Frees this module's full parameters, if they are there, and puts the sharded ones into
        the module."""
        _runner(self).free()

    def set_requires_gradient_sync(
        self, requires_gradient_sync: bool, *, recurse: bool = True
    ) -> None:
        """Whether the next backwards reduce gradients, or keep them whole on this rank; the same on
        all ranks."""
        for unit in self._units(recurse):
            unit.core.sync = requires_gradient_sync
            unit.core.set_all_reduce(requires_gradient_sync)

    def set_requires_all_reduce(self, requires_all_reduce: bool, *, recurse: bool = True) -> None:
        """Whether the next backwards all-reduce over the replicas, or keep the sums over the shards
        for the next all-reduce."""
        for unit in self._units(recurse):
            unit.core.set_all_reduce(requires_all_reduce)

    def set_reshard_after_forward(self, reshard_after_forward: bool, recurse: bool = True) -> None:
        """Whether the full parameters are freed after forward and gathered again in backward, the
        outermost module's too."""
        for unit in self._units(recurse):
            unit.core.reshard_after_forward = reshard_policy(reshard_after_forward)

    def set_reshard_after_backward(
        self, reshard_after_backward: bool, *, recurse: bool = True
    ) -> None:
        """Whether the full parameters are freed after backward. If not, reshard before the
        parameters are changed."""
        for unit in self._units(recurse):
            unit.core.reshard_after_backward = reshard_after_backward

    def set_is_last_backward(self, is_last_backward: bool) -> None:
        """Whether the next backward is the last one before the gradients are used. If not, it does
        not wait for its last reductions: their gradients are there after the last one, or when the
        module next needs its sharded parameters.

        Of the outermost module and all inside; the same on all ranks.
        """
        runner = _runner(self)
        runner.last_backward = is_last_backward
        if runner.root is not None:
            runner.root.schedule.set_last_backward(is_last_backward)

    def set_modules_to_forward_prefetch(self, modules: "list[FSDPModule]") -> None:
        """Whose gathers this module's forward starts ahead, instead of the one that came next in
        the last forward."""
        _runner(self).unit.core.set_forward_prefetch([_runner(m).unit.core for m in modules])

    def set_modules_to_backward_prefetch(self, modules: "list[FSDPModule]") -> None:
        """Whose gathers this module's backward starts ahead, instead of the one that comes next in
        reverse forward order."""
        _runner(self).unit.core.set_backward_prefetch([_runner(m).unit.core for m in modules])

    def set_gradient_divide_factor(self, factor: float) -> None:
        """Divides the sum of this module's gradients over all ranks by ``factor`` instead of the
        number of ranks."""
        if factor <= 0:
            raise ValueError(f"a gradient divide factor is positive, not {factor}")
        _runner(self).unit.core.set_divide_factor(factor)

    def set_reduce_scatter_divide_factor(self, factor: float) -> None:
        """torch's older name of ``set_gradient_divide_factor``."""
        self.set_gradient_divide_factor(factor)

    def set_reduce_scatter_unused_params(
        self, reduce_scatter_unused_params: bool, *, recurse: bool = True
    ) -> None:
        """Changes nothing: parameters that a rank has not used always take part, with zeros."""

    def set_separate_reduce_scatter_group(
        self, enable: bool = True, *, recurse: bool = True
    ) -> None:
        """Changes nothing: reductions have groups of their own wherever those can be made."""

    def set_post_optim_event(self, event: Any) -> None:
        """``event``: recorded behind an optimizer step on another stream. What the current stream
        is given from here on waits for it; on the CPU there is nothing to wait for."""
        unit = _runner(self).unit
        if unit.device.type != "cpu":
            torch.get_device_module(unit.device.type).current_stream(unit.device).wait_event(event)

    def reset_iter_state(self) -> None:
        """Ends what a forward or backward that raised has left under way: the sharded parameters
        are in the module, gradients on their way are gone. The next forward does so by itself.
        RuntimeError inside of a forward or backward."""
        _runner(self).reset()

    def set_all_reduce_hook(
        self, hook: Callable[[torch.Tensor], None], *, stream: Any = None
    ) -> None:
        """``hook`` gets every all-reduced buffer of this module's averages (one dimension, the
        reduce dtype) and may change it in place. It runs on the stream of the reductions:
        ``stream`` has to be None (ValueError)."""
        if stream is not None:
            raise ValueError(
                "set_all_reduce_hook: a stream of one's own is not served; the hook runs on the "
                "reductions'"
            )
        _runner(self).unit.core.set_all_reduce_hook(hook)

    @own
    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Copies ``state_dict``, DTensors placed as the parameters are, into the shards
        (``assign``: takes them instead).

        Collective over the mesh, as FSDP2's is not: what does not fit on one rank is a RuntimeError
        on all of them that lists it, and the module is as it was. The rest is as in
        ``FullyShardedDataParallel.load_state_dict``. Whole tensors: ``set_model_state_dict`` with
        ``full_state_dict=True``."""
        wait_at_gate()
        for _, runner in named_runners(cast(nn.Module, self)):
            runner.reset()

        def as_nn_module_does(given: Mapping[str, Any]) -> Any:
            return super(FSDPModule, self).load_state_dict(given, strict=strict, assign=assign)  # type: ignore[misc]

        mesh = _runner(self).unit.mesh
        return load(
            cast(nn.Module, self), mesh, state_dict, strict, assign, False, "", as_nn_module_does
        )

    def _units(self, recurse: bool) -> Iterator[ShardedUnit]:
        own = _runner(self)
        for _, runner in named_runners(cast(nn.Module, self)) if recurse else [("", own)]:
            yield runner.unit

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``nn.Module``'s, of the sharded parameters, also where a backward that raised has left
        the full ones in place; and of gradients that wait for a backward that reduces them, which
        an optimizer's ``zero_grad`` does not know of."""
        _runner(self).drop_gradients()
        super().zero_grad(set_to_none)  # type: ignore[misc]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As ``nn.Module``'s, of the sharded parameters: no communication, no copy. From any
        thread: it waits for the others' forward or backward to end, and theirs for it."""
        with _runner(self).reading():
            return super().state_dict(*args, **kwargs)  # type: ignore[misc]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        _runner(self).apply_to_shards(lambda: super(FSDPModule, self)._apply(fn, recurse))  # type: ignore[misc]
        return self

    def __getstate__(self) -> Any:
        raise TypeError(
            "a module under fully_shard can't be copied or pickled: copy it before, or load its "
            "state_dict() into another one"
        )


# Settings of how torch's FSDP2 communicates and keeps memory, and what to do here instead.
_NOT_SERVED = {
    "set_custom_all_gather": "gathers are the core's own; leave it out",
    "set_custom_reduce_scatter": "reductions are the core's own; set_all_reduce_hook sees what they give",
    "set_allocate_memory_from_process_group_for_comm": "the core's buffers are torch's allocator's; leave it out",
    "set_symm_mem_for_comm": "the core's buffers are torch's allocator's; leave it out",
    "set_force_sum_reduction_for_comms": "NCCL averages on the way where it can; leave it out",
    "set_keep_unsharded_storage": "use set_reshard_after_forward(False) and set_reshard_after_backward(False)",
    "set_reduce_scatter_max_input_buffers": "two reductions are in flight; leave it out",
    "set_unshard_in_backward": "every module that backward reaches is gathered; leave it out, the numbers are the same",
    "set_manual_backward_finalization": "use set_is_last_backward(False) and (True)",
    "finalize_backward": "the last backward ends with all gradients taken; use set_is_last_backward",
}


def _refusal(name: str, instead: str) -> Callable[..., NoReturn]:
    def method(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{at(self)}{name} is not served: {instead}")

    method.__name__ = name
    method.__doc__ = f"Not served: NotImplementedError. Instead: {instead}."
    return method


for _name, _instead in _NOT_SERVED.items():
    setattr(FSDPModule, _name, _refusal(_name, _instead))


def _runner(module: Any) -> Runner:
    runner = runner_of(module)
    if runner is None:
        raise ValueError(
            f"a {type(module).__name__} that fully_shard has not been applied to has no such "
            "settings"
        )
    return runner


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

    ``module``: or a list of modules, which become one unit. ``mesh``: 1-D (shards) or 2-D
    (replicas, shards); None: all ranks. ``reshard_after_forward``: None frees after forward except
    for what backward needs first: the outermost module and the last one to run. ``mp_policy``,
    ``offload_policy`` (served on a CPU mesh, where it changes nothing), ``ignored_params``: as
    torch's. ``shard_placement_fn``: may only name dimension 0. ``dp_mesh_dims`` has to be None.

    Returns what was given; each module now is an ``FSDPModule`` too. Raises ValueError for what is
    not served, naming what to use instead, and for parameters that can't be sharded (see
    ``FullyShardedDataParallel``)."""
    modules = list(module) if isinstance(module, (list, tuple)) else [module]
    if not modules:
        raise ValueError("fully_shard: the list of modules is empty")
    for each in modules:
        check_module(each, "fully_shard")
        if runner_of(each) is not None:
            raise ValueError(f"{at(each)}fully_shard has been applied to it already")
    if isinstance(reshard_after_forward, int) and not isinstance(reshard_after_forward, bool):
        raise ValueError(
            f"{at(*modules)}reshard_after_forward={reshard_after_forward}, to fewer ranks, is not "
            "served: pass True or False, "
            "or use a mesh with smaller shard groups"
        )
    if dp_mesh_dims is not None:
        raise ValueError(
            f"{at(*modules)}dp_mesh_dims, for parameters that are DTensors on a larger mesh, is "
            "not served: pass the part of "
            "the mesh that holds the replicas and shards, mesh['replicate', 'shard'], as mesh"
        )
    precision = Precision.of(mp_policy, *modules)
    ignored = set(ignored_params or ())
    if mesh is None:
        kind = (
            "cuda"
            if torch.cuda.is_available() and "nccl" in str(dist.get_backend_config())
            else "cpu"
        )
        mesh = init_device_mesh(kind, (dist.get_world_size(),), mesh_dim_names=("shard",))
    check_mesh(mesh, *modules)
    check_offload(isinstance(offload_policy, CPUOffloadPolicy), mesh, *modules)
    device = device_of(mesh, None)
    slots = own_slots(modules, ignored)
    for name, places in slots:
        parameter = places[0].module._parameters[places[0].name]
        placement = (
            shard_placement_fn(parameter)
            if shard_placement_fn is not None and parameter is not None
            else None
        )
        if placement is not None and placement != Shard(0):
            raise ValueError(
                f"{at(*modules)}shard_placement_fn places {name} as {placement}: only dimension 0 "
                "of the unit's mesh is served"
            )
    for each in modules:
        if device.type != "cpu":
            move(each, device)
    unit = ShardedUnit(
        slots, mesh, device, reshard_policy(reshard_after_forward), precision.of_unit()
    )
    label = ", ".join(type(each).__name__ for each in modules)
    runner = Runner(modules[0], unit, _C.BackwardPrefetch.PRE, precision, label)
    for each in modules[1:]:
        runner.add(each)
    for each in modules:
        _become(each, runner)
    return module


def _become(module: nn.Module, runner: Runner) -> None:
    original = type(module)
    if original not in _classes:
        _classes[original] = type(
            f"FSDP{original.__name__}", (FSDPModule, original), {"__module__": original.__module__}
        )
    module.__class__ = _classes[original]
    module.__dict__["_unit"] = runner.unit  # where the optimizer's state looks for meshes

    @own
    def before_load(*_: Any) -> None:
        # Also where load_state_dict above has done so: a module around this one, or a user's hook,
        # may come in between.
        wait_at_gate()
        runner.reset()

    @own
    def after(*_: Any) -> None:
        runner.unit.rebind()

    module.register_load_state_dict_pre_hook(before_load)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_post_hook(after)  # type: ignore[no-untyped-call]


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
