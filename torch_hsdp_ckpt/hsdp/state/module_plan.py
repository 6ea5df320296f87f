"""Before a state dict goes into a module: everything is checked, nothing is changed.

Modules that load in a way of their own can't be looked into. Leaves of that kind (BatchNorm) are
tried on empty copies of their tensors."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import _IncompatibleKeys

from ..layout import spec_with_dtype
from ..module_tree import WRAPPED
from .cut import shard_of
from .mismatch import raise_on_all_ranks
from .module_entries import CustomLeaf, Entry, ModuleEntries
from .module_mismatch import advice_on, tensor_mismatch


@dataclass(frozen=True)
class LoadRequest:
    """One call of ``root.load_state_dict``. Every rank of ``mesh`` has its own.

    ``takes_whole``: values may be whole tensors. ``hint``: said first if something does not fit.
    ``module_load``: ``nn.Module``'s own loading, for where copying tensors is not enough."""

    root: nn.Module
    mesh: DeviceMesh
    state_dict: Mapping[str, Any]
    strict: bool
    assign: bool
    module_load: Callable[[Mapping[str, Any]], Any]
    takes_whole: bool = False
    hint: str = ""

    @property
    def same_dtype(self) -> bool:
        """Whether another dtype is an error, rather than converted or taken over."""
        return self.strict and not self.assign


@dataclass(frozen=True)
class LeafLoad:
    """What a leaf's own ``_load_from_state_dict`` is given. ``version``: the metadata of its state,
    from which it tells old ones."""

    leaf: CustomLeaf
    values: dict[str, Any]
    version: dict[str, Any]


@dataclass(frozen=True)
class ModuleLoadPlan:
    """A load that fits on all ranks. ``values``: the state dict with the rows of this rank in place
    of whole tensors. ``incompatible``: the keys that a load without ``strict`` forgives."""

    expected: ModuleEntries
    values: OrderedDict[str, Any]
    leaf_loads: list[LeafLoad]
    incompatible: _IncompatibleKeys


class _KeyCheck(NamedTuple):
    """``problems``: what does not fit. The other two are keys."""

    problems: list[str]
    missing: list[str]
    unexpected: list[str]


def plan_module_load(request: LoadRequest) -> ModuleLoadPlan:
    """Checks everything that can be checked. RuntimeError on all ranks, or on none; it lists what
    does not fit. Changes nothing. Collective over the mesh."""
    expected = ModuleEntries.of(request.root)
    values, problems = _named_values(request.state_dict)
    entries = _entries_to_check(expected)
    if request.takes_whole:
        cut_whole_tensors(values, entries)
    problems += _mismatches(values, entries, request.same_dtype)
    if not request.assign:
        problems += _without_memory(values, entries)
    leaf_loads = _leaf_loads(request, expected, values)
    keys = _check_keys(request, expected, values, leaf_loads)
    problems += keys.problems
    problems += _complaints(keys) if request.strict else []
    _refuse(request, problems)
    incompatible = _IncompatibleKeys(keys.missing, keys.unexpected)
    return ModuleLoadPlan(expected, values, leaf_loads, incompatible)


def _complaints(keys: _KeyCheck) -> list[str]:
    missing = [f'Missing key: "{key}"' for key in keys.missing]
    unexpected = [f'Unexpected key: "{key}"' for key in keys.unexpected]
    return missing + unexpected


def _can_check_keys(request: LoadRequest, expected: ModuleEntries) -> bool:
    """Custom code may rename keys, and then what it lacks is said by the load itself."""
    return not expected.runs_custom_code and isinstance(request.state_dict, Mapping)


def _refuse(request: LoadRequest, problems: list[str]) -> None:
    problems = [*advice_on(problems), *problems]
    if request.hint and problems:
        problems = [request.hint, *problems]
    name = type(getattr(request.root, WRAPPED, request.root)).__name__
    summary = f"Error(s) in loading state_dict for {name}"
    raise_on_all_ranks(request.mesh, problems, RuntimeError, summary)


def cut_whole_tensors(values: dict[str, Any], entries: Iterable[Entry]) -> None:
    """Puts this rank's rows, which are views, in place of the whole tensors among ``values`` that
    are to go into sharded parameters."""
    for entry in entries:
        if entry.key in values:
            values[entry.key] = _cut_if_whole(values[entry.key], entry.tensor)


def _cut_if_whole(value: Any, target: torch.Tensor) -> Any:
    if not isinstance(target, DTensor):
        return value
    if not isinstance(value, torch.Tensor) or isinstance(value, DTensor):
        return value
    if value.shape != target.shape or value.is_meta:
        return value
    return shard_of(value, spec_with_dtype(target._spec, value.dtype))


def _named_values(state_dict: Any) -> tuple[OrderedDict[str, Any], list[str]]:
    """The values that have a name, with the versions of modules that torch keeps beside them; and
    what is wrong with the others."""
    if not isinstance(state_dict, Mapping):
        kind = type(state_dict).__name__
        return OrderedDict(), [f"a state dict is a mapping of names to values, not a {kind}"]
    values = OrderedDict(state_dict)
    problems = []
    for key in [key for key in values if not isinstance(key, str)]:
        problems.append(f"a state dict's keys are names, not a {type(key).__name__}: {key!r:.50}")
        del values[key]
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None:
        values._metadata = metadata  # type: ignore[attr-defined]
    return values, problems


def _entries_to_check(expected: ModuleEntries) -> list[Entry]:
    """All that are filled by a copy; and those of BatchNorm where leaves are not tried."""
    entries = list(expected.entries)
    if expected.runs_custom_code:
        for leaf in expected.custom_leaves:
            entries += leaf.entries() if leaf.is_norm else []
    return entries


def _mismatches(values: Mapping[str, Any], entries: Iterable[Entry], same_dtype: bool) -> list[str]:
    mismatches = [
        tensor_mismatch(entry, values[entry.key], same_dtype)
        for entry in entries
        if entry.key in values
    ]
    return [mismatch for mismatch in mismatches if mismatch is not None]


def _without_memory(values: Mapping[str, Any], entries: Iterable[Entry]) -> list[str]:
    """What a copy would do nothing for, as torch's load does nothing but warn."""
    return [
        f'"{entry.key}" is on the meta device in the module: call to_empty(device=...) before, or '
        "load with assign=True"
        for entry in entries
        if entry.key in values and entry.tensor.is_meta
    ]


def _leaf_loads(
    request: LoadRequest, expected: ModuleEntries, values: Mapping[str, Any]
) -> list[LeafLoad]:
    if not _can_check_keys(request, expected):
        return []
    metadata = getattr(values, "_metadata", None) or {}
    loads = []
    for leaf in expected.custom_leaves:
        below = {key: value for key, value in values.items() if key.startswith(leaf.prefix)}
        if request.takes_whole:
            cut_whole_tensors(below, leaf.entries())
        loads.append(LeafLoad(leaf, below, metadata.get(leaf.prefix[:-1], {})))
    return loads


def _check_keys(
    request: LoadRequest,
    expected: ModuleEntries,
    values: Mapping[str, Any],
    leaf_loads: list[LeafLoad],
) -> _KeyCheck:
    """Missing and unexpected keys; what custom leaves lack and refuse they say themselves."""
    if not _can_check_keys(request, expected):
        return _KeyCheck([], [], [])
    check = _check_keys_outside_leaves(expected, values)
    for load in leaf_loads:
        trial = _try_leaf(load, request.same_dtype)
        check.problems.extend(trial.problems)
        check.missing.extend(trial.missing)
        check.unexpected.extend(trial.unexpected)
    return check


def _check_keys_outside_leaves(expected: ModuleEntries, values: Mapping[str, Any]) -> _KeyCheck:
    leaf_keys: set[str] = set()
    for leaf in expected.custom_leaves:
        leaf_keys.update(entry.key for entry in leaf.entries())
    leaf_prefixes = tuple(leaf.prefix for leaf in expected.custom_leaves)
    lacking = [key for key in expected.keys if key not in values]
    missing = [key for key in lacking if key not in leaf_keys]
    known = set(expected.keys)
    unknown = [key for key in values if key not in known]
    unexpected = [key for key in unknown if not key.startswith(leaf_prefixes)]
    return _KeyCheck([], missing, unexpected)


def _try_leaf(load: LeafLoad, same_dtype: bool) -> _KeyCheck:
    """Loads into empty copies of the leaf's tensors, to hear what it says."""
    trial = _KeyCheck([], [], [])
    values = dict(load.values)
    for entry in load.leaf.entries():
        mismatch = _leaf_mismatch(entry, values.get(entry.key), load.leaf, same_dtype)
        if mismatch is not None:
            trial.problems.append(mismatch)
            # With this the leaf does not complain of the same value once more.
            values[entry.key] = entry.tensor.detach()
    try:
        _with_empty_tensors(load.leaf.module)._load_from_state_dict(
            values,
            load.leaf.prefix,
            load.version,
            True,
            trial.missing,
            trial.unexpected,
            trial.problems,
        )
    except Exception as error:  # The module's own code raised, and the peers have to hear of it.
        trial.problems.append(f"{load.leaf.prefix[:-1]}: {type(error).__name__}: {error}")
    return trial


def _leaf_mismatch(entry: Entry, value: Any, leaf: CustomLeaf, same_dtype: bool) -> str | None:
    """A mismatch that the leaf's own code may not notice."""
    if not isinstance(value, torch.Tensor):
        return None
    is_other_kind = isinstance(value, DTensor) != isinstance(entry.tensor, DTensor)
    if is_other_kind or leaf.is_norm:
        return tensor_mismatch(entry, value, same_dtype)
    return None


def _with_empty_tensors(module: nn.Module) -> Any:
    """A copy of ``module`` that shares everything but its tensors, whose values it lacks."""
    shadow = object.__new__(type(module))
    shadow.__dict__.update(module.__dict__)
    for table in ("_parameters", "_buffers"):
        shadow.__dict__[table] = {
            name: None if tensor is None else torch.empty_like(tensor, requires_grad=False)
            for name, tensor in module.__dict__[table].items()
        }
    return shadow
