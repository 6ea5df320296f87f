"""Why a value of a state dict can't be loaded into a parameter or buffer: one function for each
reason."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..precision import saved_dtype
from .mismatch import (
    have_same_format,
    have_same_local_shape,
    local_shape_mismatch,
    placement_mismatch,
)
from .module_entries import Entry

_WHOLE_INTO_SHARDED = "is a plain tensor and the module has a sharded one"


def advice_on(mismatches: Sequence[str]) -> list[str]:
    """What to do about ``mismatches``, where many keys have the same, so that it is said once."""
    if not any(mismatch.endswith(_WHOLE_INTO_SHARDED) for mismatch in mismatches):
        return []
    return [
        "to load whole tensors use set_model_state_dict with full_state_dict=True, or "
        "FullyShardedDataParallel's FULL_STATE_DICT"
    ]


def tensor_mismatch(entry: Entry, value: Any, same_dtype: bool) -> str | None:
    """Why ``value`` can't be loaded into ``entry``; None if it can. ``same_dtype``: a load that
    would convert is a mismatch too."""
    if not isinstance(value, torch.Tensor):
        return f'"{entry.key}" is a {type(value).__name__}, not a tensor'
    return (
        _format_mismatch(entry, value)
        or _shape_mismatch(entry, value)
        or (_dtype_mismatch(entry, value) if same_dtype else None)
        or _lack_of_values(entry, value)
        or _sharding_mismatch(entry, value)
    )


def _format_mismatch(entry: Entry, value: torch.Tensor) -> str | None:
    target = entry.tensor
    if have_same_format(value, target):
        return None
    return (
        f'"{entry.key}" is of another kind ({value.layout}, {value.dtype}) than the module\'s '
        f"({target.layout}, {target.dtype})"
    )


def _shape_mismatch(entry: Entry, value: torch.Tensor) -> str | None:
    target = entry.tensor
    # Old versions of torch saved a tensor without dimensions with one.
    is_old_scalar = target.ndim == 0 and value.shape == (1,)
    if value.shape == target.shape or is_old_scalar:
        return None
    return (
        f'size mismatch for "{entry.key}": {tuple(value.shape)} given, '
        f"the module has {tuple(target.shape)}"
    )


def _dtype_mismatch(entry: Entry, value: torch.Tensor) -> str | None:
    target = entry.tensor
    if value.dtype == target.dtype:
        return None
    if value.dtype == saved_dtype(entry.module, entry.name, target):
        return None
    return (
        f'"{entry.key}" is {value.dtype}, the module has {target.dtype}: '
        "convert it, or pass strict=False, which does"
    )


def _lack_of_values(entry: Entry, value: torch.Tensor) -> str | None:
    return f'"{entry.key}" is on the meta device and has no values' if value.is_meta else None


def _sharding_mismatch(entry: Entry, value: torch.Tensor) -> str | None:
    key, target = entry.key, entry.tensor
    if not isinstance(target, DTensor):
        if not isinstance(value, DTensor):
            return None
        return f'"{key}" is a DTensor and the module has a plain tensor: pass value.full_tensor()'
    if not isinstance(value, DTensor):
        return f'"{key}" {_WHOLE_INTO_SHARDED}'
    given, needed = value._spec, target._spec
    if given.placements != needed.placements or given.mesh != needed.mesh:
        return placement_mismatch(f'"{key}"', value, target, "the module has")
    if not have_same_local_shape(value, target):
        return local_shape_mismatch(f'"{key}"', value, target, "module")
    return None
