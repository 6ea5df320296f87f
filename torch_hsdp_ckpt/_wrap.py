"""auto_wrap_policy: which modules inside become units of their own. The policies are torch's."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.fsdp.wrap import _Policy


def auto_wrap(
    module: nn.Module,
    policy: Callable[..., bool] | _Policy,
    ignored_modules: set[nn.Module],
    ignored: set[nn.Parameter],
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    """Replaces the modules below ``module`` that ``policy`` picks by ``wrap(module)``, innermost first; not ``module`` itself.

    A policy that asks for other arguments for some modules (``CustomPolicy``) gets a ValueError: units of one root share them.
    """
    skipped = {inner for m in ignored_modules for inner in m.modules()}
    if isinstance(policy, _Policy):
        chosen: dict[nn.Module, dict[str, Any]] = policy._run_policy(module, skipped, {})
        if any(chosen.values()):
            raise ValueError(
                "auto_wrap_policy gives some modules arguments of their own, which is not served: wrap those by hand"
            )
        targets = set(chosen)
    elif callable(policy):
        targets = set()
        _choose(module, policy, skipped, ignored, targets)
    else:
        raise TypeError(f"auto_wrap_policy is a callable or one of torch's policies, not a {type(policy).__name__}")
    targets.discard(module)
    wrapped: dict[nn.Module, nn.Module] = {}  # a module that is registered twice is wrapped once
    _replace(module, targets - skipped, wrapped, wrap, set())


def _choose(
    module: nn.Module, policy: Callable[..., bool], skipped: set[nn.Module], ignored: set[nn.Parameter], chosen: set[nn.Module]
) -> int:
    """torch's protocol for callables: ``recurse=True`` asks whether to look inside, ``recurse=False`` whether to wrap, given
    the elements that nothing chosen inside holds. Returns how many elements ``module`` leaves to its surroundings."""
    numel = sum(p.numel() for p in module.parameters() if p not in ignored)
    if not policy(module=module, recurse=True, nonwrapped_numel=numel):
        return numel
    taken = 0
    for child in module.children():
        if child in skipped:
            continue
        own = sum(p.numel() for p in child.parameters() if p not in ignored)
        taken += own - _choose(child, policy, skipped, ignored, chosen)
    rest = numel - taken
    if policy(module=module, recurse=False, nonwrapped_numel=rest):
        chosen.add(module)
        return 0
    return rest


def _replace(
    module: nn.Module,
    targets: set[nn.Module],
    wrapped: dict[nn.Module, nn.Module],
    wrap: Callable[[nn.Module], nn.Module],
    seen: set[nn.Module],
) -> None:
    if module in seen:
        return
    seen.add(module)
    for name, child in list(module.named_children()):
        if child in wrapped.values():
            continue
        _replace(child, targets, wrapped, wrap, seen)
        if child in targets:
            if child not in wrapped:
                wrapped[child] = wrap(child)
            setattr(module, name, wrapped[child])
