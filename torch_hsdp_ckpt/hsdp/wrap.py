"""``auto_wrap_policy``: which modules inside become units of their own. Policies are torch's."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp.wrap import _Policy
from torch.distributed.utils import _apply_to_tensors

from .arguments import IgnoredStates

# A module has this attribute when its forward has hooks that make it compute in float32.
_IN_FLOAT32 = "_hsdp_ckpt_in_float32"
_Targets = dict[nn.Module, dict[str, Any]]  # arguments that are a module's own, by module


def auto_wrap(
    module: nn.Module,
    policy: Callable[..., bool] | _Policy,
    ignored: IgnoredStates,
    full_precision: tuple[type[nn.Module], ...],
    wrap: Callable[[nn.Module, dict[str, Any]], nn.Module],
) -> None:
    """Replaces the modules below ``module`` that ``policy`` picks by ``wrap(module, options)``,
    innermost first; not ``module`` itself. ``options``: what the policy (``CustomPolicy``) asks for
    that differs for this module.

    ``full_precision``: classes whose modules are picked too and get ``{"mixed_precision": None}``
    (BatchNorm, as in torch)."""
    targets = _targets_of(module, policy, ignored)
    skipped = ignored.modules_inside()
    for inner in module.modules():
        if isinstance(inner, full_precision) and inner not in skipped:
            targets.setdefault(inner, {}).update(mixed_precision=None)
            _compute_in_float32(inner)
    for not_replaced in (module, *skipped):
        targets.pop(not_replaced, None)
    _Replacement(targets, wrap).run(module)


def _targets_of(
    module: nn.Module, policy: Callable[..., bool] | _Policy, ignored: IgnoredStates
) -> _Targets:
    if isinstance(policy, _Policy):
        chosen = policy._run_policy(module, ignored.modules_inside(), {})
        return {inner: dict(options) for inner, options in chosen.items()}
    if callable(policy):
        choice = _Choice(policy, ignored)
        choice.visit(module)
        return choice.targets
    raise TypeError(
        f"auto_wrap_policy is a callable or one of torch's policies, not a {type(policy).__name__}"
    )


class _Choice:
    """Asks a callable which modules to wrap, by torch's protocol: ``recurse=True`` asks whether to
    look inside, ``recurse=False`` whether to wrap, given the elements that nothing chosen inside
    holds."""

    def __init__(self, policy: Callable[..., bool], ignored: IgnoredStates) -> None:
        self.targets: _Targets = {}
        self._policy = policy
        self._ignored = ignored.parameters
        self._skipped = ignored.modules_inside()

    def visit(self, module: nn.Module) -> int:
        """Chooses among ``module`` and all inside; returns how many elements are left to what is
        around ``module``."""
        numel = self._numel(module)
        if not self._policy(module=module, recurse=True, nonwrapped_numel=numel):
            return numel
        remaining = numel
        for child in module.children():
            if child not in self._skipped:
                remaining -= self._numel(child) - self.visit(child)
        if self._policy(module=module, recurse=False, nonwrapped_numel=remaining):
            self.targets[module] = {}
            return 0
        return remaining

    def _numel(self, module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters() if p not in self._ignored)


class _Replacement:
    """Puts wrapped modules in the places of the ``targets``. A module that is registered twice is
    wrapped once."""

    def __init__(
        self, targets: _Targets, wrap: Callable[[nn.Module, dict[str, Any]], nn.Module]
    ) -> None:
        self._targets, self._wrap = targets, wrap
        self._wrapped: dict[nn.Module, nn.Module] = {}
        self._seen: set[nn.Module] = set()

    def run(self, module: nn.Module) -> None:
        """Replaces the targets inside of ``module``, innermost first."""
        if module in self._seen:
            return
        self._seen.add(module)
        # This is not named_children, as a child may have two names here.
        for name, child in list(module._modules.items()):
            if child is None or child in self._wrapped.values():
                continue
            self._choose_instead_of_inner(child)
            self.run(child)
            if child in self._targets:
                setattr(module, name, self._wrapped_once(child))

    def _choose_instead_of_inner(self, module: nn.Module) -> None:
        """What ``torch.compile`` has made of a target calls that itself, past a wrapper that would
        be put between the two: so it is wrapped in the target's place."""
        inner = module._modules.get("_orig_mod")
        if inner is not None and inner in self._targets:
            self._targets[module] = self._targets.pop(inner)

    def _wrapped_once(self, module: nn.Module) -> nn.Module:
        if module not in self._wrapped:
            self._wrapped[module] = self._wrap(module, self._targets[module])
        return self._wrapped[module]


def _compute_in_float32(module: nn.Module) -> None:
    """Casts inputs to float32 and results back to what the inputs were, so that the module's
    surroundings need not know."""
    if _IN_FLOAT32 in module.__dict__:
        return
    module.__dict__[_IN_FLOAT32] = True
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
