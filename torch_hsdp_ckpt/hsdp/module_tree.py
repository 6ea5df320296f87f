"""Which modules are wrapped, and which modules a unit reaches before the next wrapped one."""

from torch import nn

RUNNER = "_hsdp_runner"  # the attribute of a wrapped module that holds its ``Runner``


def is_wrapped(module: nn.Module) -> bool:
    """Whether ``module`` itself has been wrapped, under either face."""
    return RUNNER in module.__dict__


def modules_of_unit(module: nn.Module) -> list[nn.Module]:
    """``module`` and the modules inside, down to those that are wrapped themselves, each once,
    outermost first."""
    found: dict[nn.Module, None] = {}

    def visit(owner: nn.Module) -> None:
        if owner in found:
            return
        found[owner] = None
        for child in owner.children():
            if not is_wrapped(child):
                visit(child)

    visit(module)
    return list(found)
