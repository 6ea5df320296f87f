"""``FullyShardedDataParallel``: torch's FSDP1 interface on the C++ core.

A wrapped module's parameters are DTensors, sharded on dim 0 over the shard group and replicated over the replicas. They are
gathered for forward and backward and freed after; gradients are averaged over all ranks and sharded like the parameters.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import BackwardPrefetch, CPUOffload, MixedPrecision, ShardingStrategy
from torch.distributed.tensor import DTensor

from ._arguments import check_arguments, ignored_parameters, mesh_for
from ._root import Root, flat_tensors
from ._state_dict import StateDictMixin
from ._unit import ShardedUnit, Slot
from ._wrap import auto_wrap

WRAPPED = "_checkpoint_wrapped_module"
_PREFIX = WRAPPED + "."


class FullyShardedDataParallel(StateDictMixin, nn.Module):
    """Shards ``module``'s parameters over ``device_mesh`` and runs it, with torch FSDP1's constructor.

    ``device_mesh``: 2-D, dim 0 replicas and dim 1 shards, for ``HYBRID_SHARD`` and ``_HYBRID_SHARD_ZERO2``; 1-D for
    ``FULL_SHARD`` and ``SHARD_GRAD_OP``. Without it ``process_group`` (or the default group) makes a 1-D mesh.
    ``sharding_strategy``: None means what the mesh suggests. ``_ZERO2`` and ``SHARD_GRAD_OP`` keep the full parameters from
    forward to backward.
    ``auto_wrap_policy``: as torch's; each module it picks becomes a unit of its own, the rest belongs to this one.
    ``backward_prefetch``: the next unit's gather starts before (PRE) or after (POST) this one's gradients, or not ahead (None).
    ``forward_prefetch``, ``limit_all_gathers``: the next gather is always started ahead, and never more than that one.
    ``ignored_modules``, ``ignored_states``: stay plain parameters, in neither gathers nor reductions.
    ``device_id``: the module is moved there first. ``sync_module_states``: the first rank's values are sent to all.

    Numbers are those of torch's ``fully_shard`` on the same mesh: gradients are averaged over shards, then over replicas, a
    shard group of one included. A parameter that no rank's backward has reached keeps ``grad`` as it was.

    All ranks must construct, run forward and run backward in the same order, as with torch's wrappers.
    Raises ValueError for arguments that contradict each other or are not served, naming what to use instead.
    """

    def __init__(
        self,
        module: nn.Module,
        process_group: dist.ProcessGroup | None = None,
        sharding_strategy: ShardingStrategy | None = None,
        cpu_offload: CPUOffload | None = None,
        auto_wrap_policy: Callable[..., bool] | Any | None = None,
        backward_prefetch: BackwardPrefetch | None = BackwardPrefetch.BACKWARD_PRE,
        mixed_precision: MixedPrecision | None = None,
        ignored_modules: Iterable[nn.Module] | None = None,
        param_init_fn: Callable[[nn.Module], None] | None = None,
        device_id: int | torch.device | None = None,
        sync_module_states: bool = False,
        forward_prefetch: bool = False,
        limit_all_gathers: bool = True,
        use_orig_params: bool = True,
        ignored_states: Iterable[nn.Parameter] | Iterable[nn.Module] | None = None,
        device_mesh: DeviceMesh | None = None,
    ) -> None:
        check_arguments(module, cpu_offload, mixed_precision, param_init_fn, use_orig_params)
        not_ours: list[Any] = [*(ignored_modules or ()), *(ignored_states or ())]  # once: they may be generators
        ignored = ignored_parameters(module, not_ours)
        mesh, strategy = mesh_for(module, process_group, sharding_strategy, device_mesh, device_id)
        super().__init__()
        device = _device(mesh, device_id)
        if device_id is not None:
            module.to(device)
        if sync_module_states:
            _sync(module, mesh, ignored)
        if auto_wrap_policy is not None:
            options: dict[str, Any] = {
                "sharding_strategy": strategy,
                "backward_prefetch": backward_prefetch,
                "ignored_states": ignored,
                "device_mesh": mesh,
            }
            skip = {item for item in not_ours if isinstance(item, nn.Module)}
            auto_wrap(module, auto_wrap_policy, skip, ignored, lambda inner: FullyShardedDataParallel(inner, **options))
        self.device_mesh = mesh
        self.sharding_strategy = strategy
        self._prefetch = {None: 0, BackwardPrefetch.BACKWARD_PRE: 1, BackwardPrefetch.BACKWARD_POST: 2}[backward_prefetch]
        self._root: Root | None = None
        reshard = strategy in (ShardingStrategy.FULL_SHARD, ShardingStrategy.HYBRID_SHARD)
        self._unit = ShardedUnit(_own_slots(module, ignored), mesh, device, reshard)
        self._checkpoint_wrapped_module = module
        self._init_state_dict()

    # -- running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's forward. If it raises, the full parameters are freed and the wrapper can be used again."""
        root, unit = self._root, self._unit
        if root is None:
            root = self._make_root()
        unit.before_use()
        try:
            watched = flat_tensors((args, kwargs)) if unit.core.frozen else ()
            root.schedule.enter_forward(unit.core, torch.is_grad_enabled(), watched)
            unit.show_full()
            outputs = self._checkpoint_wrapped_module(*args, **kwargs)
            root.schedule.leave_forward(unit.core, flat_tensors(outputs))
        except BaseException:
            unit.show_sharded()
            root.schedule.abort_forward(unit.core)
            raise
        if not root.in_backward():
            unit.show_sharded()
        return outputs

    def _make_root(self) -> Root:
        """At the first call of an outermost wrapper: one schedule for all wrappers below. Collective over the mesh."""
        wrappers = self.fsdp_modules(self)
        if any(wrapper._root is not None for wrapper in wrappers):
            raise RuntimeError(
                "a wrapped module has been run on its own before the wrapper around it: call the outermost module first"
            )
        for name, module in self.named_modules():
            if isinstance(module, FullyShardedDataParallel):
                kind = type(module._checkpoint_wrapped_module).__name__
                module._unit.core.name = f"{(name + '.').replace(_PREFIX, '').strip('.') or '(outermost)'} ({kind})"
                module._unit.core.set_name(module._unit.core.name)
        root = Root([wrapper._unit for wrapper in wrappers], self._prefetch)
        for wrapper in wrappers:
            wrapper._root = root
        return root

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards inside keep their gradients, full size, on this rank; the first one outside reduces the sum."""
        root = self._root or self._make_root()
        before = [(unit.core, unit.core.sync) for unit in root.units]
        for core, _ in before:
            core.sync = False
        try:
            yield
        finally:
            for core, sync in before:
                core.sync = sync

    def _reset(self) -> None:
        if self._root is not None:
            self._root.reset()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "FullyShardedDataParallel":
        """``to``, ``double``, ``cuda`` and the like: on the shards, whose memory is bound again afterwards."""
        self._reset()
        self._unit.release()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._unit.rebind()
        return self

    def __getstate__(self) -> Any:
        """Neither ``copy`` nor ``pickle`` can take process groups along: TypeError says what to do."""
        raise TypeError(
            "a wrapped module can't be copied or pickled: copy the module before it is wrapped, or load this one's "
            "state_dict() into another wrapped module"
        )

    # -- looking inside

    @property
    def module(self) -> nn.Module:
        """The wrapped module."""
        return self._checkpoint_wrapped_module

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
            yield name.replace(_PREFIX, ""), parameter

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """As ``nn.Module``'s, with the names that the module has without wrappers."""
        for name, buffer in super().named_buffers(*args, **kwargs):
            yield name.replace(_PREFIX, ""), buffer

    @staticmethod
    def fsdp_modules(module: nn.Module, root_only: bool = False) -> "list[FullyShardedDataParallel]":
        """All wrappers in ``module``, outermost first; with ``root_only`` those that no other wrapper holds."""
        found = [m for m in module.modules() if isinstance(m, FullyShardedDataParallel)]
        if not root_only:
            return found
        inner = {id(m) for f in found for m in f.modules() if m is not f}
        return [f for f in found if id(f) not in inner]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``nn.Module``'s, of the sharded parameters, also where a backward that raised has left the full ones in place."""
        self._reset()
        super().zero_grad(set_to_none)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Scales all gradients so that their norm over all ranks' shards is at most ``max_norm``.

        Returns the norm before, a plain 0-d tensor, the same on all ranks; zero if there are no gradients. The gradients of
        ignored parameters count as this rank has them: whoever reduces those has to do so first.
        """
        self._reset()
        parameters = [p for p in self.parameters() if p.grad is not None]
        if not parameters:
            return torch.zeros((), device=self._unit.device)
        # DTensors of one mesh and plain tensors do not mix in one operator.
        by_mesh: dict[DeviceMesh | None, list[nn.Parameter]] = {}
        for parameter in parameters:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            by_mesh.setdefault(mesh, []).append(parameter)
        norms = [nn.utils.get_total_norm([cast(torch.Tensor, p.grad) for p in ps], norm_type) for ps in by_mesh.values()]
        norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
        norm = norms[0] if len(norms) == 1 else nn.utils.get_total_norm(norms, norm_type)
        for ps in by_mesh.values():
            nn.utils.clip_grads_with_norm_(ps, max_norm, norm)
        return norm


def _device(mesh: DeviceMesh, device_id: int | torch.device | None) -> torch.device:
    if isinstance(device_id, torch.device) and device_id.type != mesh.device_type:
        raise ValueError(f"device_id is {device_id} and device_mesh is on {mesh.device_type}: pass devices of one type")
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    if isinstance(device_id, torch.device) and device_id.index is not None:
        return device_id
    if isinstance(device_id, int):
        return torch.device(mesh.device_type, device_id)
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())


def _own_slots(module: nn.Module, ignored: set[nn.Parameter]) -> list[tuple[str, list[Slot]]]:
    """The parameters that no wrapper below holds, in the order of the modules, each with all its places."""
    found: dict[int, tuple[str, list[Slot]]] = {}

    def visit(owner: nn.Module, prefix: str, seen: set[nn.Module]) -> None:
        if owner in seen or isinstance(owner, FullyShardedDataParallel):
            return
        seen.add(owner)
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter not in ignored:
                found.setdefault(id(parameter), (prefix + name, []))[1].append(Slot(owner, name))
        for name, child in owner._modules.items():
            if child is not None:
                visit(child, f"{prefix}{name}.", seen)

    visit(module, "", set())
    return list(found.values())


def _sync(module: nn.Module, mesh: DeviceMesh, ignored: set[nn.Parameter]) -> None:
    """Rank (0, 0) of the mesh to all: down the replicas first, then along every shard group."""
    tensors = [p.detach() for p in module.parameters() if p not in ignored and not isinstance(p, DTensor)]
    tensors += [b.detach() for b in module.buffers()]
    for dim in range(mesh.ndim):
        for tensor in tensors:
            dist.broadcast(tensor, group=mesh.get_group(dim), group_src=0)
