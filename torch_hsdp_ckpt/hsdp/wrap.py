"""auto_wrap_policy: which modules inside become units of their own. The policies are torch's."""

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.distributed.fsdp.wrap import _Policy
from torch.distributed.utils import _apply_to_tensors

_kept_full: "WeakSet[nn.Module]" = WeakSet()


def auto_wrap(
    module: nn.Module,
    policy: Callable[..., bool] | _Policy,
    ignored_modules: set[nn.Module],
    ignored: set[nn.Parameter],
    full_precision: tuple[type[nn.Module], ...],
    wrap: Callable[[nn.Module, dict[str, Any]], nn.Module],
) -> None:
    """Replaces the modules below ``module`` that ``policy`` picks by ``wrap(module, options)``,
    innermost first; not ``module`` itself. ``options``: what the policy (``CustomPolicy``) asks for
    that differs for this module.

    ``full_precision``: classes whose modules are picked too and get ``{"mixed_precision": None}``
    (BatchNorm, as in torch)."""
    skipped = {inner for m in ignored_modules for inner in m.modules()}
    if isinstance(policy, _Policy):
        targets: dict[nn.Module, dict[str, Any]] = policy._run_policy(module, skipped, {})
    elif callable(policy):
        targets = {}
        _choose(module, policy, skipped, ignored, targets)
    else:
        raise TypeError(
            "auto_wrap_policy is a callable or one of torch's policies, not a "
            f"{type(policy).__name__}"
        )
    for inner in module.modules():
        if full_precision and isinstance(inner, full_precision) and inner not in skipped:
            targets[inner] = {**targets.get(inner, {}), "mixed_precision": None}
            _compute_in_float32(inner)
    for outside in {module} | skipped:
        targets.pop(outside, None)
    wrapped: dict[nn.Module, nn.Module] = {}  # a module that is registered twice is wrapped once
    _replace(module, targets, wrapped, wrap, set())


def _choose(
    module: nn.Module,
    policy: Callable[..., bool],
    skipped: set[nn.Module],
    ignored: set[nn.Parameter],
    chosen: dict[nn.Module, dict[str, Any]],
) -> int:
    """torch's protocol for callables: ``recurse=True`` asks whether to look inside,
    ``recurse=False`` whether to wrap, given the elements that nothing chosen inside holds. Returns
    how many elements ``module`` leaves to its surroundings."""
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
        chosen[module] = {}
        return 0
    return rest


def _replace(
    module: nn.Module,
    targets: dict[nn.Module, dict[str, Any]],
    wrapped: dict[nn.Module, nn.Module],
    wrap: Callable[[nn.Module, dict[str, Any]], nn.Module],
    seen: set[nn.Module],
) -> None:
    if module in seen:
        return
    seen.add(module)
    for name, child in list(
        module._modules.items()
    ):  # not named_children: a child may have two names here
        if child is None or child in wrapped.values():
            continue
        _replace(child, targets, wrapped, wrap, seen)
        if child in targets:
            if child not in wrapped:
                wrapped[child] = wrap(child, targets[child])
            setattr(module, name, wrapped[child])


def _compute_in_float32(module: nn.Module) -> None:
    """Inputs to float32 and results back to what the inputs were, so that its surroundings need not
    know."""
    if module in _kept_full:
        return
    _kept_full.add(module)
    came_as: list[torch.dtype] = []

    def widen(_: nn.Module, args: Any) -> Any:
        came_as.clear()

        def cast(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.is_floating_point():
                return tensor
            came_as.append(tensor.dtype)
            return tensor.float()

        return _apply_to_tensors(cast, args)

    def narrow(_: nn.Module, args: Any, outputs: Any) -> Any:
        if not came_as:
            return outputs
        return _apply_to_tensors(
            lambda t: t.to(came_as[-1]) if t.is_floating_point() else t, outputs
        )

    module.register_forward_pre_hook(widen)
    module.register_forward_hook(narrow)
