"""One wrapped module's parameters in Python: which slots they fill, the DTensors around their
shards, their gradients.

The C++ core owns memory and timing; here are the objects that users, optimizers and ``nn.Module``
see."""

import operator
import sys
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from .. import _C
from ..common import gate
from ..common.tensors import local_of

# What gradients can be reduced in, and mixed precision can compute in.
REDUCED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LOCAL = operator.attrgetter("_local_tensor")
_OWNER = "_hsdp_ckpt_owner"  # on an original parameter: the unit that has sharded it


class Slot(NamedTuple):
    """Where a parameter is registered. A parameter that a unit's modules share has several."""

    module: nn.Module
    name: str

    def put(self, parameter: nn.Parameter) -> None:
        # Modules with a __setattr__ of their own (nn.RNN keeps a list of its weights) have to hear
        # of it.
        if type(self.module).__setattr__ is nn.Module.__setattr__:
            self.module._parameters[self.name] = parameter
        else:
            setattr(self.module, self.name, parameter)


def _weak(method: Callable[[], None]) -> Callable[[], None]:
    """A bound method that does not keep its object: C++ holds it, and the object holds the C++
    side."""
    reference = weakref.WeakMethod(method)

    def call() -> None:
        bound = reference()
        if bound is not None:
            bound()

    return call


def reshard_policy(after_forward: bool | None) -> _C.ReshardAfterForward:
    """What torch's ``reshard_after_forward`` asks for."""
    if after_forward is None:
        return _C.ReshardAfterForward.UNLESS_BACKWARD_IS_NEXT
    return _C.ReshardAfterForward.ALWAYS if after_forward else _C.ReshardAfterForward.NEVER


def collectives_of(mesh: DeviceMesh) -> _C.Collectives:
    replica = mesh.get_group(0).group_name if mesh.ndim == 2 else None
    return _C.Collectives(mesh.get_group(mesh.ndim - 1).group_name, replica, dist.get_rank())


class ShardedUnit:
    """The parameters of one wrapped module. ``slots``: for each distinct parameter (name from the
    wrapped module, slots).

    Shards them in place: afterwards every slot holds an ``nn.Parameter`` around a DTensor, placed
    ``(Replicate(), Shard(0))`` on a 2-D mesh and ``(Shard(0),)`` on a 1-D one, whose local tensor
    lies in the unit's flat buffer. A parameter without dimensions is replicated on every dimension
    of the mesh instead.

    ``precision``: ``param_dtype`` is that of the full parameters that compute, floating point ones
    only, and ``reduce_dtype`` that of the sums of their gradients over the ranks (None: as
    computed). Gradients have the shards' dtype; with ``keep_low_precision_grads`` they have
    ``param_dtype``."""

    def __init__(
        self,
        slots: list[tuple[str, list[Slot]]],
        mesh: DeviceMesh,
        device: torch.device,
        reshard_after_forward: _C.ReshardAfterForward,
        precision: _C.UnitPrecision,
    ) -> None:
        self.summoned = False
        self.mesh = mesh
        self.device = device
        self.names = [name for name, _ in slots]
        self.slots = [places for _, places in slots]
        originals = [places[0].module._parameters[places[0].name] for places in self.slots]
        full = [p for p in originals if p is not None]
        self._check(full, device)
        self.collectives = collectives_of(mesh)
        self.core = _C.Unit(
            sizes=[list(p.shape) for p in full],
            dtypes=[p.dtype for p in full],
            device=device,
            collectives=self.collectives,
            precision=precision,
            reshard_after_forward=reshard_after_forward,
            on_backward=_weak(self.show_full),
            on_reduced=_weak(self._take_gradients),
        )
        self._grad_dtype = precision.param_dtype if precision.keep_low_precision_grads else None
        self._placements = (Replicate(), Shard(0)) if mesh.ndim == 2 else (Shard(0),)
        self._specs = [self._spec(p.shape, p.dtype) for p in full]
        self.sharded: list[nn.Parameter] = []
        self._attributes = [
            dict(p.__dict__) for p in full
        ]  # what a model's author has hung on its parameters
        with torch.no_grad():
            for shard, spec, original in zip(self.core.shard(full), self._specs, full, strict=True):
                self.sharded.append(
                    nn.Parameter(self._dtensor(shard, spec), requires_grad=original.requires_grad)
                )
                self.sharded[-1].__dict__.update(self._attributes[len(self.sharded) - 1])
        for original, name in zip(full, self.names, strict=True):
            setattr(original, _OWNER, name)
        self.full: list[nn.Parameter] = []
        self.schedule: _C.Schedule | None = None
        self._shown: list[nn.Parameter] | None = (
            None  # by entry of _fast, as long as these are the sharded parameters
        )
        self._flags: list[bool] = []
        self._trainable: list[int] = []
        self._bound = [local_of(p) for p in self.sharded]
        self._forget_gradients()
        self.showing_full = True
        self.show_sharded()
        if mesh.size(mesh.ndim - 1) > 1:
            gate.units[id(self)] = self

    def _check(self, parameters: list[nn.Parameter], device: torch.device) -> None:
        for name, places, p in zip(self.names, self.slots, parameters, strict=True):
            owner_class = type(places[0].module).__name__
            where = f"rank {dist.get_rank()}: module {owner_class}: parameter {name} of shape {tuple(p.shape)}"
            if isinstance(p, DTensor):
                raise ValueError(
                    f"{where} already is a DTensor: sharding it a second time (tensor parallelism) "
                    "is not served. Use torch's "
                    "own fully_shard for this module, or leave the parameter out (ignored_states, "
                    "ignored_params) and reduce "
                    "its gradient yourself"
                )
            if (owner := getattr(p, _OWNER, None)) is not None:
                raise ValueError(
                    f"{where} is shared with another wrapped module, which has sharded it as "
                    f"{owner}: wrap one module that "
                    "holds all uses, or leave both modules to the same unit"
                )
            if p.is_meta:
                raise ValueError(
                    f"{where} is on the meta device: materialise the module (to_empty and its own "
                    "init) first"
                )
            if p.requires_grad and p.dtype not in REDUCED:
                raise ValueError(
                    f"{where} is {p.dtype}, whose gradients are not reduced here (float64, "
                    "float32, bfloat16, float16 are): "
                    "name it in ignored_states, or convert it"
                )
            if p.device != device:
                raise ValueError(
                    f"{where} is on {p.device} and the mesh needs {device}: move the module first "
                    "(or device_id)"
                )

    def _spec(self, shape: torch.Size, dtype: torch.dtype) -> DTensorSpec:
        stride = torch.empty(shape, device="meta").stride()
        placements = self._placements if shape else (Replicate(),) * self.mesh.ndim
        return DTensorSpec(self.mesh, placements, tensor_meta=TensorMeta(shape, stride, dtype))

    def _grad_spec(self, i: int) -> DTensorSpec:
        spec = self._specs[i]
        return spec if self._grad_dtype is None else self._spec(spec.shape, self._grad_dtype)

    @staticmethod
    def _dtensor(local: torch.Tensor, spec: DTensorSpec) -> DTensor:
        # Directly, not by from_local: that would put a view of the shard inside, which can't be
        # deep-copied or saved alone.
        return DTensor(local, spec, requires_grad=False)  # type: ignore[no-untyped-call]

    # -- what the module shows

    def show_sharded(self) -> None:
        """Puts the sharded parameters into the module, where users, optimizers and state dicts
        look."""
        if self.showing_full:
            if self._shown is None:
                for places, parameter in zip(self.slots, self.sharded, strict=True):
                    for slot in places:
                        slot.put(parameter)
            else:  # twice a step: tables at hand
                for (table, name, _), parameter in zip(self._fast, self._shown, strict=True):
                    table[name] = parameter
                for (slot, _), parameter in zip(self._slow, self._slow_shown, strict=True):
                    slot.put(parameter)
            self.showing_full = False  # last: another thread may ask

    def show_full(self) -> None:
        """Puts the full parameters into the module, for its computation only."""
        if not self.showing_full:
            self.showing_full = True
            for table, name, parameter in self._fast:
                table[name] = parameter
            for slot, parameter in self._slow:
                slot.put(parameter)

    # -- binding memory

    def bind(self, schedule: _C.Schedule) -> None:
        """Makes the full parameters and hands them to ``schedule``. Again whenever shards, dtypes
        or requires_grad change: then it waits for another thread that has the turn."""
        if self.schedule is None:
            self._bind(schedule)
            return
        turn = schedule.begin_read()
        try:
            schedule.finish_reductions()  # of the parameters as they have been so far
            self._bind(schedule)
        finally:
            if turn == _C.ReadTurn.TAKEN:
                schedule.end_read()

    def _bind(self, schedule: _C.Schedule) -> None:
        flags = [p.requires_grad for p in self.sharded]
        trainable = [i for i, flag in enumerate(flags) if flag]
        if self._grad_dtype is not None:
            for i in trainable:
                self.sharded[
                    i
                ].grad_dtype = (
                    self._grad_dtype
                )  # autograd's leave to have a gradient of another dtype
        # Not as inference tensors, if the first forward happens to be an evaluation: a later one
        # may need gradients.
        with torch.inference_mode(False), torch.no_grad():
            pairs = zip(self.core.empty_full(), self.sharded, strict=True)
            every_full = [
                nn.Parameter(full, requires_grad=sharded.requires_grad) for full, sharded in pairs
            ]
        for full, attributes in zip(every_full, self._attributes, strict=True):
            full.__dict__.update(attributes)
        schedule.add(self.core, every_full, trainable)  # first: where it refuses, all is as it was
        self.schedule, self.full, self._flags, self._trainable = (
            schedule,
            every_full,
            flags,
            trainable,
        )
        every = [
            (slot, full)
            for places, full in zip(self.slots, self.full, strict=True)
            for slot in places
        ]
        plain = [type(slot.module).__setattr__ is nn.Module.__setattr__ for slot, _ in every]
        self._fast = [
            (slot.module._parameters, slot.name, p)
            for (slot, p), ok in zip(every, plain, strict=True)
            if ok
        ]
        kept = [
            sharded
            for places, sharded in zip(self.slots, self.sharded, strict=True)
            for _ in places
        ]
        self._shown = [p for p, ok in zip(kept, plain, strict=True) if ok]
        self._slow_shown = [p for p, ok in zip(kept, plain, strict=True) if not ok]
        self._slow = [pair for pair, ok in zip(every, plain, strict=True) if not ok]
        self._forget_gradients()

    def describe(self) -> str:
        """One line of all that has to be the same on every rank."""
        parameters = ", ".join(
            f"{name} {tuple(p.shape)} "
            f"{str(p.dtype).removeprefix('torch.')}{'' if p.requires_grad else ' frozen'}"
            for name, p in zip(self.names, self.sharded, strict=True)
        )
        return f"module {self.core.name} on a mesh of {tuple(self.mesh.shape)}, with parameters: {parameters or 'none'}"

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
        if not self.showing_full and self._shown is not None:
            if not all(map(operator.is_, [t.get(n) for t, n, _ in self._fast], self._shown)):
                self._raise_replaced(self._shown)
        if not all(map(operator.is_, map(_LOCAL, self.sharded), self._bound)):
            gate.wait_at_gate()
            self.rebind()  # to(), double() and the like of a module inside, past the wrapper
        if self._flags != [p.requires_grad for p in self.sharded] and self.schedule is not None:
            self.bind(self.schedule)

    def _raise_replaced(self, shown: list[nn.Parameter]) -> None:
        for (table, name, _), expected in zip(self._fast, shown, strict=True):
            if table.get(name) is not expected:
                index = next(i for i, p in enumerate(self.sharded) if p is expected)
                raise RuntimeError(
                    f"parameter {self.names[index]} of module {self.core.name} was replaced or "
                    "removed after wrapping, which "
                    "the wrapper can't follow: replace it before, copy values into it (with "
                    "torch.no_grad()), or use "
                    "load_state_dict(assign=True)"
                )

    def summon(self, full: list[nn.Parameter]) -> None:
        """Puts whole parameters into the module until ``dismiss``; none: leaves the sharded ones
        there."""
        self.show_sharded()
        self.summoned = True
        for places, parameter in zip(self.slots, full, strict=False):
            for slot in places:
                slot.put(parameter)

    def dismiss(self) -> list[torch.Tensor]:
        """Ends ``summon``; returns what the slots held in the meantime."""
        held = [
            cast(torch.Tensor, places[0].module._parameters[places[0].name])
            for places in self.slots
        ]
        self.summoned = False
        self.showing_full = True
        self.show_sharded()
        return held

    def write_rows(self, whole: torch.Tensor, sharded: torch.Tensor) -> None:
        """Copies this rank's rows of ``whole`` (the parameter's shape) into ``sharded``."""
        local, shards = local_of(sharded), self.mesh.size(self.mesh.ndim - 1)
        if whole.ndim == 0:
            local.copy_(whole)
            return
        shard = self.mesh.get_local_rank(self.mesh.ndim - 1)
        rows = _C.shard_rows(whole.shape[0], shards, shard)
        local.copy_(whole.narrow(0, rows.first, rows.count))

    def release(self) -> None:
        """Lets go of gradients kept for reuse: ``_apply`` swaps tensors in place, which nobody else
        may hold then."""
        self._forget_gradients()

    def rebind(self) -> None:
        """After somebody replaced parameters or their local tensors (``_apply``,
        ``load_state_dict(assign=True)``): takes what the module's slots hold now, and moves it into
        a flat buffer of the unit again.

        Raises ValueError, before anything changes, for a parameter that is not placed as this
        unit's are."""
        current: list[nn.Parameter] = []
        for name, places in zip(self.names, self.slots, strict=True):
            parameter: Any = places[0].module._parameters[places[0].name]
            if not isinstance(parameter, DTensor):
                raise ValueError(
                    f"parameter {name} was replaced by a {type(parameter).__name__}; expected a "
                    "DTensor"
                )
            spec = self._specs[len(current)]
            if (
                parameter.device_mesh != self.mesh
                or parameter.placements != spec.placements
                or parameter.shape != spec.shape
            ):
                raise ValueError(
                    f"parameter {name} was replaced by one of shape {tuple(parameter.shape)}, "
                    f"placed {parameter.placements} on "
                    f"{parameter.device_mesh}; expected {tuple(spec.shape)}, {spec.placements} on "
                    f"{self.mesh}"
                )
            current.append(cast(nn.Parameter, parameter))
        shards = [local_of(p) for p in current]
        same = [p is q for p, q in zip(current, self.sharded, strict=True)]
        if all(same) and [s.data_ptr() for s in shards] == self._addresses():
            self._bound = shards
            return
        devices = {s.device for s in shards}
        if len(devices) > 1:
            raise ValueError(
                "the parameters of one unit were put on several devices: "
                f"{sorted(map(str, devices))}"
            )
        with torch.no_grad():
            bound = self.core.rebind(shards, shards[0].device) if shards else []
        for i, (parameter, shard) in enumerate(zip(current, bound, strict=True)):
            self._specs[i] = self._spec(parameter.shape, shard.dtype)
            parameter._local_tensor = shard
        self._bound = bound
        self.device = shards[0].device if shards else self.device
        self.sharded = current
        self.showing_full = True  # every alias of a slot has to show the replacement
        self._shown = None
        self.show_sharded()
        if self.schedule is not None:
            self.bind(self.schedule)

    def _addresses(self) -> list[int]:
        return [shard.data_ptr() for shard in self._bound]

    # -- gradients

    def _forget_gradients(self) -> None:
        self._grads: list[DTensor] = []
        self._baseline: list[int] = []

    def _holders(self) -> list[int]:
        """Who holds the cached gradients: Python objects, tensors, and views of their memory."""
        counts = [sys.getrefcount(grad) for grad in self._grads]
        counts += [grad._use_count() for grad in self._grads]  # type: ignore[attr-defined]
        for grad in self._grads:
            local = grad._local_tensor
            counts += (sys.getrefcount(local), local._use_count())  # type: ignore[attr-defined]
        # One storage a dtype.
        storages = {grad._local_tensor.untyped_storage()._cdata for grad in self._grads}
        return counts + [torch._C._storage_Use_Count(storage) for storage in sorted(storages)]

    def _fresh_gradients(self) -> list[DTensor]:
        """DTensors for the reduced gradients: those of the last step unless somebody still holds
        one (building one costs tens of microseconds)."""
        if not self._grads or self._holders() != self._baseline:
            locals_ = self.core.empty_grads()
            specs = [self._grad_spec(i) for i in self._trainable]
            self._grads = [
                self._dtensor(local, spec) for local, spec in zip(locals_, specs, strict=True)
            ]
            del locals_
            self._baseline = self._holders()
        return self._grads

    def _take_gradients(self) -> None:
        """The reduction is over: adds it into the parameters' gradients, or makes it theirs."""
        parameters = [self.sharded[i] for i in self._trainable]
        unused = self.core.unused()
        gradients = [p.grad for p in parameters]
        if not unused and not any(g is not None for g in gradients):
            fresh = self._fresh_gradients()
            self.core.write_grads([g._local_tensor for g in fresh], [False] * len(fresh))
            for parameter, gradient in zip(parameters, fresh, strict=True):
                parameter.grad = gradient
        else:
            self._add_gradients(parameters, gradients, set(unused))
        for i, parameter in enumerate(parameters):
            hooks = getattr(parameter, "_post_accumulate_grad_hooks", None)
            if hooks and i not in unused:
                self.core.join_grads()  # the hook reads on this stream
                for hook in list(hooks.values()):
                    hook(parameter)

    def _add_gradients(
        self, parameters: list[nn.Parameter], gradients: list[torch.Tensor | None], unused: set[int]
    ) -> None:
        missing = [i for i, g in enumerate(gradients) if g is None and i not in unused]
        # Not the cached ones: a parameter that has a gradient may be using one of them.
        fresh = self.core.empty_grads() if missing else []
        targets: list[torch.Tensor | None] = [None] * len(parameters)
        for i, gradient in enumerate(gradients):
            if i in unused:
                continue
            if gradient is None:
                targets[i] = fresh[i]
            elif isinstance(gradient, DTensor):
                targets[i] = gradient._local_tensor
            else:
                raise ValueError(
                    f"the gradient of {self.names[self._trainable[i]]} is a "
                    f"{type(gradient).__name__}, not the DTensor that "
                    "backward left there: set it to None before the next backward, or change the "
                    "DTensor's local tensor"
                )
        self.core.write_grads(targets, [gradients[i] is not None for i in range(len(parameters))])
        for i in missing:
            parameters[i].grad = self._dtensor(fresh[i], self._grad_spec(self._trainable[i]))


def device_of(mesh: DeviceMesh, device_id: int | torch.device | None) -> torch.device:
    if isinstance(device_id, torch.device) and device_id.type != mesh.device_type:
        raise ValueError(
            f"device_id is {device_id} and device_mesh is on {mesh.device_type}: pass devices of "
            "one type"
        )
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    if isinstance(device_id, torch.device) and device_id.index is not None:
        return device_id
    if isinstance(device_id, int):
        return torch.device(mesh.device_type, device_id)
    return torch.device(
        mesh.device_type, torch.get_device_module(mesh.device_type).current_device()
    )


def own_slots(modules: list[nn.Module], ignored: set[nn.Parameter]) -> list[tuple[str, list[Slot]]]:
    """The parameters that no wrapper below holds, in the order of the modules, each with all its
    places."""
    found: dict[int, tuple[str, list[Slot]]] = {}

    def visit(owner: nn.Module, prefix: str, seen: set[nn.Module]) -> None:
        if owner in seen or "_hsdp_runner" in owner.__dict__:
            return
        seen.add(owner)
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter not in ignored:
                found.setdefault(id(parameter), (prefix + name, []))[1].append(Slot(owner, name))
        for name, child in owner._modules.items():
            if child is not None:
                visit(child, f"{prefix}{name}.", seen)

    seen: set[nn.Module] = set()
    for module in modules:
        visit(module, "", seen)
    return list(found.values())
