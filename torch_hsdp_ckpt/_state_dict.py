"""State dicts of wrapped modules: sharded, without a collective and without a copy.

A mix-in of ``FullyShardedDataParallel``; the static methods are torch FSDP1's.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import (
    OptimStateDictConfig,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictConfig,
    StateDictSettings,
    StateDictType,
)
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from .fsdp import FullyShardedDataParallel

_PREFIX = "_checkpoint_wrapped_module."
_SHOWN = 20  # names in one error message


def _wrappers(module: nn.Module) -> "list[FullyShardedDataParallel]":
    from .fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel.fsdp_modules(module)


def _listed(problems: list[str]) -> str:
    rest = len(problems) - _SHOWN
    return "\n\t".join(problems[:_SHOWN] + ([f"... and {rest} more"] if rest > 0 else []))


def _loads_plainly(module: nn.Module) -> bool:
    return isinstance(module, StateDictMixin) or (
        type(module)._load_from_state_dict is nn.Module._load_from_state_dict and not module._load_state_dict_pre_hooks
    )


def _offload(value: Any) -> Any:
    return value.cpu() if isinstance(value, torch.Tensor) and value.is_cuda else value


class StateDictMixin(nn.Module):
    """``state_dict`` and ``load_state_dict`` without the wrapper's own name in the keys, and FSDP1's state dict types."""

    _settings: StateDictSettings
    _checkpoint_wrapped_module: nn.Module

    def _reset(self) -> None:
        """The sharded parameters are in their slots and nothing derived from them is in flight."""
        raise AssertionError("the wrapper says how")

    def _init_state_dict(self) -> None:
        self._settings = StateDictSettings(
            StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(), ShardedOptimStateDictConfig(offload_to_cpu=False)
        )
        self.register_load_state_dict_pre_hook(_before_load)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The module's state: DTensors that share the live shards' memory, buffers and ignored parameters as they are.

        No communication, no copy. Hooks that were registered on the wrapper or inside are called. A value changes with the next
        ``optimizer.step()``; clone what has to stay.
        """
        if args:
            raise TypeError("state_dict takes keyword arguments only: destination, prefix, keep_vars")
        self._reset()
        if destination is None:
            destination = OrderedDict()
            destination._metadata = OrderedDict()
        for pre_hook in self._state_dict_pre_hooks.values():
            pre_hook(self, prefix, keep_vars)
        self._checkpoint_wrapped_module.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        metadata = destination._metadata.get(prefix[:-1], {})
        for hook in self._state_dict_hooks.values():
            result = hook(self, destination, prefix, metadata)
            if result is not None and not getattr(hook, "_from_public_api", False):
                destination = result
        if self._settings.state_dict_config.offload_to_cpu:
            for key in [k for k in destination if k.startswith(prefix)]:
                destination[key] = _offload(destination[key])
        return destination

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Copies ``state_dict`` into the shards (``assign``: into a new flat buffer that takes their place).

        Everything is checked first: keys (if ``strict``), shapes, meshes and placements. Raises RuntimeError that lists what
        does not fit; the module is then as it was. Modules that load in a way of their own (BatchNorm does) check their keys
        and buffers themselves, while they load: what one of them misses is raised after the rest was loaded.
        """
        self._reset()
        problems = self._misfits(state_dict)
        if strict and self._plain_loading():
            own = set(self.state_dict(keep_vars=True))
            problems += [f'Missing key: "{key}"' for key in sorted(own - set(state_dict))]
            problems += [f'Unexpected key: "{key}"' for key in sorted(set(state_dict) - own)]
        if problems:
            name = type(self._checkpoint_wrapped_module).__name__
            raise RuntimeError(f"Error(s) in loading state_dict for {name}; nothing was loaded:\n\t{_listed(problems)}")
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _plain_loading(self) -> bool:
        """Whether nobody inside loads in a way of its own, which may accept other keys than state_dict() has."""
        return all(_loads_plainly(m) for m in self.modules())

    def _misfits(self, state_dict: Mapping[str, Any]) -> list[str]:
        problems = []
        for path, module in self.named_modules():
            # Who loads in a way of its own may take buffers of other shapes (torch.ao's observers do).
            for name, buffer in module.named_buffers(recurse=False) if _loads_plainly(module) else ():
                key = f"{path}.{name}".replace(_PREFIX, "").removeprefix(".")
                value = state_dict.get(key)
                if (
                    isinstance(value, torch.Tensor)
                    and value.shape != buffer.shape
                    and (tuple(buffer.shape), tuple(value.shape)) != ((), (1,))
                ):
                    problems.append(
                        f'size mismatch for "{key}": {tuple(value.shape)} given, the module has {tuple(buffer.shape)}'
                    )
        for name, parameter in self.named_parameters(remove_duplicate=False):
            if name not in state_dict:
                continue
            value = state_dict[name]
            if not isinstance(value, torch.Tensor):
                problems.append(f'"{name}" is a {type(value).__name__}, not a tensor')
            elif value.shape != parameter.shape:
                problems.append(
                    f'size mismatch for "{name}": {tuple(value.shape)} given, the module has {tuple(parameter.shape)}'
                )
            elif isinstance(parameter, DTensor):
                if not isinstance(value, DTensor):
                    problems.append(
                        f'"{name}" is a plain tensor: load whole tensors with set_model_state_dict and full_state_dict=True'
                    )
                elif value.device_mesh != parameter.device_mesh or value.placements != parameter.placements:
                    problems.append(
                        f'"{name}" is placed {value.placements} on {value.device_mesh}, the module has {parameter.placements} '
                        f"on {parameter.device_mesh}: load it through torch.distributed.checkpoint, which reshards"
                    )
        return problems

    # -- FSDP1's static methods

    @staticmethod
    def set_state_dict_type(
        module: nn.Module,
        state_dict_type: StateDictType,
        state_dict_config: StateDictConfig | None = None,
        optim_state_dict_config: OptimStateDictConfig | None = None,
    ) -> StateDictSettings:
        """Sets what ``state_dict`` and ``optim_state_dict`` of all wrappers in ``module`` return; returns what it was.

        SHARDED_STATE_DICT (also the default) is served; for others ValueError names the way to get them.
        """
        if state_dict_type is not StateDictType.SHARDED_STATE_DICT:
            raise ValueError(
                f"{state_dict_type.name} is not served yet: torch.distributed.checkpoint.state_dict.get_model_state_dict with "
                "StateDictOptions(full_state_dict=True) gives whole tensors"
            )
        model_config = state_dict_config or ShardedStateDictConfig()
        optim_config = optim_state_dict_config or ShardedOptimStateDictConfig()
        if not isinstance(model_config, ShardedStateDictConfig) or not isinstance(optim_config, ShardedOptimStateDictConfig):
            raise ValueError("SHARDED_STATE_DICT takes ShardedStateDictConfig and ShardedOptimStateDictConfig")
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
        before = StateDictMixin.set_state_dict_type(module, state_dict_type, state_dict_config, optim_state_dict_config)
        try:
            yield
        finally:
            for wrapper in _wrappers(module):
                wrapper._settings = before

    @staticmethod
    def optim_state_dict(
        model: nn.Module, optim: torch.optim.Optimizer, optim_state_dict: dict[str, Any] | None = None, group: Any = None
    ) -> dict[str, Any]:
        """The optimizer's state by parameter names: ``{"state": {name: {...}}, "param_groups": [{"params": [names], ...}]}``.

        DTensors as the parameters are, sharing the optimizer's memory; nothing is sent. ``optim_state_dict``: what
        ``optim.state_dict()`` has returned, if it was called already. ``group`` is not needed.
        """
        source = optim.state_dict() if optim_state_dict is None else optim_state_dict
        names = _names_in_groups(model, optim)
        by_index = [name for group_names in names for name in group_names]
        offload = StateDictMixin.get_state_dict_type(model).optim_state_dict_config.offload_to_cpu
        state = {
            by_index[index]: {key: _offload(value) if offload else value for key, value in values.items()}
            for index, values in source["state"].items()
        }
        groups = [
            {**saved, "params": list(group_names)} for saved, group_names in zip(source["param_groups"], names, strict=True)
        ]
        return {"state": state, "param_groups": groups}

    @staticmethod
    def optim_state_dict_to_load(
        model: nn.Module,
        optim: torch.optim.Optimizer,
        optim_state_dict: dict[str, Any],
        is_named_optimizer: bool = False,
        load_directly: bool = False,
        group: Any = None,
    ) -> dict[str, Any]:
        """The inverse: what ``optim.load_state_dict`` takes, from what ``optim_state_dict`` has returned.

        Raises ValueError listing the names if the state is another model's or its groups are others.
        """
        if is_named_optimizer:
            raise ValueError("named optimizers are not served: pass a torch.optim.Optimizer and is_named_optimizer=False")
        names = _names_in_groups(model, optim)
        indices = {name: i for i, name in enumerate(name for group_names in names for name in group_names)}
        unknown = sorted(set(optim_state_dict["state"]) - set(indices))
        if unknown:
            raise ValueError(f"the optimizer has no such parameters:\n\t{_listed(unknown)}")
        saved_groups = optim_state_dict["param_groups"]
        if [sorted(g["params"]) for g in saved_groups] != [sorted(g) for g in names]:
            raise ValueError(
                f"the optimizer has {len(names)} parameter groups and the state {len(saved_groups)}, or of other names"
            )
        groups = [
            {**saved, "params": [indices[name] for name in group_names]}
            for saved, group_names in zip(saved_groups, names, strict=True)
        ]
        loadable = {"state": {indices[n]: v for n, v in optim_state_dict["state"].items()}, "param_groups": groups}
        if load_directly:
            optim.load_state_dict(loadable)
        return loadable


def _names_in_groups(model: nn.Module, optim: torch.optim.Optimizer) -> list[list[str]]:
    for wrapper in _wrappers(model):
        wrapper._reset()
    names = {id(parameter): name.replace(_PREFIX, "") for name, parameter in model.named_parameters()}
    groups = [[names.get(id(p), "") for p in group["params"]] for group in optim.param_groups]
    strangers = sum(name == "" for group in groups for name in group)
    if strangers:
        raise ValueError(
            f"{strangers} of the optimizer's parameters are not the model's: make the optimizer after wrapping, from "
            "model.parameters()"
        )
    return groups


def _before_load(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """The keys below this wrapper as nn.Module's loading looks for them."""
    module._reset()  # type: ignore[operator]
    inner = prefix + _PREFIX
    for key in [k for k in state_dict if k.startswith(prefix) and not k.startswith(inner)]:
        state_dict[inner + key[len(prefix) :]] = state_dict.pop(key)


def _after_load(module: nn.Module, incompatible: Any) -> None:
    for keys in incompatible:
        keys[:] = [key.replace(_PREFIX, "") for key in keys]
    module._unit.rebind()  # type: ignore[operator, union-attr]
