"""One wrapped module's parameters in Python, as users, optimizers and ``nn.Module`` see them.

The C++ core owns memory and timing. ``slots.py`` knows where parameters are registered,
``shards.py`` the DTensors around shards, ``gradients.py`` how gradients get to them."""

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from .. import _C
from ..common import gate
from ..common.tensors import local_of
from .callbacks import weak_callback, weak_function
from .comms import UnitComm
from .gradients import TrainableParameter, UnitGradients
from .layout import ParameterLayout, dtensor_around, spec_with_dtype
from .own_groups import group_of_ranks
from .precision import Precision
from .shards import check_same_placement, mark_as_replaced
from .slots import RegisteredParameter, SlotTable

_LOCAL = operator.attrgetter("_local_tensor")


def reshard_policy(after_forward: bool | int | None) -> _C.ReshardAfterForward:
    """What torch's ``reshard_after_forward`` asks for. A number of ranks, which is above one, frees
    as True does."""
    if after_forward is None:
        return _C.ReshardAfterForward.UNLESS_BACKWARD_IS_NEXT
    return _C.ReshardAfterForward.ALWAYS if after_forward else _C.ReshardAfterForward.NEVER


def collectives_of(mesh: DeviceMesh) -> _C.Collectives:
    """The gathers and reductions of units on ``mesh``, on the mesh's own groups."""
    replica = mesh.get_group(0).group_name if mesh.ndim == 2 else None
    return _C.Collectives(mesh.get_group(mesh.ndim - 1).group_name, replica, dist.get_rank())


class ShardedUnit:
    """The parameters of one wrapped module, ``registered`` in it.

    Shards them in place over ``mesh`` (of one dimension, shards, or two, replicas and shards):
    afterwards every slot holds an ``nn.Parameter`` around a DTensor, placed as ``layouts`` say,
    whose local tensor lies in the unit's flat buffer.

    ``precision``: its ``param_dtype_of`` is that of a full parameter that computes, floating point
    ones only; its ``reduce_dtype`` that of the sums of their gradients over the ranks (None: as
    computed). Gradients have the shards' dtype, with ``keep_low_precision_grads`` ``param_dtype``.

    Parameters on the meta device stay there, as DTensors without values, until ``rebind`` finds
    that all have memory: torch's deferred initialisation. ``on_meta`` names them."""

    def __init__(
        self,
        registered: Sequence[RegisteredParameter],
        layouts: Sequence[ParameterLayout],
        mesh: DeviceMesh,
        device: torch.device,
        reshard_after_forward: bool | int | None,
        precision: Precision,
    ) -> None:
        self.mesh = mesh
        self.device = device
        self.names = [each.name for each in registered]
        self.slots = [each.slots for each in registered]
        originals = [each.parameter for each in registered]
        # A model's author may have hung attributes on its parameters.
        self._attributes = [dict(p.__dict__) for p in originals]
        self._layouts = list(layouts)
        self._grad_dtype = precision.kept_grad_dtype

        self.collectives = collectives_of(mesh)
        self.core = self._new_core(originals, precision)
        self.schedule: _C.Schedule | None = None
        self.fewer: _C.Collectives | None = None
        self.set_reshard_after_forward(reshard_after_forward)

        self.sharded = self._shard(originals)
        self._sharded_table = SlotTable(self.slots, self.sharded)
        self._bound_locals = [local_of(p) for p in self.sharded]
        self.on_meta = self._names_on_meta(self._bound_locals)
        # ``bind`` makes these.
        self.full: list[nn.Parameter] = []
        self._full_table: SlotTable | None = None
        self._requires_grad: list[bool] = []
        self._gradients = self._gradients_of([])

        # Held here, where the garbage collector sees what they reach.
        self._comms: dict[str, UnitComm] = {}
        self._comm_hook: Callable[..., Any] | None = None
        self._all_reduce_hook: Callable[[Tensor], None] | None = None
        self.summoned = False
        self.showing_full = True  # the slots do not hold the shards yet
        self.show_sharded()
        if mesh.size(mesh.ndim - 1) > 1:
            gate.units[id(self)] = self

    def _new_core(
        self,
        originals: Sequence[nn.Parameter],
        precision: Precision,
    ) -> _C.Unit:
        layouts = zip(self._layouts, originals, strict=True)
        return _C.Unit(
            parameters=[
                layout.stored(original, precision.param_dtype_of(original))
                for layout, original in layouts
            ],
            device=self.device,
            collectives=self.collectives,
            precision=precision.of_unit(),
            on_backward=weak_callback(self.show_full),
            on_reduced=weak_callback(self._take_gradients),
            local_grad=weak_function(self._local_gradient),
        )

    def _local_gradient(self, index: int, gradient: Tensor) -> Tensor:
        return self._layouts[index].local_gradient(gradient)

    def set_reshard_after_forward(self, after_forward: bool | int | None) -> None:
        """What forwards leave of the full parameters. A number of ranks, a divisor of the shards':
        each so many neighbours keep them sharded among themselves until backward. Collective over
        these."""
        self.core.reshard_after_forward = reshard_policy(after_forward)
        self.fewer = None
        if type(after_forward) is int:
            self.fewer = self._among_neighbours(after_forward)
        self.core.set_reshard_to(self.fewer)

    def _among_neighbours(self, count: int) -> _C.Collectives:
        ranks = dist.get_process_group_ranks(self.shard_group)
        first = ranks.index(dist.get_rank()) // count * count
        group = group_of_ranks(ranks[first : first + count], self.shard_group)
        return _C.Collectives(group.group_name, None, dist.get_rank())

    def join(self, peers: _C.Peers) -> None:
        """``peers``: all ranks of the outermost module, who tell each other of errors."""
        self.collectives.set_peers(peers)
        if self.fewer is not None:
            self.fewer.set_peers(peers)

    @property
    def has_comm_hook(self) -> bool:
        """Whether a user's hook reduces."""
        return self._comm_hook is not None

    def set_comm_hook(self, hook: Callable[..., Any]) -> None:
        """``hook(gradient)``, or ``hook(gradient, shard)`` where there are shards, reduces from the
        next reduction on."""
        self._comm_hook = hook  # held here, where the garbage collector sees what it reaches
        self.core.set_comm_hook(weak_callback(self._call_comm_hook))

    def _call_comm_hook(self, gradient: Tensor, shard: Tensor | None) -> None:
        assert self._comm_hook is not None
        self._comm_hook(gradient) if shard is None else self._comm_hook(gradient, shard)

    @property
    def shard_group(self) -> dist.ProcessGroup:
        """The mesh's group of the ranks that share the parameters out."""
        return self.mesh.get_group(self.mesh.ndim - 1)

    def set_gather_comm(self, comm: UnitComm) -> None:
        """``comm`` sends from the next gather on, or gives it memory."""
        self._comms["gather"] = comm
        run = weak_callback(comm.run) if comm.sends else None
        self.core.set_gather_comm(weak_function(comm.allocate), run)

    def set_reduce_comm(self, comm: UnitComm) -> None:
        """``comm`` sends from the next reduce-scatter on, or gives it memory."""
        self._comms["reduce"] = comm
        run = weak_callback(comm.run) if comm.sends else None
        self.core.set_reduce_comm(weak_function(comm.allocate), run)

    def has_user_comms(self) -> bool:
        """Whether a user's code sends."""
        return any(comm.sends for comm in self._comms.values())

    def set_all_reduce_hook(self, hook: Callable[[Tensor], None] | None) -> None:
        """``hook`` gets the all-reduced averages from the next reduction on."""
        self._all_reduce_hook = hook
        self.core.set_all_reduce_hook(weak_callback(self._call_all_reduce_hook) if hook else None)

    def _call_all_reduce_hook(self, averages: Tensor) -> None:
        assert self._all_reduce_hook is not None
        self._all_reduce_hook(averages)

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
        if any(original.is_meta for original in full):
            return [self._own_shard(i, whole).clone() for i, whole in enumerate(full)]
        return self.core.shard(full)

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
        schedule.add(self.core, full, [local_of(each) for each in full], trainable)
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
                nn.Parameter(layout.full_around(empty), requires_grad=sharded.requires_grad)
                for layout, empty, sharded in parts
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
                locals_ = self.core.rebind(locals_, device)
            self.device = device
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
        addresses = [local.data_ptr() for local in locals_]
        return addresses == [local.data_ptr() for local in self._bound_locals]

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


def on_stream(hook: Callable[[Tensor], None], stream: Any) -> Callable[[Tensor], None]:
    """``hook`` on ``stream``, behind what the current one has been given, which goes on behind
    it."""

    def call(averages: Tensor) -> None:
        current = torch.get_device_module(averages.device.type).current_stream(averages.device)
        stream.wait_stream(current)
        with torch.get_device_module(averages.device.type).stream(stream):
            hook(averages)
        current.wait_stream(stream)

    return call


def mesh_of_state(units: Sequence[ShardedUnit]) -> DeviceMesh:
    """The mesh whose ranks together hold the state of ``units``: the largest one that a parameter
    lies on, beside tensor or expert parallelism."""
    meshes = [unit.mesh for unit in units]
    meshes += [cast(DTensor, p).device_mesh for unit in units for p in unit.sharded]
    return max(meshes, key=lambda mesh: (mesh.size(), mesh.ndim))


def _numbers_of_true(flags: Sequence[bool]) -> list[int]:
    return [number for number, flag in enumerate(flags) if flag]


def _describe_parameter(parameter: nn.Parameter) -> str:
    dtype = str(parameter.dtype).removeprefix("torch.")
    frozen = "" if parameter.requires_grad else " frozen"
    memory = " on the meta device" if parameter.is_meta else ""
    return f"{tuple(parameter.shape)} {dtype}{frozen}{memory}"
