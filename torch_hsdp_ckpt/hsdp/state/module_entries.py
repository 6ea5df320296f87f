"""What a tree of modules takes from a state dict: its keys, the tensors that loading fills, and
whether code other than this package's and ``nn.Module``'s has a say in it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from ..module_tree import child_prefix

_CHECKS_FIRST = "_hsdp_ckpt_checks_first"  # the attribute that checks_first sets on a function
_Function = TypeVar("_Function", bound=Callable[..., Any])


class Entry(NamedTuple):
    """A parameter or persistent buffer of ``module``, which loading fills."""

    key: str
    module: nn.Module
    name: str
    tensor: torch.Tensor


class CustomLeaf(NamedTuple):
    """A module with a ``_load_from_state_dict`` of its own; its keys start with ``prefix``."""

    prefix: str
    module: nn.Module

    @property
    def is_norm(self) -> bool:
        """Whether it is torch's BatchNorm or InstanceNorm, which load as other modules do but for
        one buffer that old checkpoints lack."""
        return isinstance(self.module, _NormBase)

    def entries(self) -> list[Entry]:
        return entries_of(self.module, self.prefix)


@dataclass(frozen=True)
class ModuleEntries:
    """``entries``: filled by a copy; those of ``custom_leaves`` are not among them. ``keys``: of
    all entries and of extra state, in the order of ``state_dict()``. ``runs_custom_code``: hooks,
    extra state or containers may do anything in a load, so that it can't be checked before."""

    entries: list[Entry]
    custom_leaves: list[CustomLeaf]
    keys: list[str]
    runs_custom_code: bool

    @staticmethod
    def of(root: nn.Module, prefix: str = "") -> "ModuleEntries":
        entries: list[Entry] = []
        custom_leaves: list[CustomLeaf] = []
        keys: list[str] = []
        modules = _modules_by_prefix(root, prefix)
        for path, module in modules:
            modules_own = entries_of(module, path)
            if _has_extra_state(module):
                keys.append(path + _EXTRA_STATE_KEY_SUFFIX)
            keys.extend([entry.key for entry in modules_own])
            if _fills_itself(module):
                custom_leaves.append(CustomLeaf(path, module))
            else:
                entries.extend(modules_own)
        runs_custom_code = _runs_custom_code([module for _, module in modules])
        return ModuleEntries(entries, custom_leaves, keys, runs_custom_code)


def _modules_by_prefix(root: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    """Every module with the prefix of its keys, parents first; a module in two places comes
    twice."""
    found: list[tuple[str, nn.Module]] = []
    _add_modules_by_prefix(found, root, prefix)
    return found


# This is no closure: see ``module_tree._add_modules_of_unit``.
def _add_modules_by_prefix(
    found: list[tuple[str, nn.Module]], module: nn.Module, prefix: str
) -> None:
    found.append((prefix, module))
    for name, child in module._modules.items():
        if child is not None:
            _add_modules_by_prefix(found, child, child_prefix(prefix, name))


def entries_of(module: nn.Module, prefix: str) -> list[Entry]:
    """The module's own entries, without its children's."""
    tensors: dict[str, torch.Tensor | None] = dict(module._parameters)
    for name, buffer in module._buffers.items():
        if name not in module._non_persistent_buffers_set:
            tensors[name] = buffer
    return [
        Entry(prefix + name, module, name, tensor)
        for name, tensor in tensors.items()
        if tensor is not None
    ]


def checks_first(function: _Function) -> _Function:
    """Marks a load hook or a ``load_state_dict`` as one of this package: it forgives no key and
    takes no other values, so that what was checked before still holds."""
    setattr(function, _CHECKS_FIRST, True)
    return function


def _runs_custom_code(modules: list[nn.Module]) -> bool:
    # Classes are asked once each: a model has few of them, and thousands of modules.
    if any(map(_overrides_load_state_dict, {type(module) for module in modules})):
        return True
    return any(
        _has_custom_hooks(module._load_state_dict_pre_hooks)
        or _has_custom_hooks(module._load_state_dict_post_hooks)
        or _has_extra_state(module)
        or (_fills_itself(module) and module._modules)
        for module in modules
    )


def _has_custom_hooks(hooks: Mapping[int, Any]) -> bool:
    if not hooks:
        return False
    functions = [getattr(hook, "hook", hook) for hook in hooks.values()]
    return not all(
        getattr(function, _CHECKS_FIRST, False)
        or function is ActivationWrapper._pre_load_state_dict_hook
        for function in functions
    )


def _overrides_load_state_dict(kind: type[nn.Module]) -> bool:
    methods = [base.__dict__.get("load_state_dict") for base in kind.__mro__]
    return any(
        method is not None
        and method is not nn.Module.load_state_dict
        and not getattr(method, _CHECKS_FIRST, False)
        for method in methods
    )


def _has_extra_state(module: nn.Module) -> bool:
    kind = type(module)
    return (
        kind.set_extra_state is not nn.Module.set_extra_state
        or kind.get_extra_state is not nn.Module.get_extra_state
    )


def _fills_itself(module: nn.Module) -> bool:
    return type(module)._load_from_state_dict is not nn.Module._load_from_state_dict
