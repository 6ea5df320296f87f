"""How a module's state dict comes out: sharded, without a collective and without a copy; or made
whole from that."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from ...common.tensors import dtensor_around, local_of
from ..module_tree import child_prefix
from .whole import gather, offload


def collect(module: nn.Module, destination: Any, prefix: str, keep_vars: bool) -> None:
    """``module.state_dict(destination=...)``, where nobody has a say in it by an operator less a
    parameter: ``detach`` of a DTensor costs three times what making one does."""
    if _has_state_dict_of_its_own(module):
        module.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        return
    if hasattr(destination, "_metadata"):
        destination._metadata[prefix[:-1]] = {"version": module._version}
    collect_inside(module, destination, prefix, keep_vars)


def collect_inside(module: nn.Module, destination: Any, prefix: str, keep_vars: bool) -> None:
    """What ``module`` holds, asking its children, not itself, whether they have a say."""
    _collect_tensors(module, destination, prefix, keep_vars)
    if type(module).get_extra_state is not nn.Module.get_extra_state:
        destination[prefix + _EXTRA_STATE_KEY_SUFFIX] = module.get_extra_state()
    for name, child in module._modules.items():
        if child is not None:
            collect(child, destination, child_prefix(prefix, name), keep_vars)


def _collect_tensors(module: nn.Module, destination: Any, prefix: str, keep_vars: bool) -> None:
    # ``entries_of`` lists the same, but a state dict, which is also asked for between steps, would
    # take a quarter longer with it.
    for name, tensor in module._parameters.items():
        if tensor is not None:
            destination[prefix + name] = tensor if keep_vars else _detached(tensor)
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            destination[prefix + name] = buffer if keep_vars else buffer.detach()


def _has_state_dict_of_its_own(module: nn.Module) -> bool:
    """Whether a method or a hook, other than activation checkpointing's, may make its state
    another one."""
    kind = type(module)
    return bool(
        kind.state_dict is not nn.Module.state_dict
        or "state_dict" in module.__dict__
        or kind._save_to_state_dict is not nn.Module._save_to_state_dict
        or module._state_dict_pre_hooks
        or (module._state_dict_hooks and not _is_activation_wrapper(module))
    )


def _is_activation_wrapper(module: nn.Module) -> bool:
    """Whether it is torch's and has no hooks but its own, which does what ``collect`` does."""
    hooks = list(module._state_dict_hooks.values())
    return isinstance(module, ActivationWrapper) and hooks == [
        ActivationWrapper._post_state_dict_hook
    ]


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, DTensor):
        return dtensor_around(local_of(tensor).detach(), tensor._spec)
    return tensor.detach()


def offload_below(destination: dict[str, Any], prefix: str) -> None:
    for key in keys_below(destination, prefix):
        destination[key] = offload(destination[key])


def keys_below(destination: dict[str, Any], prefix: str) -> list[str]:
    return [key for key in destination if key.startswith(prefix)]


def make_whole(
    module: nn.Module,
    destination: dict[str, Any],
    prefix: str,
    first_only: bool,
    finish: Callable[[torch.Tensor], torch.Tensor],
) -> list[str]:
    """Puts whole tensors, which have gone through ``finish``, in place of the DTensors below
    ``prefix``; with ``first_only`` None on the other ranks. Returns the keys. Collective.

    Wrappers inside have done theirs before: a unit at a time."""
    sharing = _keys_by_parameter(module, destination, prefix)
    distinct = [destination[keys[0]] for keys in sharing]
    for keys, tensor in zip(sharing, gather(distinct, first_only, finish), strict=True):
        for key in keys:
            destination[key] = tensor
    return [key for keys in sharing for key in keys]


def _keys_by_parameter(
    module: nn.Module, destination: dict[str, Any], prefix: str
) -> list[list[str]]:
    """The keys of DTensors below ``prefix``. Those of a shared parameter stand together, so that
    they share the whole tensor too. The module says which these are, as empty shards have no
    address to tell."""
    parameter_of = {
        prefix + name: id(parameter)
        for name, parameter in module.named_parameters(remove_duplicate=False)
    }
    sharing: dict[int, list[str]] = {}
    for key in keys_below(destination, prefix):
        value = destination[key]
        if isinstance(value, DTensor):
            sharing.setdefault(parameter_of.get(key, id(value)), []).append(key)
    return list(sharing.values())
