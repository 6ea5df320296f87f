"""``FullyShardedDataParallel``: torch's FSDP1 interface on the C++ core.

A wrapped module's parameters are DTensors, sharded on dim 0 over the shard group and replicated
over the replicas. They are gathered for forward and backward and freed after; gradients are
averaged over all ranks and sharded like the parameters."""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import BackwardPrefetch, CPUOffload, MixedPrecision, ShardingStrategy
from torch.distributed.fsdp._common_utils import TrainingState

from .. import _C
from .adoption import adopt_everywhere, postponed
from .arguments import IgnoredStates, NotSupportedError, at, check_module, offloads
from .clip import clip_grad_norm
from .data_parallel import DataParallel
from .materialize import materialize, move, synchronize
from .meshes import device_of, mesh_for
from .module_tree import WRAPPED, without_wrappers
from .precision import Precision
from .runner import Runner, named_runners
from .sharding import UnitSettings, only_unit
from .slots import parameters_of_unit
from .state.module_state_dict import StateDictMixin
from .summon import SummonOptions, summon
from .torchs_view import refuse_torchs
from .wrap import auto_wrap

_PREFETCH = {
    None: _C.BackwardPrefetch.NONE,
    BackwardPrefetch.BACKWARD_PRE: _C.BackwardPrefetch.PRE,
    BackwardPrefetch.BACKWARD_POST: _C.BackwardPrefetch.POST,
}


class FullyShardedDataParallel(StateDictMixin, nn.Module):
    """Shards ``module``'s parameters over ``device_mesh`` and runs it, with torch FSDP1's
    constructor.

    ``device_mesh``: 2-D, dim 0 replicas and dim 1 shards, for ``HYBRID_SHARD`` and
    ``_HYBRID_SHARD_ZERO2``; 1-D for ``FULL_SHARD`` and ``SHARD_GRAD_OP``. ``process_group`` makes
    it instead: one group for a 1-D mesh (None: the default one), (shard group, replica group) for a
    2-D one (None: the ranks of a host are the shards, by LOCAL_WORLD_SIZE). ``sharding_strategy``:
    None means what the mesh suggests. ``_ZERO2`` and ``SHARD_GRAD_OP`` keep the full parameters
    from forward to backward. ``NO_SHARD``: every rank holds all; the mesh becomes (ranks, 1).
    ``cpu_offload``: parameters and gradients are on the CPU, in pinned memory, and steps are made
    there; on a CPU mesh they are anyway.
    ``auto_wrap_policy``: as torch's; each module it picks becomes a unit of its own, the rest
    belongs to this one. ``CustomPolicy`` may give a unit other arguments than the rest.
    ``backward_prefetch``: the next unit's gather starts before this one's gradients (PRE; on a
    device halfway through), after them (POST) or not ahead (None). ``forward_prefetch``,
    ``limit_all_gathers``: the next gather is always started ahead, and never more than that one.
    ``mixed_precision``: as torch's; with
    ``auto_wrap_policy`` the classes it excepts (BatchNorm) become units in float32.
    ``ignored_modules``, ``ignored_states``: stay plain parameters, in neither gathers nor
    reductions. ``param_init_fn``: gives modules on the meta device memory and values; without it
    ``to_empty`` and ``reset_parameters``. ``device_id``: the module is moved there first.
    ``sync_module_states``: the first rank's values are sent to all. ``use_orig_params``: parameters
    always are the module's own here, as with True; False asks for less and is taken.

    Numbers are those of torch's ``fully_shard`` on the same mesh: gradients are averaged over
    shards, then over replicas, a shard group of one included. A parameter that no rank's backward
    has reached keeps ``grad`` as it was.

    All ranks must construct, run forward and run backward in the same order, as with torch's
    wrappers; ranks that don't get a RuntimeError that names rank and module. Raises ValueError for
    arguments that contradict each other or are not supported, naming what to use instead."""

    def __init__(
        self,
        module: nn.Module,
        process_group: dist.ProcessGroup
        | tuple[dist.ProcessGroup, dist.ProcessGroup]
        | None = None,
        sharding_strategy: ShardingStrategy | None = None,
        cpu_offload: CPUOffload | None = None,
        auto_wrap_policy: Callable[..., bool] | Any | None = None,
        backward_prefetch: BackwardPrefetch | None = BackwardPrefetch.BACKWARD_PRE,
        mixed_precision: MixedPrecision | None = None,
        ignored_modules: Iterable[nn.Module] | None = None,
        param_init_fn: Callable[[nn.Module], None] | None = None,
        device_id: int | str | torch.device | None = None,
        sync_module_states: bool = False,
        forward_prefetch: bool = False,
        limit_all_gathers: bool = True,
        use_orig_params: bool = True,
        ignored_states: Iterable[nn.Parameter] | Iterable[nn.Module] | None = None,
        device_mesh: DeviceMesh | None = None,
    ) -> None:
        check_module(module, "FullyShardedDataParallel")
        device_id = torch.device(device_id) if isinstance(device_id, str) else device_id
        ignored = IgnoredStates.of(module, [*(ignored_modules or ()), *(ignored_states or ())])
        mesh, strategy = mesh_for(module, process_group, sharding_strategy, device_mesh, device_id)
        precision = Precision.of(mixed_precision, module)
        super().__init__()
        device = device_of(mesh, device_id)
        if device_id is not None:
            move(module, device)
        if auto_wrap_policy is not None:
            arguments_inside: dict[str, Any] = {
                "sharding_strategy": strategy,
                "backward_prefetch": backward_prefetch,
                "mixed_precision": mixed_precision,
                "param_init_fn": param_init_fn,
                "sync_module_states": sync_module_states,
                "device_mesh": mesh,
                "cpu_offload": cpu_offload,
            }
            _wrap_inside(module, auto_wrap_policy, ignored, arguments_inside)
        skipped = ignored.modules_inside()
        materialize(module, param_init_fn, device, skipped, ignored.parameters)
        if sync_module_states:
            synchronize(module, mesh, ignored.parameters)
        self.device_mesh = mesh
        self.sharding_strategy = strategy
        self.cpu_offload = CPUOffload(offload_params=offloads(cpu_offload))
        self.mixed_precision = MixedPrecision() if mixed_precision is None else mixed_precision
        self.backward_prefetch = backward_prefetch
        registered = parameters_of_unit([module], ignored.parameters)
        reshard, memory = _reshard_after_forward(strategy), _memory_of(cpu_offload)
        settings = UnitSettings(device, reshard, precision, memory)
        self._unit = only_unit(registered, DataParallel(mesh), settings)
        self._checkpoint_wrapped_module = module
        label = type(module).__name__
        before = _PREFETCH[backward_prefetch]
        self._runner = Runner(self, [self._unit], before, precision, label, skipped)
        self._init_state_dict()
        adopt_everywhere()

    # -- running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's forward. If it raises, the full parameters are freed and the wrapper
        can be used again."""
        return self._runner.run(self._checkpoint_wrapped_module, args, kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards inside keep their gradients, full size, on this rank; the first one outside
        reduces the sum."""
        cores = [unit.core for unit in self._runner.root_of_all().units]
        before = [core.sync for core in cores]
        for core in cores:
            core.sync = False
        try:
            yield
        finally:
            for core, sync in zip(cores, before, strict=True):
                core.sync = sync

    def check_is_root(self) -> bool:
        """Whether this is the outermost wrapper. Before any forward the one that is asked becomes
        it, as in torch."""
        return self._runner.root_of_all().units[0] is self._unit

    @staticmethod
    @contextmanager
    def summon_full_params(
        module: nn.Module,
        recurse: bool = True,
        writeback: bool = True,
        rank0_only: bool = False,
        offload_to_cpu: bool = False,
        with_grads: bool = False,
    ) -> Iterator[None]:
        """Within the block the module's parameters are whole, plain and in full precision; forward
        and backward are refused.

        Collective. ``recurse``: also of the wrappers inside ``module``. ``writeback``: changes go
        into the shards at the end, from each rank its own rows; where a parameter is not sharded
        (NO_SHARD, shard groups of one rank) they always do, as in torch. ``rank0_only``: only rank
        0 sees whole parameters; the others keep their shards (not with ``writeback``:
        NotImplementedError). ``offload_to_cpu``: the whole parameters are on the CPU.
        ``with_grads``: the gradients are whole too, and written back likewise where there was one
        before and is one at the end; else they are None."""
        runners: list[Runner] = []
        if recurse:
            runners = [runner for _, runner in named_runners(module)]
        elif isinstance(module, FullyShardedDataParallel):
            runners = [module._runner]
        options = SummonOptions(writeback, rank0_only, offload_to_cpu, with_grads)
        with summon(runners, options):
            yield

    def apply(self, fn: Callable[[nn.Module], None]) -> "FullyShardedDataParallel":
        """``nn.Module.apply`` on whole parameters, one wrapper after the other; what ``fn`` changes
        is kept. Collective."""
        with FullyShardedDataParallel.summon_full_params(self, recurse=False, writeback=True):
            return super().apply(fn)

    def register_comm_hook(self, state: object, hook: Callable[..., Any]) -> None:
        """From the next backward on ``hook`` reduces the gradients of each unit, as with torch's
        FSDP1 and its ``torch.distributed.algorithms._comm_hooks.default_hooks``.

        ``hook(state, gradient, shard)``: ``gradient`` is one dimension, in the reduce dtype, a
        chunk for each rank of ``process_group`` in its order; the average of this rank's chunks is
        to be in ``shard`` when the hook returns (on a device, when the current stream comes there).
        Under NO_SHARD ``hook(state, gradient)``, which averages in place. On the CPU the hooks of a
        backward are called at its end. The same on all ranks, for the outermost wrapper and all
        inside. Raises ValueError for a wrapper inside, for hybrid strategies (as torch does), and a
        second time; TypeError for what can't be called."""
        if not callable(hook):
            raise TypeError(f"a communication hook is called, and a {type(hook).__name__} can't be")
        if not self.check_is_root():
            raise ValueError(
                f"{at(self)}register_comm_hook is for the outermost wrapper, "
                f"{self._runner.root_of_all().units[0].core.name}"
            )
        units = [unit for runner in self._runner.runners_inside() for unit in runner.units]
        for unit in units:
            if unit.mesh.ndim == 2 and unit.mesh.size(1) > 1:
                raise NotSupportedError(
                    f"{at(self)}communication hooks know one process group, and module "
                    f"{unit.core.name} has one of shards and one of replicas: pass "
                    "MixedPrecision(reduce_dtype=...), or use fully_shard's set_all_reduce_hook"
                )
            if unit.communication.has_comm_hook:
                raise ValueError(f"{at(self)}module {unit.core.name} has a communication hook")
        self._runner.reset()
        for unit in units:
            unit.communication.set_comm_hook(functools.partial(hook, state))

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> "FullyShardedDataParallel":
        """``to``, ``double``, ``cuda`` and the like: on the shards, whose memory is bound again
        afterwards."""
        if self._unit.summoned:
            raise RuntimeError(
                "a wrapped module can't be converted or moved while its full parameters are "
                "summoned"
            )
        as_module: Any = super()
        self._runner.apply_to_shards(lambda: as_module._apply(fn, recurse))
        return self

    def __getstate__(self) -> Any:
        """Neither ``copy`` nor ``pickle`` can take process groups along: TypeError says what to
        do."""
        raise TypeError(
            "a wrapped module can't be copied or pickled: copy the module before it is wrapped, or "
            "load this one's state_dict() into another wrapped module"
        )

    # -- looking inside

    @property
    def module(self) -> nn.Module:
        """The wrapped module."""
        return self._checkpoint_wrapped_module

    # torch's name of it, which others walk along.
    @property
    def _fsdp_wrapped_module(self) -> nn.Module:
        return self._checkpoint_wrapped_module

    @property
    def training_state(self) -> TrainingState:
        """Whether a forward or backward of this thread is under way, or ``summon_full_params``."""
        if self._unit.summoned:
            return TrainingState.SUMMON_FULL_PARAMS
        root = self._runner.root
        runs = root is not None and root.schedule.running_here()
        return TrainingState.FORWARD_BACKWARD if runs else TrainingState.IDLE

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The shard group; under NO_SHARD the group of all ranks of the mesh."""
        unsharded = self.sharding_strategy is ShardingStrategy.NO_SHARD
        return self.device_mesh.get_group(0 if unsharded else self.device_mesh.ndim - 1)

    @property
    def rank(self) -> int:
        """This rank in ``process_group``."""
        return dist.get_rank(self.process_group)

    @property
    def world_size(self) -> int:
        """The number of ranks of ``process_group``."""
        return dist.get_world_size(self.process_group)

    @property
    def compute_device(self) -> torch.device:
        """Where the parameters are, and forward computes."""
        return self._unit.device

    def __getattr__(self, name: str) -> Any:
        """Attributes that the wrapper lacks are the wrapped module's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == WRAPPED:
                raise
            return getattr(self._checkpoint_wrapped_module, name)

    def __getitem__(self, key: Any) -> Any:
        """Items of a wrapped container."""
        return self._checkpoint_wrapped_module.__getitem__(key)  # type: ignore[operator]

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As ``nn.Module``'s, with the names that the module has without wrappers."""
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield without_wrappers(name), parameter

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """As ``nn.Module``'s, with the names that the module has without wrappers."""
        for name, buffer in super().named_buffers(*args, **kwargs):
            yield without_wrappers(name), buffer

    @staticmethod
    def fsdp_modules(
        module: nn.Module, root_only: bool = False
    ) -> "list[FullyShardedDataParallel]":
        """All wrappers in ``module``, outermost first; with ``root_only`` those that no other
        wrapper holds."""
        found = [m for m in module.modules() if isinstance(m, FullyShardedDataParallel)]
        if not root_only:
            return found
        inner = {id(m) for f in found for m in f.modules() if m is not f}
        return [f for f in found if id(f) not in inner]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``nn.Module``'s, of the sharded parameters, also where a backward that raised has left
        the full ones in place; and of what ``no_sync`` has kept, which an optimizer's ``zero_grad``
        does not know of."""
        self._runner.drop_gradients()
        super().zero_grad(set_to_none)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Scales all gradients so that their norm over all ranks' shards is at most ``max_norm``.

        Returns the norm before, a plain 0-d tensor, the same on all ranks; zero if there are no
        gradients. The gradients of ignored parameters count as this rank has them: whoever reduces
        those has to do so first."""
        self._runner.reset()
        return clip_grad_norm(self.parameters(), max_norm, norm_type, self._unit.device)


def _memory_of(cpu_offload: CPUOffload | bool | None) -> _C.ShardMemory:
    return _C.ShardMemory.PINNED if offloads(cpu_offload) else _C.ShardMemory.DEVICE


def _reshard_after_forward(strategy: ShardingStrategy) -> bool | None:
    """None frees after forward, except for what backward needs first."""
    frees = strategy in (ShardingStrategy.FULL_SHARD, ShardingStrategy.HYBRID_SHARD)
    return None if frees else False


refuse_torchs(FullyShardedDataParallel)


def _wrap_inside(
    module: nn.Module, policy: Any, ignored: IgnoredStates, arguments: dict[str, Any]
) -> None:
    """Makes units of the modules inside that ``policy`` picks. ``arguments``: the outer wrapper's,
    for all of them; what the policy asks for one module comes before."""
    mixed_precision = arguments["mixed_precision"]
    excepted = mixed_precision._module_classes_to_ignore if mixed_precision is not None else ()
    common = {
        **arguments,
        "ignored_modules": ignored.modules,
        "ignored_states": ignored.parameters,
    }

    def wrap(inner: nn.Module, own: dict[str, Any]) -> FullyShardedDataParallel:
        given = {**common, **own}
        if "process_group" in own and "device_mesh" not in own:
            del given["device_mesh"]
        return FullyShardedDataParallel(inner, **given)

    with postponed():
        auto_wrap(module, policy, ignored, tuple(excepted), wrap)
