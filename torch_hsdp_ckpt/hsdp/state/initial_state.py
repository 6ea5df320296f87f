"""The state of an optimizer that has made no step yet: what a checkpoint is loaded into.

Optimizers make their state in their first step. A state dict from before it would be empty, and a
load into that would drop what was saved without a word. So one step is made on trial, with zeros
for gradients, learning rate and weight decay, as torch's ``get_optimizer_state_dict`` does; but
here the optimizer itself is left as it was, and the state says that no step was made."""

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import Optimizer

from ...common.gate import wait_at_gate
from ..optimizers import check_can_step, step_mixed_groups_singly
from .optimizer_plan import is_torchs

# Those whose step on trial has made no state (SGD without momentum): they need no second one.
_without_state: "weakref.WeakSet[Optimizer]" = weakref.WeakSet()


def state_of(optimizer: Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()``; where that has no state yet, with the one that a first step would
    begin with, for every parameter that requires a gradient.

    RuntimeError for an optimizer that can't make a step without gradients, NotImplementedError for
    one that can't step on shards at all. Not to be called while
    another thread uses the optimizer, unless that has made a step."""
    inner = _innermost(optimizer)
    state = inner.__dict__.get("state")
    if state is None or len(state) > 0 or inner in _without_state or not _is_trained(inner):
        return optimizer.state_dict()
    _step_on_trial(inner)
    try:
        saved = optimizer.state_dict()
    finally:
        has_state = len(inner.state) > 0
        inner.state.clear()
    if not has_state:
        _without_state.add(inner)
    _set_to_initial(saved, is_torchs(inner))
    return saved


def _innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer that has the state: Accelerate's, say, has another one inside."""
    while "state" not in optimizer.__dict__:
        inner = optimizer.__dict__.get("optimizer")
        if not isinstance(inner, Optimizer):
            return optimizer
        optimizer = inner
    return optimizer


def _is_trained(optimizer: Optimizer) -> bool:
    return any(each.requires_grad for group in optimizer.param_groups for each in group["params"])


def _step_on_trial(optimizer: Optimizer) -> None:
    check_can_step(optimizer)
    # Past what schedulers have put around it, who count steps, and past the hooks of users.
    step: Any = type(optimizer).step
    if getattr(step, "hooked", False):
        step = step.__wrapped__
    wait_at_gate()
    with _nothing_to_change(optimizer):
        step_mixed_groups_singly(optimizer)
        try:
            step(optimizer)
        except Exception as error:
            optimizer.state.clear()
            raise RuntimeError(
                f"rank {dist.get_rank()}: {type(optimizer).__name__} has made no step yet, and so "
                "has no state to save or to load into; a step on trial, without gradients, fails "
                f"({type(error).__name__}: {error}): take a step before you ask for its state"
            ) from error


@contextlib.contextmanager
def _nothing_to_change(optimizer: Optimizer) -> Iterator[None]:
    """Within the block gradients, learning rates and weight decays are zeros."""
    options = [dict(group) for group in optimizer.param_groups]
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    gradients = [each.grad for each in parameters]
    try:
        for parameter in parameters:
            parameter.grad = _zeros_for(parameter) if parameter.requires_grad else None
        for group in optimizer.param_groups:
            for option in {"lr", "weight_decay"} & group.keys():
                group[option] = _zero_like(group[option])
        yield
    finally:
        for group, before in zip(optimizer.param_groups, options, strict=True):
            group.clear()
            group.update(before)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


def _zeros_for(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(parameter, dtype=parameter.grad_dtype, requires_grad=False)


def _zero_like(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    return 0.0 if isinstance(value, (int, float)) else value


def _set_to_initial(saved: dict[str, Any], is_known: bool) -> None:
    """Undoes what the step has done to the state: it has counted, and torch's optimizers have
    derived single values from the learning rate. Moments are zeros."""
    for group in saved["param_groups"]:
        initial = _initial_values(group, is_known)
        for number in group["params"]:
            values = saved["state"].get(number, {})
            for key in initial.keys() & values.keys():
                values[key] = _filled(values[key], initial[key])


def _initial_values(group: Mapping[str, Any], is_known: bool) -> dict[str, Any]:
    if not is_known:
        return {"step": 0}
    rate = float(group.get("lr", 0.0))
    # Those of NAdam (mu_product), ASGD (mu, eta) and Rprop (step_size).
    return {"step": 0, "mu_product": 1, "mu": 1, "eta": rate, "step_size": rate}


def _filled(value: Any, number: float) -> Any:
    if isinstance(value, torch.Tensor):
        return value.fill_(number)
    return type(value)(number) if isinstance(value, (int, float)) else value
