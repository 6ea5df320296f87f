"""``FSDPModule``: the methods that ``fully_shard`` adds to a module, torch FSDP2's."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
import torch.distributed.fsdp as torchs
from torch import nn

from .. import _C
from ..common.gate import wait_at_gate
from .arguments import at
from .backward_end import (
    GradientReductionHandle,
    finalize_backward,
    set_manual_finalization,
)
from .comms import UnitComm, allocator_of, on_stream, symmetric_memory
from .communication import UnitCommunication
from .runner import Runner, named_runners, runner_of
from .state.module_entries import checks_first
from .state.module_in import load
from .state.module_plan import LoadRequest
from .torchs_view import FSDPState, refuse_torchs, state_of
from .unit import ShardedUnit, mesh_of_state


class UnshardHandle(torchs.UnshardHandle):
    """A gather that ``FSDPModule.unshard(async_op=True)`` has started."""

    def __init__(self, runner: Runner) -> None:
        self._runner: Runner | None = runner

    def wait(self) -> None:
        """The full parameters are usable on the current stream, and in the module, when this
        returns."""
        if self._runner is not None:
            self._runner.unshard()
            self._runner = None


def _original(module: "FSDPModule") -> Any:
    """``module`` as the class that it had before: past torch's methods, which want a state of
    torch's."""
    return super(torchs.FSDPModule, module)


class FSDPModule(torchs.FSDPModule):
    """What ``fully_shard`` adds to a module: torch's methods on the C++ core, and so that torch and
    the frameworks know it by ``isinstance``. Methods with ``recurse`` also set the wrapped modules
    inside."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A new object of the original class: what slicing a container makes, say."""
        original: Any = cls.__mro__[cls.__mro__.index(torchs.FSDPModule) + 1]
        made = original.__new__(original)
        made.__init__(*args, **kwargs)
        return made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        runner = fsdp_runner(self)
        outputs = runner.run(_original(self).__call__, args, kwargs)
        runner.show_kept()
        return outputs

    def _get_fsdp_state(self) -> FSDPState:  # type: ignore[override]
        return state_of(fsdp_runner(self))

    def unshard(self, async_op: bool = False) -> UnshardHandle | None:
        """Gathers this module's parameters (not those of wrapped modules inside) for a forward to
        come. Collective.

        With ``async_op`` returns a handle at once; forward waits by itself, ``wait()`` is for a use
        before it."""
        runner = fsdp_runner(self)
        if not async_op:
            runner.unshard()
            return None
        runner.start_unshard()
        return UnshardHandle(runner)

    def reshard(self) -> None:
        """Frees this module's full parameters, if they are there, and puts the sharded ones into
        the module."""
        fsdp_runner(self).free()

    def set_requires_gradient_sync(
        self, requires_gradient_sync: bool, *, recurse: bool = True
    ) -> None:
        """Sets whether the next backwards reduce gradients, or keep them whole on this rank; the
        same on all ranks."""
        for unit in self._units(recurse):
            unit.core.sync = requires_gradient_sync
            unit.core.set_all_reduce(requires_gradient_sync)

    def set_requires_all_reduce(self, requires_all_reduce: bool, *, recurse: bool = True) -> None:
        """Sets whether the next backwards all-reduce over the replicas, or keep the sums over the
        shards for the next all-reduce."""
        for unit in self._units(recurse):
            unit.core.set_all_reduce(requires_all_reduce)

    def set_reshard_after_forward(self, reshard_after_forward: bool, recurse: bool = True) -> None:
        """Sets whether the full parameters are freed after forward and gathered again in backward,
        the outermost module's too. Where they are kept the module shows them until backward or
        ``reshard()``."""
        for unit in self._units(recurse):
            unit.communication.set_reshard_after_forward(reshard_after_forward)

    def set_reshard_after_backward(
        self, reshard_after_backward: bool, *, recurse: bool = True
    ) -> None:
        """Sets whether the full parameters are freed after backward. If not, reshard before the
        parameters are changed."""
        for unit in self._units(recurse):
            unit.core.reshard_after_backward = reshard_after_backward

    def set_unshard_in_backward(self, unshard_in_backward: bool) -> None:
        """Sets whether this module's parameters are gathered for its backward. False is for one
        whose gradients do not take their values, an embedding say: another one's backward raises
        that they have no memory, if its forward has freed them."""
        for core in _cores([self]):
            core.unshard_in_backward = unshard_in_backward

    def set_is_last_backward(self, is_last_backward: bool) -> None:
        """Says whether the next backward is the last one before the gradients are used. If not, it
        does not wait for its last reductions: their gradients are there after the last one, or when
        the module next needs its sharded parameters.

        It is a setting of the outermost module and all inside, and the same on all ranks.
        """
        runner = fsdp_runner(self)
        runner.backward_end.is_last = is_last_backward
        if (root := runner.root) is not None:
            root.tell_backward_end()

    def set_manual_backward_finalization(self, enabled: bool) -> None:
        """Says whether the next backwards end by :meth:`finalize_backward`. It is a setting of the
        outermost module, and comes before :meth:`set_is_last_backward`. RuntimeError on a module
        inside, within a forward or backward, and where it would change while backwards wait for
        their end."""
        runner = fsdp_runner(self)
        if (root := runner.root) is not None and root.units[0] is not runner.units[0]:
            raise RuntimeError(
                f"{at(cast(nn.Module, self))}set_manual_backward_finalization is for the "
                f"outermost module, {root.units[0].core.name}"
            )
        set_manual_finalization(root, runner.backward_end, enabled)

    def finalize_backward(  # type: ignore[override]
        self, *, async_op: bool = False
    ) -> GradientReductionHandle | None:
        """After all backwards of a step: reduces what those without gradient synchronisation have
        kept, if it is enabled now, and frees the full parameters that they were to keep.
        Collective. Nothing before the first forward.

        With ``async_op`` returns a handle at once, whose ``wait()`` comes before the gradients are
        used. RuntimeError within a forward or backward, and before the last handle was waited
        for."""
        return finalize_backward(fsdp_runner(self).root, async_op)

    def set_modules_to_forward_prefetch(self, modules: list[torchs.FSDPModule]) -> None:
        """This module's forward starts the gathers of ``modules`` ahead, instead of the one that
        came next in the last forward."""
        ahead = _cores(modules)
        for core in _cores([self]):
            core.set_forward_prefetch(ahead)

    def set_modules_to_backward_prefetch(self, modules: list[torchs.FSDPModule]) -> None:
        """This module's backward starts the gathers of ``modules`` ahead, instead of the one that
        comes next in reverse forward order."""
        ahead = _cores(modules)
        for core in _cores([self]):
            core.set_backward_prefetch(ahead)

    def set_gradient_divide_factor(self, factor: float) -> None:
        """Divides the sum of this module's gradients over all ranks by ``factor`` instead of the
        number of ranks."""
        if factor <= 0:
            raise ValueError(f"a gradient divide factor is positive, not {factor}")
        for core in _cores([self]):
            core.set_divide_factor(factor)

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

    def _set_unshard_async_op(self, async_op: bool) -> None:
        """Changes nothing: gathers always take their memory from the compute stream."""

    def set_post_optim_event(self, event: Any) -> None:
        """``event``: recorded behind an optimizer step on another stream. What the current stream
        is given from here on waits for it; None, and any on the CPU, is nothing to wait for."""
        unit = fsdp_runner(self).units[0]
        if event is not None and unit.device.type != "cpu":
            torch.get_device_module(unit.device.type).current_stream(unit.device).wait_event(event)

    def reset_iter_state(self) -> None:
        """Ends what a forward or backward that raised has left under way: the sharded parameters
        are in the module, gradients on their way are gone. The next forward does so by itself.
        RuntimeError inside of a forward or backward."""
        runner = fsdp_runner(self)
        root = runner.root
        pending = root.pending_reduction if root is not None else None
        runner.reset()
        if pending is not None:
            pending.was_reset = True

    def set_all_reduce_hook(
        self, hook: Callable[[torch.Tensor], None], *, stream: Any = None
    ) -> None:
        """``hook`` gets every all-reduced buffer of this module's averages (one dimension, the
        reduce dtype) and may change it in place. It runs on the stream of the reductions, or on
        ``stream``, which these wait for: only on meshes without replicas, as with torch, and on
        devices (ValueError)."""
        for unit in fsdp_runner(self).units:
            if stream is not None and (unit.mesh.ndim == 2 or unit.device.type == "cpu"):
                raise ValueError(
                    f"{at(cast(nn.Module, self))}set_all_reduce_hook: a stream of the hook's own "
                    f"goes with a mesh of shards alone, on a device; {unit.mesh}"
                )
        on_its_stream = hook if stream is None else on_stream(hook, stream)
        for unit in fsdp_runner(self).units:
            unit.communication.set_all_reduce_hook(on_its_stream)

    def set_custom_all_gather(self, comm: Any) -> None:
        """``comm``, torch's ``AllGather``, sends this module's gathers from the next one on, all
        parameters in one buffer, and gives the memory for it. It is called without ``async_op``: on
        a device on the gathers' stream, on the CPU where the gather starts. ValueError where
        parameters have meshes of their own, as in torch."""
        its = self._only_communication("set_custom_all_gather")
        its.set_gather_comm(UnitComm(its.shard_group, comm.allocate, comm))

    def set_custom_reduce_scatter(self, comm: Any) -> None:
        """``comm``, torch's ``ReduceScatter``, sends this module's gradients to their shards, all
        in one buffer of the reduce dtype, and gives the memory for it. On the CPU it is called at
        the end of backward. Otherwise as :meth:`set_custom_all_gather`."""
        its = self._only_communication("set_custom_reduce_scatter")
        its.set_reduce_comm(UnitComm(its.shard_group, comm.allocate, comm, is_reduction=True))

    def set_allocate_memory_from_process_group_for_comm(self, enable: bool) -> None:
        """Sets whether packed buffers of this module's collectives are memory of the backend's, if
        it gives any (NCCL sends that without a copy). ValueError beside collectives of a user's
        own."""
        for each in self._own_communications():
            allocate = allocator_of(each.shard_group) if enable else torch.empty
            each.set_gather_comm(UnitComm(each.shard_group, allocate))
            each.set_reduce_comm(UnitComm(each.shard_group, allocate))

    def set_symm_mem_for_comm(self, backend: str = "NCCL") -> None:
        """Packed buffers of this module's gathers are torch's symmetric memory of ``backend``.
        Collective over the shards. ValueError beside collectives of a user's own."""
        for each in self._own_communications():
            allocate = symmetric_memory(each.shard_group, backend)
            each.set_gather_comm(UnitComm(each.shard_group, allocate))

    def set_force_sum_reduction_for_comms(self, enable: bool) -> None:
        """Sets whether this module's collectives only add up; it is divided by itself then."""
        for core in _cores([self]):
            core.set_force_sum(enable)

    def set_keep_unsharded_storage(self, keep: bool, *, recurse: bool = True) -> None:
        """Sets whether the full parameters' memory stays this module's own when they are freed, so
        that it is the same at every gather (for CUDA graphs). They can be used as long as before
        only."""
        for unit in self._units(recurse):
            unit.core.keep_memory = keep

    def set_reduce_scatter_max_input_buffers(
        self, max_input_buffers: int, *, recurse: bool = True
    ) -> None:
        """Sets how many reductions may be in flight, of the whole model the largest number that any
        module has; two at least. More take memory, and help where they are slower than backward."""
        if isinstance(max_input_buffers, bool) or not isinstance(max_input_buffers, int):
            kind = type(max_input_buffers).__name__
            raise TypeError(f"max_input_buffers is an int, not a {kind}")
        if max_input_buffers < 1:
            raise ValueError(f"max_input_buffers is positive, not {max_input_buffers}")
        for unit in self._units(recurse):
            unit.core.reductions_in_flight = max_input_buffers

    def _only_communication(self, setting: str) -> UnitCommunication:
        units = fsdp_runner(self).units
        if len(units) > 1:
            raise ValueError(
                f"{at(cast(nn.Module, self))}{setting}: its parameters are on {len(units)} meshes, "
                "and the collectives are one group's"
            )
        return units[0].communication

    def _own_communications(self) -> list[UnitCommunication]:
        """Of this module's units, none of which a user's code sends for."""
        found = [unit.communication for unit in fsdp_runner(self).units]
        if any(each.has_user_comms for each in found):
            raise ValueError(
                f"{at(cast(nn.Module, self))}set_custom_all_gather and set_custom_reduce_scatter "
                "give memory too: leave one of the two out"
            )
        return found

    @checks_first
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
            return _original(self).load_state_dict(given, strict=strict, assign=assign)

        module = cast(nn.Module, self)
        mesh = mesh_of_state(list(self._units(recurse=True)))
        return load(LoadRequest(module, mesh, state_dict, strict, assign, as_nn_module_does))

    def _units(self, recurse: bool) -> Iterator[ShardedUnit]:
        if not recurse:
            yield from fsdp_runner(self).units
            return
        for _, runner in named_runners(cast(nn.Module, self)):
            yield from runner.units

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``nn.Module``'s, of the sharded parameters, also where a backward that raised has left
        the full ones in place; and of gradients that wait for a backward that reduces them, which
        an optimizer's ``zero_grad`` does not know of."""
        fsdp_runner(self).drop_gradients()
        _original(self).zero_grad(set_to_none)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As ``nn.Module``'s, of the sharded parameters: no communication, no copy. From any
        thread: it waits for the others' forward or backward to end, and theirs for it."""
        with fsdp_runner(self).reading():
            return _original(self).state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        fsdp_runner(self).apply_to_shards(lambda: _original(self)._apply(fn, recurse))
        return self

    def __getstate__(self) -> Any:
        raise TypeError(
            "a module under fully_shard can't be copied or pickled: copy it before, or load its "
            "state_dict() into another one"
        )


refuse_torchs(FSDPModule)


def _cores(modules: Iterable[torchs.FSDPModule]) -> list[_C.Unit]:
    return [unit.core for module in modules for unit in fsdp_runner(module).units]


def fsdp_runner(module: Any) -> Runner:
    runner = runner_of(module)
    if runner is None:
        raise ValueError(
            f"a {type(module).__name__} that fully_shard has not been applied to has no such "
            "settings"
        )
    return runner
