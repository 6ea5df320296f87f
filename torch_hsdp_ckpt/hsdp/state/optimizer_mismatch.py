"""Why a value of a saved optimizer state can't be the state of a parameter: one function for each
reason."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import torch
from torch.distributed.tensor import DTensor

from .from_first_rank import DTensorOnFirstRank, TensorOnFirstRank
from .mismatch import (
    have_same_local_shape,
    is_dense,
    local_shape_mismatch,
    placement_mismatch,
)

_ShapedValue = torch.Tensor | TensorOnFirstRank | DTensorOnFirstRank
_SHAPED = (torch.Tensor, TensorOnFirstRank, DTensorOnFirstRank)


@dataclass(frozen=True)
class ParameterState:
    """A parameter of the optimizer, and what is known of its state.

    ``current``: the state that the optimizer has now. ``elements``: of all the optimizer's
    parameters together. ``like_parameters``: the keys whose values have dimensions where parameters
    have. Under these (Adam's ``exp_avg``, not its ``step``) a parameter without dimensions has a
    DTensor too. ``converted_to``: the dtype that ``Optimizer.load_state_dict`` would silently give
    floating state; None where it is not known."""

    parameter: torch.Tensor
    current: dict[str, Any]
    elements: int
    like_parameters: frozenset[str]
    converted_to: torch.dtype | None


def has_dimensions(value: Any) -> TypeGuard[_ShapedValue]:
    """Whether it is a tensor, here or on the first rank, that is not a single value."""
    return isinstance(value, _SHAPED) and len(value.shape) > 0


def keys_with_dimensions(states: Iterable[Any]) -> frozenset[str]:
    """The keys whose values have dimensions in one of the parameters' ``states``."""
    keys: set[str] = set()
    for state in states:
        if not isinstance(state, dict):
            continue
        for key, item in state.items():
            # Thousands of parameters have the same few keys.
            if str(key) not in keys and has_dimensions(item):
                keys.add(str(key))
    return frozenset(keys)


class _Comparison(NamedTuple):
    """``value``, which has dimensions, beside what the optimizer has or would make. ``current``:
    the tensor with dimensions that it has there; None if it has none yet."""

    where: str
    value: Any
    target: ParameterState
    current: torch.Tensor | None
    shape: tuple[int, ...]
    expected_shape: tuple[int, ...]
    converted_to: torch.dtype | None

    @property
    def is_end_to_end(self) -> bool:
        """Whether it holds one element for each of all parameters, as LBFGS's tensors do."""
        return self.shape == (self.target.elements,)

    @property
    def is_reduced(self) -> bool:
        """Whether it has the shape of the parameter reduced over some dimensions, or over none, as
        Adafactor's tensors have."""
        expected = self.expected_shape
        return len(self.shape) == len(expected) and all(
            given in (needed, 1) for given, needed in zip(self.shape, expected, strict=True)
        )


def state_mismatch(where: str, key: Any, value: Any, target: ParameterState) -> str | None:
    """Why ``value`` can't be under ``key`` in the state of ``target``; None if it can. ``where``:
    what the message calls it."""
    current = target.current.get(key)
    if isinstance(value, DTensorOnFirstRank):
        return f"{where} is sharded on the first rank: with rank0_only it has to be whole"
    if isinstance(value, torch.Tensor) and value.is_meta:
        return f"{where} is on the meta device and has no values"
    if not has_dimensions(value):
        return _lack_of_dimensions(where, value, current)
    comparison = _compare(where, key, value, target)
    return (
        _format_mismatch(comparison)
        or _shape_mismatch(comparison)
        or _dtype_mismatch(comparison)
        or _sharding_mismatch(comparison)
    )


def _compare(where: str, key: Any, value: Any, target: ParameterState) -> _Comparison:
    found = target.current.get(key)
    current = found if isinstance(found, torch.Tensor) and found.ndim > 0 else None
    expected = target.parameter if current is None else current
    return _Comparison(
        where=where,
        value=value,
        target=target,
        current=current,
        shape=tuple(value.shape),
        expected_shape=tuple(expected.shape),
        converted_to=None if key == "step" else target.converted_to,
    )


def _lack_of_dimensions(where: str, value: Any, current: Any) -> str | None:
    if not has_dimensions(current):
        return None
    is_tensor = isinstance(value, torch.Tensor)
    kind = "a single value" if is_tensor else f"a {type(value).__name__}"
    return f"{where} is {kind}, the optimizer has a tensor of shape {tuple(current.shape)}"


def _format_mismatch(it: _Comparison) -> str | None:
    value = it.value
    if isinstance(value, torch.Tensor) and not is_dense(value):
        return (
            f"{it.where} is of another kind ({value.layout}, {value.dtype}) than the parameter's "
            "shards"
        )
    is_plain_there = it.current is not None and not isinstance(it.current, DTensor)
    if is_plain_there and isinstance(value, DTensor):
        return (
            f"{it.where} is a DTensor, the optimizer has a plain tensor there: pass "
            "value.full_tensor()"
        )
    return None


def _shape_mismatch(it: _Comparison) -> str | None:
    if it.shape == it.expected_shape:
        return None
    if it.current is None and (it.is_reduced or it.is_end_to_end):
        return None
    hint = ""
    if it.current is None and it.converted_to is None:
        # Other optimizers than torch's may keep anything. What they keep can be seen after a step.
        hint = "; if it keeps states of such shapes, take a step first, to make them"
    return (
        f"size mismatch for {it.where}: {it.shape} given, the optimizer has {it.expected_shape}"
        f"{hint}"
    )


def _dtype_mismatch(it: _Comparison) -> str | None:
    dtype: torch.dtype = it.value.dtype
    expected = it.converted_to if it.current is None else it.current.dtype
    if expected is None or dtype == expected or not dtype.is_floating_point:
        return None
    return f"{it.where} is {dtype}, the optimizer has {expected}: convert it"


def _sharding_mismatch(it: _Comparison) -> str | None:
    parameter = it.target.parameter
    is_sharded = isinstance(it.value, DTensor)
    if is_sharded and isinstance(parameter, DTensor):
        return _placement_mismatch(it, parameter)
    if is_sharded:
        return f"{it.where} is a DTensor, the parameter is a plain tensor"
    if isinstance(parameter, DTensor):
        return _unknown_placement(it)
    return None


def _unknown_placement(it: _Comparison) -> str | None:
    """The message for a whole value of a sharded parameter that can't be cut before the optimizer
    has made a state to compare with."""
    if it.current is not None or it.shape == it.expected_shape or it.is_end_to_end:
        return None
    return (
        f"{it.where} is reduced to {it.shape}, which is cut in the optimizer's own way: take a "
        "step first, to make its state"
    )


def _placement_mismatch(it: _Comparison, parameter: DTensor) -> str | None:
    like = it.current if isinstance(it.current, DTensor) else parameter
    has_its_shape = it.shape == tuple(like.shape)
    is_placed_so = it.value.placements == like.placements or not has_its_shape
    if it.value.device_mesh != parameter.device_mesh or not is_placed_so:
        return placement_mismatch(it.where, it.value, like, "the parameter")
    if has_its_shape and not have_same_local_shape(it.value, like):
        return local_shape_mismatch(it.where, it.value, like, "optimizer")
    return None
