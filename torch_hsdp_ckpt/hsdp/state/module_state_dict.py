"""What users call for a module's state: a mix-in of ``FullyShardedDataParallel`` that has
``state_dict``, ``load_state_dict``, and torch FSDP1's static methods that set their form.

``module_out`` collects, ``whole`` gathers, ``module_plan`` checks a load, ``module_in`` does it."""

import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    LocalOptimStateDictConfig,
    LocalStateDictConfig,
    OptimStateDictConfig,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictConfig,
    StateDictSettings,
    StateDictType,
)

from ...common.gate import wait_at_gate
from ..module_tree import WRAPPED_PREFIX, without_wrappers
from ..precision import restore_buffers
from ..runner import Runner
from ..unit import ShardedUnit, mesh_of_state
from .module_entries import ModuleEntries, checks_first
from .module_in import load
from .module_out import collect_inside, keys_below, make_whole, offload_below
from .module_plan import LoadRequest, cut_whole_tensors
from .optimizer_state_dict import OptimStateMixin, default_settings, unit_holders
from .placement import is_first
from .whole import keep, offload

_CONFIGS: dict[StateDictType, tuple[type[StateDictConfig], type[OptimStateDictConfig]]] = {
    StateDictType.SHARDED_STATE_DICT: (ShardedStateDictConfig, ShardedOptimStateDictConfig),
    StateDictType.FULL_STATE_DICT: (FullStateDictConfig, FullOptimStateDictConfig),
    StateDictType.LOCAL_STATE_DICT: (LocalStateDictConfig, LocalOptimStateDictConfig),
}


class StateDictMixin(OptimStateMixin, nn.Module):
    """``state_dict`` and ``load_state_dict`` without the wrapper's own name in the keys, and
    FSDP1's state dict types."""

    _settings: StateDictSettings
    _checkpoint_wrapped_module: nn.Module
    _unit: ShardedUnit
    _runner: Runner

    def _init_state_dict(self) -> None:
        self._settings = default_settings()
        self.register_load_state_dict_pre_hook(_before_load)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]

    @property
    def _full(self) -> bool:
        return self._settings.state_dict_type is StateDictType.FULL_STATE_DICT

    def state_dict(
        self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> Any:
        """The module's state under the names it has without wrappers; non-persistent buffers are
        left out.

        SHARDED_STATE_DICT (the default) gives DTensors that share the live shards' memory, and
        buffers and ignored parameters as they are. Nothing is sent or copied. A value changes with
        the next ``optimizer.step()``; clone what has to stay.

        FULL_STATE_DICT gives whole tensors, which are copies. The call is then collective. With
        ``rank0_only`` other ranks get what their ranks alone have: ignored parameters, else
        nothing. With ``offload_to_cpu`` the device holds one tensor, or one bucket of small ones,
        at a time.

        Buffers that ``MixedPrecision(buffer_dtype)`` has converted come as copies in the dtype that
        they had before (with ``keep_vars`` as they are).

        Hooks that were registered on the wrapper or inside are called; they see the shards, as
        values become whole after them.

        It may be called from any thread: it waits for the others' forward or backward to end, and
        theirs for it. A FULL_STATE_DICT does not wait, as ranks would gather in different orders:
        it is a RuntimeError on every rank where a forward or backward is under way. A rank where
        none is does not know of that, and waits in the gather for as long as the group's
        timeout."""
        if args:
            raise TypeError(
                "state_dict takes keyword arguments only: destination, prefix, keep_vars"
            )
        with self._runner.reading("whole state dict" if self._full else ""):
            return self._read_state(destination, prefix, keep_vars)

    def _read_state(self, destination: Any, prefix: str, keep_vars: bool) -> Any:
        if destination is None:
            destination = OrderedDict()
            destination._metadata = OrderedDict()
        for pre_hook in self._state_dict_pre_hooks.values():
            pre_hook(self, prefix, keep_vars)
        collect_inside(self, destination, prefix, keep_vars)
        if self._runner.precision.buffer_dtype is not None and not keep_vars:
            restore_buffers(self._checkpoint_wrapped_module, destination, prefix)
        destination = self._call_state_dict_hooks(destination, prefix)
        if self._full:
            self._make_whole(destination, prefix)
        if self._settings.state_dict_config.offload_to_cpu:
            offload_below(destination, prefix)
        return destination

    def _call_state_dict_hooks(self, destination: Any, prefix: str) -> Any:
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1], {})
        for hook in self._state_dict_hooks.values():
            result = hook(self, destination, prefix, metadata)
            if result is None:
                continue
            if getattr(hook, "_from_public_api", False):
                raise RuntimeError("state_dict post-hook must return None")
            destination = result
        return destination

    def _make_whole(self, destination: dict[str, Any], prefix: str) -> None:
        config = self._settings.state_dict_config
        first_only = bool(getattr(config, "rank0_only", False))
        finish = offload if config.offload_to_cpu else keep
        keys = make_whole(self, destination, prefix, first_only, finish)
        if first_only and not is_first(self._mesh_of_state()):
            keys += [prefix + name for name, _ in self.named_buffers(remove_duplicate=False)]
            for key in keys:
                destination.pop(key, None)

    @checks_first
    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Copies ``state_dict`` into the shards (``assign``: into a new flat buffer that takes
        their place).

        Values are as ``state_dict()`` returns them: DTensors placed as the parameters are; under
        FULL_STATE_DICT also whole tensors, which every rank has to have, whatever ``rank0_only``
        says, as in torch. (``set_model_state_dict`` with ``broadcast_from_rank0=True`` takes them
        from rank 0.) Each byte is copied once.

        Collective: what does not fit on one rank is a RuntimeError on all of them that lists it,
        and the module is as it was. Missing and unexpected keys are errors if ``strict``, and
        returned otherwise; so are other dtypes, which without ``strict`` are converted; other
        shapes, meshes and placements always are. If somebody has registered load hooks, or modules
        load in a way of their own, the shards are copied first, to be put back if loading fails.
        """
        wait_at_gate()
        self._runner.reset()

        def as_nn_module_does(given: Mapping[str, Any]) -> Any:
            return super(StateDictMixin, self).load_state_dict(given, strict=strict, assign=assign)

        request = LoadRequest(
            root=self,
            mesh=self._mesh_of_state(),
            state_dict=state_dict,
            strict=strict,
            assign=assign,
            module_load=as_nn_module_does,
            takes_whole=self._full,
            hint=self._hint_for_load(state_dict),
        )
        return load(request)

    def _mesh_of_state(self) -> DeviceMesh:
        inside = self._runner.runners_inside()
        return mesh_of_state([unit for runner in inside for unit in runner.units])

    def _hint_for_load(self, state_dict: Mapping[str, Any]) -> str:
        rank0_only = getattr(self._settings.state_dict_config, "rank0_only", False)
        if not rank0_only or state_dict:
            return ""
        return (
            "rank0_only is for saving: to load, every rank needs the values "
            "(set_model_state_dict with broadcast_from_rank0=True and full_state_dict=True takes "
            "them from rank 0)"
        )

    # -- FSDP1's static methods

    @staticmethod
    def set_state_dict_type(
        module: nn.Module,
        state_dict_type: StateDictType,
        state_dict_config: StateDictConfig | None = None,
        optim_state_dict_config: OptimStateDictConfig | None = None,
    ) -> StateDictSettings:
        """Sets what ``state_dict`` and ``optim_state_dict`` of all wrappers in ``module`` return;
        returns what it was.

        torch's ``get_model_state_dict`` and its kin ask ``state_dict``: leave SHARDED_STATE_DICT
        set for them, and say ``full_state_dict`` in their options instead. (torch's FSDP1 has its
        type set by them.)

        LOCAL_STATE_DICT, in FSDP1 this rank's piece of a flat parameter, is the sharded one here,
        with a warning. RuntimeError for configs of another type than ``state_dict_type``'s."""
        if state_dict_type is StateDictType.LOCAL_STATE_DICT:
            warnings.warn(
                "LOCAL_STATE_DICT is the SHARDED_STATE_DICT here: DTensors around this rank's "
                "shards, by the names of the parameters. There is no flat parameter",
                stacklevel=2,
            )
        model_type, optim_type = _CONFIGS[state_dict_type]
        model_config = model_type() if state_dict_config is None else state_dict_config
        optim_config = optim_type() if optim_state_dict_config is None else optim_state_dict_config
        for config, expected in ((model_config, model_type), (optim_config, optim_type)):
            if type(config) is not expected:
                raise RuntimeError(
                    f"{state_dict_type.name} takes a {expected.__name__}, not a "
                    f"{type(config).__name__}"
                )
        before = StateDictMixin.get_state_dict_type(module)
        for wrapper in _wrappers(module):
            wrapper._settings = StateDictSettings(state_dict_type, model_config, optim_config)
        return before

    @staticmethod
    def get_state_dict_type(module: nn.Module) -> StateDictSettings:
        """What ``set_state_dict_type`` has set. ValueError if ``module`` holds no wrapper."""
        wrappers = _wrappers(module)
        if not wrappers:
            raise ValueError(f"{type(module).__name__} holds no FullyShardedDataParallel module")
        return wrappers[0]._settings

    @staticmethod
    @contextmanager
    def state_dict_type(
        module: nn.Module,
        state_dict_type: StateDictType,
        state_dict_config: StateDictConfig | None = None,
        optim_state_dict_config: OptimStateDictConfig | None = None,
    ) -> Iterator[None]:
        """``set_state_dict_type`` for a ``with`` block."""
        before = [(wrapper, wrapper._settings) for wrapper in _wrappers(module)]
        StateDictMixin.set_state_dict_type(
            module, state_dict_type, state_dict_config, optim_state_dict_config
        )
        try:
            yield
        finally:
            for wrapper, settings in before:
                wrapper._settings = settings


def _wrappers(module: nn.Module) -> list[StateDictMixin]:
    return [m for m in unit_holders(module) if isinstance(m, StateDictMixin)]


@checks_first
def _before_load(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Renames the keys below this wrapper to what ``nn.Module``'s loading looks for. What somebody
    has hung on the wrapper itself keeps its keys."""
    assert isinstance(module, StateDictMixin)
    # load_state_dict above has done both, but a module around this one may be what is loaded, or a
    # user's hook may have come in between.
    wait_at_gate()
    module._runner.reset()
    if module._full:
        cut_whole_tensors(state_dict, ModuleEntries.of(module, prefix).entries)
    inner = prefix + WRAPPED_PREFIX
    own = {prefix + name for name in (*module._parameters, *module._buffers)}
    below_own = tuple(f"{prefix}{name}." for name in module._modules)  # ``inner`` among them
    for key in keys_below(state_dict, prefix):
        if key not in own and not key.startswith(below_own):
            state_dict[inner + key[len(prefix) :]] = state_dict.pop(key)


@checks_first
def _after_load(module: nn.Module, incompatible: Any) -> None:
    assert isinstance(module, StateDictMixin)
    for keys in incompatible:
        keys[:] = [without_wrappers(key) for key in keys]
    module._unit.rebind()
    if module._runner.root is not None:
        module._runner.cast_buffers()  # ``assign`` may have brought other ones
