"""Which modules are wrapped, which modules a unit reaches before the next wrapped one, and names
without those of wrappers."""

from torch import nn
from torch.distributed._composable.contract import _get_registry

RUNNER = "_hsdp_runner"  # the attribute of a wrapped module that holds its ``Runner``

# The attribute in which ``FullyShardedDataParallel`` holds its module. torch's activation
# checkpointing uses the same name, and state dicts leave it out of their keys.
WRAPPED = "_checkpoint_wrapped_module"
WRAPPED_PREFIX = WRAPPED + "."


def is_wrapped(module: nn.Module) -> bool:
    """Whether ``module`` itself has been wrapped, under either face."""
    return RUNNER in module.__dict__


def is_replicated(module: nn.Module) -> bool:
    """Whether torch's ``replicate`` is applied to ``module``, and keeps its replicas alike."""
    return "replicate" in (_get_registry(module) or {})


def is_managed(module: nn.Module) -> bool:
    """Whether somebody takes care of the parameters of ``module`` and inside already: a wrapper of
    its own, or torch's ``replicate``."""
    return is_wrapped(module) or is_replicated(module)


def modules_of_unit(module: nn.Module) -> list[nn.Module]:
    """``module`` and the modules inside, down to those that are managed themselves, each once,
    outermost first."""
    found: dict[nn.Module, None] = {}
    _add_modules_of_unit(found, module)
    return list(found)


# This is no closure in the function above: one that calls itself is a reference cycle, which keeps
# a deleted model's memory until the garbage collector comes.
def _add_modules_of_unit(found: dict[nn.Module, None], module: nn.Module) -> None:
    if module in found:
        return
    found[module] = None
    for child in module.children():
        if not is_managed(child):
            _add_modules_of_unit(found, child)


def child_prefix(prefix: str, name: str) -> str:
    """The prefix of a state dict's keys for a module's child. A wrapper's name is not in them."""
    return prefix if name == WRAPPED else f"{prefix}{name}."


def without_wrappers(name: str) -> str:
    """The name of a module, parameter or buffer as it is in a state dict's keys."""
    if WRAPPED not in name:
        return name
    return ".".join(part for part in name.split(".") if part != WRAPPED)
