"""``load_state_dict``: everything is looked at, then every byte is copied once; or it is an error,
on all ranks, and none is.

Modules that load in a way of their own can't be looked into. Leaves of that kind (BatchNorm) are
tried on empty copies of their tensors. Where hooks, extra state or containers of that kind are
about, the module's own loading runs on the real tensors, and a copy of them and of the extra state,
where it can be copied, is put back if it fails."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX, _IncompatibleKeys

from ...common.tensors import local_of
from ..precision import saved_dtype
from ..unit import ShardedUnit
from .full_state import own_rows, spec_like
from .mismatch import agree, kind_of, listed

INNER = "_checkpoint_wrapped_module"  # also the name that torch's activation checkpointing uses
_OWN = "_hsdp_ckpt_own"  # on a function: it is the wrapper's
_F = TypeVar("_F", bound=Callable[..., Any])


class Entry(NamedTuple):
    """A parameter or persistent buffer of ``module``, which loading fills."""

    key: str
    module: nn.Module
    name: str
    tensor: torch.Tensor


class Survey:
    """What a module tree expects from a state dict, and how it has to be loaded."""

    def __init__(self, root: nn.Module, prefix: str = "") -> None:
        self.entries: list[Entry] = []
        self.keys: list[str] = []  # of the entries and of extra state
        self.leaves: list[
            tuple[str, nn.Module]
        ] = []  # with a loading of their own; their entries are not in ``entries``
        self.hooked = (
            False  # whether anything could happen in loading that can't be looked up before
        )
        self._visit(root, prefix)

    def _visit(self, module: nn.Module, prefix: str) -> None:
        kind = type(module)
        self.hooked |= not _only_own(module._load_state_dict_pre_hooks) or not _only_own(
            module._load_state_dict_post_hooks
        )
        ways = [
            c.__dict__["load_state_dict"] for c in kind.__mro__ if "load_state_dict" in c.__dict__
        ]
        self.hooked |= any(
            way is not nn.Module.load_state_dict and not getattr(way, _OWN, False) for way in ways
        )
        if (
            kind.set_extra_state is not nn.Module.set_extra_state
            or kind.get_extra_state is not nn.Module.get_extra_state
        ):
            self.hooked = True
            self.keys.append(prefix + _EXTRA_STATE_KEY_SUFFIX)
        entries = list(_entries(module, prefix))
        if kind._load_from_state_dict is not nn.Module._load_from_state_dict:
            self.hooked |= bool(module._modules)
            self.leaves.append((prefix, module))
        else:
            self.entries += entries
        self.keys += [entry.key for entry in entries]
        for name, child in module._modules.items():
            if child is not None:
                self._visit(child, prefix if name == INNER else f"{prefix}{name}.")


def _entries(module: nn.Module, prefix: str) -> Iterator[Entry]:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield Entry(prefix + name, module, name, parameter)
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield Entry(prefix + name, module, name, buffer)


def own(function: _F) -> _F:
    """Marks a load hook, or a ``load_state_dict``, as the wrapper's own: it forgives no key and
    takes no other values."""
    setattr(function, _OWN, True)
    return function


def _only_own(hooks: Mapping[int, Any]) -> bool:
    functions = [getattr(hook, "hook", hook) for hook in hooks.values()]
    return all(
        getattr(f, _OWN, False) or f is ActivationWrapper._pre_load_state_dict_hook
        for f in functions
    )


def shard_full(entry: Entry, value: Any) -> Any:
    """This rank's rows of a whole tensor for a sharded parameter, a view; any other value as it
    is."""
    target = entry.tensor
    if (
        isinstance(target, DTensor)
        and isinstance(value, torch.Tensor)
        and not isinstance(value, DTensor)
    ):
        if value.shape == target.shape and value.device.type != "meta":
            return own_rows(value, spec_like(target, value.dtype))
    return value


def misfit(entry: Entry, value: Any, same_dtype: bool) -> str | None:
    """Why ``value`` can't be loaded into ``entry``; None if it can."""
    key, target = entry.key, entry.tensor
    if not isinstance(value, torch.Tensor):
        return f'"{key}" is a {type(value).__name__}, not a tensor'
    if kind_of(value) != kind_of(target):
        return f'"{key}" is of another kind ({value.layout}, {value.dtype}) than the module\'s ({target.layout}, {target.dtype})'
    if value.shape != target.shape and not (target.ndim == 0 and value.shape == (1,)):
        return f'size mismatch for "{key}": {tuple(value.shape)} given, the module has {tuple(target.shape)}'
    if (
        same_dtype
        and value.dtype != target.dtype
        and value.dtype != saved_dtype(entry.module, entry.name, target)
    ):
        return f'"{key}" is {value.dtype}, the module has {target.dtype}: convert it, or pass strict=False, which does'
    if value.is_meta:
        return f'"{key}" is on the meta device and has no values'
    if isinstance(target, DTensor):
        if not isinstance(value, DTensor):
            how = "use set_model_state_dict with full_state_dict=True, or FullyShardedDataParallel's FULL_STATE_DICT"
            return f'"{key}" is a plain tensor and the module has a sharded one: to load whole tensors {how}'
        if (
            value._spec.placements != target._spec.placements
            or value._spec.mesh != target._spec.mesh
        ):
            return (
                f'"{key}" is placed {value.placements} on {value.device_mesh}, the module has {target.placements} on '
                f"{target.device_mesh}: load it through torch.distributed.checkpoint, which "
                "reshards"
            )
        mine, its = tuple(local_of(target).shape), tuple(local_of(value).shape)
        if mine != its:  # a copy of one row would go into all of them
            return f"size mismatch for \"{key}\": this rank's shard has the shape {its}, the module's {mine}"
    elif isinstance(value, DTensor):
        return f'"{key}" is a DTensor and the module has a plain tensor: pass value.full_tensor()'
    return None


def load(
    root: nn.Module,
    mesh: DeviceMesh,
    state_dict: Mapping[str, Any],
    strict: bool,
    assign: bool,
    full: bool,
    hint: str,
    module_load: Callable[[Mapping[str, Any]], Any],
) -> Any:
    """Loads ``state_dict`` into ``root``: RuntimeError on all ranks, or on none. Collective over
    ``mesh``.

    ``full``: values may be whole tensors. ``hint``: said first if something does not fit.
    ``module_load``: nn.Module's way, for where this one does not do."""
    survey = Survey(root)
    known_form = isinstance(state_dict, Mapping)
    given: OrderedDict[str, Any] = OrderedDict(state_dict if known_form else {})
    nameless = [key for key in given if not isinstance(key, str)]
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None:
        given._metadata = metadata  # type: ignore[attr-defined]
    problems = (
        []
        if known_form
        else [f"a state dict is a mapping of names to values, not a {type(state_dict).__name__}"]
    )
    problems += [
        f"a state dict's keys are names, not a {type(key).__name__}: {key!r:.50}"
        for key in nameless
    ]
    for key in nameless:
        del given[key]
    same_dtype = strict and not assign
    # Where hooks are about, leaves are not tried on copies below.
    norms = [
        (leaf, prefix)
        for prefix, leaf in survey.leaves
        if survey.hooked and isinstance(leaf, _NormBase)
    ]
    for entry in [*survey.entries, *(entry for norm in norms for entry in _entries(*norm))]:
        if entry.key in given:
            if full:
                given[entry.key] = shard_full(entry, given[entry.key])
            problem = misfit(entry, given[entry.key], same_dtype)
            if problem is not None:
                problems.append(problem)
    missing: list[str] = []
    unexpected: list[str] = []
    if not survey.hooked and known_form:
        known = set(survey.keys)
        inside = tuple(prefix for prefix, _ in survey.leaves)
        leaf_keys = {
            entry.key for prefix, leaf in survey.leaves for entry in _entries(leaf, prefix)
        }
        missing = [key for key in survey.keys if key not in given and key not in leaf_keys]
        unexpected = [
            key for key in given if key not in known and not (inside and key.startswith(inside))
        ]
        for prefix, leaf in survey.leaves:
            values = _below(given, prefix, leaf, full)
            problems += _try_leaf(
                leaf, prefix, values, _version(metadata, prefix), same_dtype, missing, unexpected
            )
        if strict:
            problems += [f'Missing key: "{key}"' for key in missing]
            problems += [f'Unexpected key: "{key}"' for key in unexpected]
    _raise_together(mesh, root, [hint, *problems] if hint and problems else problems)
    if survey.hooked or assign or torch.__future__.get_swap_module_params_on_conversion():
        if metadata is not None:
            given._metadata = _under_wrappers(root, metadata)  # type: ignore[attr-defined]
        return _load_guarded(root, mesh, survey, full, lambda: module_load(given))
    _copy([(entry.tensor, given[entry.key]) for entry in survey.entries if entry.key in given])
    for prefix, leaf in survey.leaves:
        values = _below(given, prefix, leaf, full)
        leaf._load_from_state_dict(values, prefix, _version(metadata, prefix), True, [], [], [])  # type: ignore[no-untyped-call]
    return _IncompatibleKeys(missing, unexpected)


def _copy(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    targets, sources = [], []
    for target, source in pairs:
        if target.ndim == 0 and source.ndim == 1:
            source = source[0]
        if isinstance(target, DTensor):
            # As copy_ of the DTensor would: both see that they have changed.
            torch.autograd.graph.increment_version(target)
            target, source = local_of(target), local_of(source)
        targets.append(target)
        sources.append(source)
    if targets:
        with torch.no_grad():
            torch._foreach_copy_(targets, sources)


def _version(metadata: Any, prefix: str) -> dict[str, Any]:
    return {} if metadata is None else metadata.get(prefix[:-1], {})


def _below(given: Mapping[str, Any], prefix: str, leaf: nn.Module, full: bool) -> dict[str, Any]:
    values = {key: value for key, value in given.items() if key.startswith(prefix)}
    if full:
        for entry in _entries(leaf, prefix):
            if entry.key in values:
                values[entry.key] = shard_full(entry, values[entry.key])
    return values


def _try_leaf(
    leaf: nn.Module,
    prefix: str,
    values: dict[str, Any],
    version: dict[str, Any],
    same_dtype: bool,
    missing: list[str],
    unexpected: list[str],
) -> list[str]:
    """Loads into empty copies of the leaf's tensors, to hear what it says."""
    problems: list[str] = []
    shadow = object.__new__(type(leaf))
    shadow.__dict__.update(leaf.__dict__)
    for table in ("_parameters", "_buffers"):
        tensors = leaf.__dict__[table].items()
        shadow.__dict__[table] = {
            name: None if t is None else torch.empty_like(t, requires_grad=False)
            for name, t in tensors
        }
    for entry in _entries(leaf, prefix):
        value = values.get(entry.key)
        other_kind = isinstance(value, DTensor) != isinstance(entry.tensor, DTensor)
        if isinstance(value, torch.Tensor) and (other_kind or isinstance(leaf, _NormBase)):
            problem = misfit(entry, value, same_dtype)
            if problem is not None:
                problems.append(problem)
                values[entry.key] = entry.tensor.detach()  # one complaint is enough
    try:
        shadow._load_from_state_dict(values, prefix, version, True, missing, unexpected, problems)  # type: ignore[no-untyped-call]
    except Exception as error:  # the module's own code: its peers have to hear of it
        problems.append(f"{prefix[:-1]}: {type(error).__name__}: {error}")
    return problems


def _clean(name: str) -> str:
    """A module's name without the wrappers'."""
    return ".".join(part for part in name.split(".") if part != INNER)


def _under_wrappers(root: nn.Module, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Module versions, also under the names that nn.Module's loading asks for."""
    names = {name: _clean(name) for name, _ in root.named_modules()}
    return {
        **metadata,
        **{name: metadata[clean] for name, clean in names.items() if clean in metadata},
    }


def _load_guarded(
    root: nn.Module, mesh: DeviceMesh, survey: Survey, full: bool, run: Callable[[], Any]
) -> Any:
    """``run``, and everything put back if it raises on any rank."""
    modules = list(root.modules())
    tables = [(table, dict(table)) for m in modules for table in (m._parameters, m._buffers)]
    tensors = {id(t): t for _, table in tables for t in table.values() if t is not None}
    locals_ = [local_of(t) if isinstance(t, DTensor) else t.detach() for t in tensors.values()]
    before = [t.clone() for t in locals_] if survey.hooked else []
    # After the users' own hooks, which may rename keys.
    handles = [
        m.register_load_state_dict_pre_hook(_shard_own) for m in modules if full and m._parameters
    ]  # type: ignore[no-untyped-call]
    extra, lost = _copies_of_extra_state(root)
    error: Exception | None = None
    result: Any = None
    try:
        result = run()
    except Exception as e:
        error = e
    finally:
        for handle in handles:
            handle.remove()
    problems = agree(mesh, [] if error is None else [str(error)])
    if not problems:
        return result
    with torch.no_grad():
        for table, entries in tables:
            table.update(entries)  # type: ignore[arg-type]
        for tensor, value in zip(locals_, before, strict=bool(before)):
            tensor.copy_(value)
    for module in modules:
        if isinstance(unit := module.__dict__.get("_unit"), ShardedUnit):
            unit.rebind()
    for name, module, state in extra:
        try:
            module.set_extra_state(state)
        except Exception as e:  # the module's own code, and the error to hear of is the one before
            lost.append(f"{name} may have changed: {type(e).__name__}: {e}")
    notes = [f"The extra state of {note}" for note in lost]
    raise RuntimeError(
        "\n".join([listed(problems), "Every tensor is as it was before the call.", *notes])
    ) from error


def _copies_of_extra_state(root: nn.Module) -> tuple[list[tuple[str, nn.Module, Any]], list[str]]:
    """What modules inside keep besides tensors, for those that take it back too; and what can't be
    copied, with the reason. Such a module still can be loaded: the copy is only for a load that
    fails."""
    copies, lost = [], []
    for path, module in root.named_modules():
        kind = type(module)
        if (
            kind.get_extra_state is nn.Module.get_extra_state
            or kind.set_extra_state is nn.Module.set_extra_state
        ):
            continue
        name = _clean(path) or "(outermost)"
        try:
            copies.append((name, module, copy.deepcopy(module.get_extra_state())))
        except Exception as e:
            lost.append(
                f"{name} may have changed, it could not be copied before: {type(e).__name__}: {e}"
            )
    return copies, lost


def _shard_own(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for entry in _entries(module, prefix):
        if entry.key in state_dict:
            state_dict[entry.key] = shard_full(entry, state_dict[entry.key])


def _raise_together(mesh: DeviceMesh, root: nn.Module, problems: list[str]) -> None:
    everybody = agree(mesh, problems)
    if everybody:
        inner = getattr(root, INNER, root)
        raise RuntimeError(
            f"Error(s) in loading state_dict for {type(inner).__name__}; nothing was "
            f"loaded:\n\t{listed(everybody)}"
        )
