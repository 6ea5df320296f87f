"""The constructors' arguments: what they mean, and clear words for those that are refused."""

import dataclasses
import warnings
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffload, FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as TorchsFSDP

from .module_tree import is_managed, is_wrapped


class NotSupportedError(ValueError, NotImplementedError):
    """What can't be wrapped as it is asked for. Also of the classes that torch's own wrappers raise
    then, RuntimeError and NotImplementedError."""


def at(*modules: nn.Module) -> str:
    """How an error about wrapping ``modules``, which become one unit, begins."""
    return (
        f"rank {dist.get_rank()}: module {', '.join(type(module).__name__ for module in modules)}: "
    )


def check_module(module: nn.Module, face: str) -> None:
    """Raises TypeError for what is no module, ValueError where there is nothing to run or nobody to
    talk to, and around a module that torch's own wrappers have sharded."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{face} wraps an nn.Module, not a {type(module).__name__}")
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            f"{face} needs a process group: call torch.distributed.init_process_group first"
        )
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        raise ValueError(
            f"{at(module)}it has no forward to gather for: wrap its items, or the module around it"
        )
    for name, inner in module.named_modules():
        if not is_managed(inner) and isinstance(inner, (FSDPModule, TorchsFSDP)):
            raise ValueError(
                f"{at(module)}torch's own wrapper has been applied to {name or 'it'} already: "
                "apply torch_hsdp_ckpt's to that module instead"
            )


def offloads(cpu_offload: CPUOffload | bool | None) -> bool:
    """Whether FSDP1's argument asks for parameters on the CPU."""
    return cpu_offload is True or (
        isinstance(cpu_offload, CPUOffload) and cpu_offload.offload_params
    )


@dataclasses.dataclass(frozen=True)
class IgnoredStates:
    """What ``ignored_modules`` and ``ignored_states`` name: modules themselves, and all parameters
    of theirs or named alone."""

    modules: frozenset[nn.Module]
    parameters: frozenset[nn.Parameter]

    @staticmethod
    def of(module: nn.Module, items: Iterable[Any]) -> "IgnoredStates":
        """From both arguments of ``module``'s wrapper together. TypeError for what is neither
        module nor parameter, ValueError where a wrapped module is named."""
        modules: set[nn.Module] = set()
        parameters: set[nn.Parameter] = set()
        for item in items:
            if isinstance(item, nn.Parameter):
                parameters.add(item)
            elif isinstance(item, nn.Module):
                modules.add(item)
                parameters.update(item.parameters())
            else:
                raise TypeError(
                    "ignored_modules and ignored_states hold modules or parameters, not a "
                    f"{type(item).__name__}"
                )
        if module in modules:
            # As torch does: only a warning, and then there is nothing to shard.
            warnings.warn(
                "the module to be wrapped is itself named in ignored_modules: all of its "
                "parameters are ignored, and nothing is sharded",
                stacklevel=3,
            )
        wrapped = next((type(inner).__name__ for inner in modules if is_wrapped(inner)), None)
        if wrapped is not None:
            raise ValueError(
                f"{at(module)}a {wrapped} named in ignored_modules is wrapped itself, and goes on "
                "to gather and reduce its parameters: name what it wraps before that is wrapped, "
                "or leave it out"
            )
        return IgnoredStates(frozenset(modules), frozenset(parameters))

    def modules_inside(self) -> set[nn.Module]:
        """The named modules and all modules inside."""
        return {inner for module in self.modules for inner in module.modules()}
