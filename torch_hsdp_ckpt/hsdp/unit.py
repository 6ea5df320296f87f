"""One wrapped module's parameters in Python, as users, optimizers and ``nn.Module`` see them.

The C++ core owns memory and timing. ``slots.py`` knows where parameters are registered,
``shards.py`` the DTensors around shards, ``gradients.py`` how gradients get to them."""

import operator
from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from .. import _C
from ..common import gate
from ..common.tensors import dtensor_around, is_plain_subclass, local_of, without_subclass
from .callbacks import weak_callback, weak_function
from .communication import UnitCommunication, collectives_of
from .extensions import extended_among, shard_of_extended
from .gradients import TrainableParameter, UnitGradients
from .layout import ParameterLayout, spec_with_dtype
from .precision import Precision
from .shards import check_same_placement, mark_as_replaced
from .slots import RegisteredParameter, SlotTable

_LOCAL = operator.attrgetter("_local_tensor")


class ShardedUnit:
    """The parameters of one wrapped module, ``registered`` in it.

    Shards them in place over ``mesh`` (of one dimension, shards, or two, replicas and shards):
    afterwards every slot holds an ``nn.Parameter`` around a DTensor, placed as ``layouts`` say,
    whose local tensor lies in the unit's flat buffer.

    ``precision``: its ``param_dtype_of`` is that of a full parameter that computes, floating point
    ones only; its ``reduce_dtype`` that of the sums of their gradients over the ranks (None: as
    computed). Gradients have the shards' dtype, with ``keep_low_precision_grads`` ``param_dtype``.

    Parameters on the meta device stay there, as DTensors without values, until ``rebind`` finds
    that all have memory: torch's deferred initialisation. ``on_meta`` names them.

    ``memory``: where shards and their gradients are; on the host they go to ``device`` at every
    gather, and come back at every reduction."""

    def __init__(
        self,
        registered: Sequence[RegisteredParameter],
        layouts: Sequence[ParameterLayout],
        mesh: DeviceMesh,
        device: torch.device,
        reshard_after_forward: bool | int | None,
        precision: Precision,
        memory: _C.ShardMemory,
    ) -> None:
        self.mesh = mesh
        self.device = device
        self.names = [each.name for each in registered]
        self.slots = [each.slots for each in registered]
        originals = [each.parameter for each in registered]
        # A model's author may have hung attributes on its parameters.
        self._attributes = [dict(p.__dict__) for p in originals]
        self._layouts = list(layouts)
        self._extended = extended_among(
            registered, self._layouts, mesh, precision.policy, weak_function(self._sharded_at)
        )
        self._grad_dtype = precision.kept_grad_dtype

        collectives = collectives_of(mesh)
        self._is_offloaded = memory != _C.ShardMemory.DEVICE and device.type != "cpu"
        self.core = self._new_core(originals, precision, collectives, memory)
        self.schedule: _C.Schedule | None = None
        self.communication = UnitCommunication(mesh, collectives, self.core)
        self.communication.set_reshard_after_forward(reshard_after_forward)

        self.sharded = self._shard(originals)
        self._sharded_table = SlotTable(self.slots, self.sharded)
        self._bound_locals = [local_of(p) for p in self.sharded]
        self.on_meta = self._names_on_meta(self._bound_locals)
        # ``bind`` makes these.
        self.full: list[nn.Parameter] = []
        self._full_table: SlotTable | None = None
        self._requires_grad: list[bool] = []
        self._gradients = self._gradients_of([])

        self.summoned = False
        self.showing_full = True  # the slots do not hold the shards yet
        self.show_sharded()
        if mesh.size(mesh.ndim - 1) > 1:
            gate.units[id(self)] = self

    def _new_core(
        self,
        originals: Sequence[nn.Parameter],
        precision: Precision,
        collectives: _C.Collectives,
        memory: _C.ShardMemory,
    ) -> _C.Unit:
        layouts = zip(self._layouts, originals, strict=True)
        return _C.Unit(
            parameters=[
                layout.stored(original, precision.param_dtype_of(original), i in self._extended)
                for i, (layout, original) in enumerate(layouts)
            ],
            device=self.device,
            collectives=collectives,
            precision=precision.of_unit(),
            on_backward=weak_callback(self.show_full),
            on_reduced=weak_callback(self._take_gradients),
            local_grad=weak_function(self._local_gradient),
            extension=self._extended.for_core(),
            memory=memory,
        )

    def _sharded_at(self, index: int) -> nn.Parameter:
        return self.sharded[index]

    def _local_gradient(self, index: int, gradient: Tensor) -> Tensor:
        return self._layouts[index].local_gradient(gradient)

    def _shard(self, originals: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Sharded parameters with the values and attributes of ``originals``, which get a note that
        they were sharded."""
        with torch.no_grad():
            locals_ = self._cut(originals)
            specs = [layout.sharded for layout in self._layouts]
            dtensors = map(dtensor_around, locals_, specs)
            sharded = [
                nn.Parameter(dtensor, requires_grad=original.requires_grad)
                for dtensor, original in zip(dtensors, originals, strict=True)
            ]
        for parameter, attributes in zip(sharded, self._attributes, strict=True):
            parameter.__dict__.update(attributes)
        for original, parameter, name in zip(originals, sharded, self.names, strict=True):
            mark_as_replaced(original, parameter, name)
        return sharded

    def _cut(self, originals: Sequence[nn.Parameter]) -> list[torch.Tensor]:
        """This rank's shards; in the unit's flat buffer, if all have memory."""
        full = [local_of(original).detach() for original in originals]
        # As torch's: a subclass that is no more than a name has values to shard.
        own = [
            self._own_extended(i, each) if i in self._extended else _without_name(each)
            for i, each in enumerate(full)
        ]
        if any(original.is_meta for original in full):
            shards = [self._own_shard(i, each).clone() for i, each in enumerate(own)]
        else:
            shards = self.core.shard(self._extended.without(own))
        return self._extended.with_own(shards, own)

    def _own_extended(self, index: int, full: torch.Tensor) -> torch.Tensor:
        shards = self.mesh.ndim - 1
        size, rank = self.mesh.size(shards), self.mesh.get_local_rank(shards)
        return shard_of_extended(full, self._layouts[index].dim, size, rank)

    def _own_shard(self, index: int, full: torch.Tensor) -> torch.Tensor:
        """This rank's shard of a tensor of a full parameter's shape on this rank, a view."""
        if full.ndim == 0:
            return full
        shards, dim = self.mesh.ndim - 1, self._layouts[index].dim
        size, rank = self.mesh.size(shards), self.mesh.get_local_rank(shards)
        rows = _C.shard_rows(full.shape[dim], size, rank)
        return full.narrow(dim, rows.first, rows.count)

    def _names_on_meta(self, locals_: Sequence[torch.Tensor]) -> list[str]:
        return [name for name, local in zip(self.names, locals_, strict=True) if local.is_meta]

    # -- what the module shows

    def show_sharded(self) -> None:
        """Puts the sharded parameters into the module, where users, optimizers and state dicts
        look."""
        if self.showing_full:
            self._sharded_table.fill_slots()
            self.showing_full = False  # this comes last: another thread may ask

    def show_full(self) -> None:
        """Puts the full parameters into the module, for its computation only."""
        if not self.showing_full and self._full_table is not None:
            self.showing_full = True
            self._full_table.fill_slots()

    # -- binding memory

    def bind(self, schedule: _C.Schedule) -> None:
        """Makes the full parameters and hands them to ``schedule``. It is called again whenever
        shards, dtypes or requires_grad change: then it waits for another thread that has the
        turn."""
        if self.schedule is None:
            self._bind(schedule)
            return
        turn = schedule.begin_read()
        try:
            schedule.finish_reductions()  # they belong to the parameters so far
            self._bind(schedule)
        finally:
            if turn == _C.ReadTurn.TAKEN:
                schedule.end_read()

    def _bind(self, schedule: _C.Schedule) -> None:
        requires_grad = [p.requires_grad for p in self.sharded]
        trainable = _numbers_of_true(requires_grad)
        if self._grad_dtype is not None:
            for i in trainable:
                # This is autograd's leave to have a gradient of another dtype.
                self.sharded[i].grad_dtype = self._grad_dtype
        full = self._empty_full()
        # This comes first: where it refuses, all is as it was.
        memory = [None if i in self._extended else local_of(p) for i, p in enumerate(full)]
        schedule.add(self.core, full, memory, trainable)
        self.schedule = schedule
        self.full = full
        self._requires_grad = requires_grad
        self.show_sharded()  # full ones of before may be shown
        self._full_table = SlotTable(self.slots, full)
        self._gradients = self._gradients_of(trainable)

    def _empty_full(self) -> list[nn.Parameter]:
        """Full parameters without memory of their own.

        They are no inference tensors, if the first forward happens to be an evaluation: a later one
        may need gradients."""
        with torch.inference_mode(False), torch.no_grad():
            parts = zip(self._layouts, self.core.empty_full(), self.sharded, strict=True)
            full = [
                self._extended.full_at(i)
                if i in self._extended
                else nn.Parameter(layout.full_around(empty), requires_grad=sharded.requires_grad)
                for i, (layout, empty, sharded) in enumerate(parts)
            ]
        for parameter, attributes in zip(full, self._attributes, strict=True):
            parameter.__dict__.update(attributes)
        return full

    def _gradients_of(self, trainable: Sequence[int]) -> UnitGradients:
        return UnitGradients(
            self.core,
            [
                TrainableParameter(self.names[i], self.sharded[i], self._grad_spec(i))
                for i in trainable
            ],
        )

    def _grad_spec(self, index: int) -> DTensorSpec:
        spec = self._layouts[index].sharded
        return spec if self._grad_dtype is None else spec_with_dtype(spec, self._grad_dtype)

    def _take_gradients(self) -> None:
        self._gradients.take()

    def forget_kept_gradients(self) -> None:
        """Lets go of gradients kept for reuse: ``_apply`` swaps tensors in place, which nobody else
        may hold then."""
        self._gradients.forget_kept()

    def free_unheld_gradients(self) -> None:
        """See :meth:`UnitGradients.free_unheld`."""
        self._gradients.free_unheld()

    def describe(self) -> str:
        """One line about the unit, for errors."""
        parameters = ", ".join(
            f"{name} {_describe_parameter(parameter)}"
            for name, parameter in zip(self.names, self.sharded, strict=True)
        )
        return (
            f"module {self.core.name} on a mesh of {tuple(self.mesh.shape)}, with parameters: "
            f"{parameters or 'none'}"
        )

    def signature(self) -> str:
        """All that has to be the same on every rank. Names do not: each rank may have modules of
        its own names, experts say."""
        parameters = ", ".join(map(_describe_parameter, self.sharded))
        return f"mesh of {tuple(self.mesh.shape)}: {parameters}"

    # -- what happens to the parameters between forwards

    def before_use(self) -> None:
        """Follows what has happened to the sharded parameters since the last forward: their
        requires_grad, their conversion by a module inside.

        Raises RuntimeError for a parameter that somebody has put into the module since it was
        wrapped, and as :meth:`rebind`."""
        if self.summoned:
            raise RuntimeError(
                f"module {self.core.name} can't run while its full parameters are summoned: leave "
                "summon_full_params first"
            )
        self._follow_slots()
        if not all(map(operator.is_, map(_LOCAL, self.sharded), self._bound_locals)):
            gate.wait_at_gate()
            self.rebind()  # a module inside was converted, by to() or double(), past the wrapper
        self.check_materialized()
        if self.schedule is not None and self._requires_grad != [
            p.requires_grad for p in self.sharded
        ]:
            self.bind(self.schedule)

    def take_replaced(self) -> None:
        """Before the first forward: takes DTensors that somebody has registered in place of the
        parameters (an initialisation that computes them anew, say). ValueError for one that is
        placed otherwise, RuntimeError for a plain one."""
        current = [places[0].table.get(places[0].name) for places in self.slots]
        if all(map(operator.is_, current, self.sharded)):
            return
        for index, parameter in enumerate(current):
            if not isinstance(parameter, DTensor):
                raise self._replaced_error(index)
        self.rebind()

    def check_materialized(self) -> None:
        """Raises RuntimeError if there are parameters on the meta device."""
        if self.on_meta:
            self.rebind()  # a module inside may have got memory past the wrapper
        if self.on_meta:
            raise RuntimeError(
                f"rank {dist.get_rank()}: module {self.core.name}: FSDP parameters should be "
                "materialized from meta device before training, but these still are on it: "
                f"{', '.join(self.on_meta)}. Call the outermost module's to_empty(device=...) and "
                "then the modules' reset_parameters, or load_state_dict(assign=True)"
            )

    def _follow_slots(self) -> None:
        """Finds in the slots what this unit has put there last. ``functional_call``, whose forward
        changes that, puts back what it has found before."""
        if not self.showing_full:
            self._check_slots()
        elif self._full_table is not None and self._full_table.replaced_parameter() is not None:
            self._check_slots()
            self.showing_full = False

    def _check_slots(self) -> None:
        replaced = self._sharded_table.replaced_parameter()
        if replaced is None:
            return
        raise self._replaced_error(next(i for i, p in enumerate(self.sharded) if p is replaced))

    def _replaced_error(self, index: int) -> RuntimeError:
        return RuntimeError(
            f"rank {dist.get_rank()}: parameter {self.names[index]} of module {self.core.name} was "
            "replaced or removed after wrapping, which the wrapper can't follow: replace it "
            "before, copy values into it (with torch.no_grad()), or use "
            "load_state_dict(assign=True). torch.func.functional_call, which replaces parameters "
            "for one call, computes with a unit's own ones only"
        )

    def rebind(self) -> None:
        """Takes what the module's slots hold now, after somebody has replaced parameters or their
        local tensors (``_apply``, ``load_state_dict(assign=True)``), and moves it into a flat
        buffer of the unit again.

        Raises ValueError, before anything changes, for a parameter that is not placed as this
        unit's are."""
        current = self._parameters_in_slots()
        locals_ = [local_of(p) for p in current]
        on_meta = self._names_on_meta(locals_)
        if on_meta == self.on_meta and self._is_bound_to(current, locals_):
            self._bound_locals = locals_
            return
        devices = {local.device for local in locals_ if not local.is_meta}
        if len(devices) > 1:
            raise ValueError(
                "the parameters of one unit were put on several devices: "
                f"{sorted(map(str, devices))}"
            )
        if locals_ and not on_meta:
            (device,) = devices
            with torch.no_grad():
                bound = self.core.rebind(self._extended.without(locals_), device)
                locals_ = self._extended.with_own(bound, locals_)
            self.device = self.device if self._is_offloaded else device
        self.on_meta = on_meta
        self._replace_shards(current, locals_)
        if self.schedule is not None and not on_meta:
            self.bind(self.schedule)

    def _parameters_in_slots(self) -> list[nn.Parameter]:
        found = [places[0].parameter for places in self.slots]
        for name, parameter, layout in zip(self.names, found, self._layouts, strict=True):
            check_same_placement(name, parameter, layout.sharded)
        return found

    def _is_bound_to(self, parameters: list[nn.Parameter], locals_: list[torch.Tensor]) -> bool:
        """Whether these are the unit's own parameters, in the memory that it has given them."""
        if not all(map(operator.is_, parameters, self.sharded)):
            return False
        return [self._place_of(i, local) for i, local in enumerate(locals_)] == [
            self._place_of(i, local) for i, local in enumerate(self._bound_locals)
        ]

    def _place_of(self, index: int, local: torch.Tensor) -> int:
        return id(local) if index in self._extended else local.data_ptr()

    def _replace_shards(self, parameters: list[nn.Parameter], locals_: list[torch.Tensor]) -> None:
        for i, (parameter, local) in enumerate(zip(parameters, locals_, strict=True)):
            self._layouts[i] = self._layouts[i].with_dtype(local.dtype)
            cast(DTensor, parameter)._local_tensor = local
            mark_as_replaced(self.sharded[i], parameter, self.names[i])
        self._bound_locals = locals_
        self.sharded = parameters
        self._sharded_table = SlotTable(self.slots, parameters)
        # A reduction of the parameters that were trainable so far may still be in flight.
        self._gradients = self._gradients_of(_numbers_of_true(self._requires_grad))
        self.showing_full = True  # every alias of a slot has to show the replacement
        self.show_sharded()

    # -- summoning whole parameters

    def summon(self, full: list[nn.Parameter]) -> None:
        """Puts whole parameters into the module until ``dismiss``; none: leaves the sharded ones
        there."""
        self.show_sharded()
        self.summoned = True
        for places, parameter in zip(self.slots, full, strict=False):
            for slot in places:
                slot.put(parameter)

    def dismiss(self) -> list[nn.Parameter]:
        """Ends ``summon``; returns what the slots held in the meantime."""
        held = [places[0].parameter for places in self.slots]
        self.summoned = False
        self.showing_full = True
        self.show_sharded()
        return held

    def write_shard(self, index: int, full: torch.Tensor, sharded: torch.Tensor) -> None:
        """Copies this rank's shard of ``full``, of the full parameter's shape, into ``sharded``."""
        local_of(sharded).copy_(self._own_shard(index, local_of(full)))

    def full_from(self, index: int, whole: torch.Tensor) -> torch.Tensor:
        """What the module computes with, of the whole of the parameter on all mesh dimensions."""
        return self._layouts[index].full_from(whole)


def mesh_of_state(units: Sequence[ShardedUnit]) -> DeviceMesh:
    """The mesh whose ranks together hold the state of ``units``: the largest one that a parameter
    lies on, beside tensor or expert parallelism."""
    meshes = [unit.mesh for unit in units]
    meshes += [cast(DTensor, p).device_mesh for unit in units for p in unit.sharded]
    return max(meshes, key=lambda mesh: (mesh.size(), mesh.ndim))


def _numbers_of_true(flags: Sequence[bool]) -> list[int]:
    return [number for number, flag in enumerate(flags) if flag]


def _without_name(tensor: torch.Tensor) -> torch.Tensor:
    return without_subclass(tensor) if is_plain_subclass(tensor) else tensor


def _describe_parameter(parameter: nn.Parameter) -> str:
    dtype = str(parameter.dtype).removeprefix("torch.")
    frozen = "" if parameter.requires_grad else " frozen"
    memory = " on the meta device" if parameter.is_meta else ""
    return f"{tuple(parameter.shape)} {dtype}{frozen}{memory}"
