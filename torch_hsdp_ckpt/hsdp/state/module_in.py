"""How a state dict goes into a module: the plan, in which everything was checked, is applied, and
every byte is copied once; or it is an error, on all ranks, and nothing has changed on any of them.

Where hooks, extra state or containers with a loading of their own are about, the module's own
loading runs on the real tensors. A copy of them and of the extra state, where it can be copied, is
put back if it fails."""

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import _IncompatibleKeys

from ...common.agreement import problems_of_all_ranks
from ...common.tensors import local_of
from ..module_tree import without_wrappers
from ..runner import runner_of
from .mismatch import as_lines
from .module_entries import entries_of
from .module_plan import LoadRequest, ModuleLoadPlan, cut_whole_tensors, plan_module_load


def load(request: LoadRequest) -> Any:
    """Loads a state dict into a module: RuntimeError on all ranks of the mesh, or on none.
    Collective over the mesh. Returns the missing and the unexpected keys, as torch does."""
    plan = plan_module_load(request)
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    if plan.expected.runs_custom_code or request.assign or swaps:
        return _load_guarded(request, plan)
    return _apply(plan)


def _apply(plan: ModuleLoadPlan) -> _IncompatibleKeys:
    """Copies the values into the module's tensors."""
    _copy_all(
        [
            (entry.tensor, plan.values[entry.key])
            for entry in plan.expected.entries
            if entry.key in plan.values
        ]
    )
    for load in plan.leaf_loads:
        module: Any = load.leaf.module
        module._load_from_state_dict(
            dict(load.values), load.leaf.prefix, load.version, True, [], [], []
        )
    return plan.incompatible


def _copy_all(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    targets, sources = [], []
    for target, source in pairs:
        if target.ndim == 0 and source.ndim == 1:
            source = source[0]
        if isinstance(target, DTensor):
            # The DTensor and its local tensor both see a change, as with the DTensor's own copy_.
            torch.autograd.graph.increment_version(target)
            target, source = local_of(target), local_of(source)
        targets.append(target)
        sources.append(source)
    if targets:
        with torch.no_grad():
            torch._foreach_copy_(targets, sources)


@dataclass(frozen=True)
class _ExtraState:
    """A copy of what a module keeps besides tensors, for those that also take it back."""

    name: str
    module: nn.Module
    state: Any


@dataclass(frozen=True)
class _Before:
    """What a load may change, as it was. ``tables``: the modules' own dicts of parameters and
    buffers, each with a copy. ``values``: pairs of a tensor and its copy. ``not_copied``: extra
    state that can't be copied, with the reason. Such a module still can be loaded: the copy is
    only for a load that fails."""

    modules: list[nn.Module]
    tables: list[tuple[dict[str, Any], dict[str, Any]]]
    values: list[tuple[torch.Tensor, torch.Tensor]]
    extra: list[_ExtraState]
    not_copied: list[str]


def _load_guarded(request: LoadRequest, plan: ModuleLoadPlan) -> Any:
    """The module's own loading, and everything put back if it raises on any rank."""
    # Where no custom code runs, the load puts other tensors in place and leaves the values alone.
    before = _remember(request.root, with_values=plan.expected.runs_custom_code)
    values = _with_module_versions(request.root, plan.values)
    try:
        with _whole_tensors_cut(before.modules if request.takes_whole else []):
            result = request.module_load(values)
    except Exception as error:
        problems = problems_of_all_ranks(request.mesh, [str(error)])
        raise RuntimeError(_undo(before, problems)) from error
    problems = problems_of_all_ranks(request.mesh, [])
    if problems:
        raise RuntimeError(_undo(before, problems))
    return result


def _undo(before: _Before, problems: list[str]) -> str:
    """Puts everything back that a load which failed has changed; returns the error's message."""
    lost = _restore(before)
    lines = [as_lines(problems), "Every tensor is as it was before the call."]
    lines += [f"The extra state of {note}" for note in lost]
    return "\n".join(lines)


def _with_module_versions(root: nn.Module, values: OrderedDict[str, Any]) -> dict[str, Any]:
    """``values`` with module versions also under the names that ``nn.Module``'s loading asks for,
    in which wrappers are."""
    metadata: Mapping[str, Any] | None = getattr(values, "_metadata", None)
    if metadata is None:
        return values
    versions = dict(metadata)
    for name, _ in root.named_modules():
        key = without_wrappers(name)
        if key in metadata:
            versions[name] = metadata[key]
    versioned = OrderedDict(values)
    versioned._metadata = versions  # type: ignore[attr-defined]
    return versioned


@contextmanager
def _whole_tensors_cut(modules: list[nn.Module]) -> Iterator[None]:
    """Lets ``modules`` find this rank's rows in place of whole tensors, after the users' own hooks,
    which may rename keys."""

    def cut(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        cut_whole_tensors(state_dict, entries_of(module, prefix))

    handles = [
        module.register_load_state_dict_pre_hook(cut)  # type: ignore[no-untyped-call]
        for module in modules
        if module._parameters
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _remember(root: nn.Module, with_values: bool) -> _Before:
    modules = list(root.modules())
    tables: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for module in modules:
        tables.append((module._parameters, dict(module._parameters)))
        tables.append((module._buffers, dict(module._buffers)))
    values = _copies_of_tensors(tables) if with_values else []
    extra, not_copied = _copies_of_extra_state(root)
    return _Before(modules, tables, values, extra, not_copied)


def _copies_of_tensors(
    tables: list[tuple[dict[str, Any], dict[str, Any]]],
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    distinct: dict[int, torch.Tensor] = {}
    for _, entries in tables:
        for tensor in entries.values():
            if tensor is not None:
                distinct[id(tensor)] = tensor
    values = [local_of(tensor).detach() for tensor in distinct.values()]
    return [(value, value.clone()) for value in values]


def _copies_of_extra_state(root: nn.Module) -> tuple[list[_ExtraState], list[str]]:
    copies, not_copied = [], []
    for path, module in root.named_modules():
        if not _keeps_extra_state(module):
            continue
        name = without_wrappers(path) or "(outermost)"
        try:
            state = copy.deepcopy(module.get_extra_state())
        except Exception as error:
            not_copied.append(
                f"{name} may have changed, it could not be copied before: "
                f"{type(error).__name__}: {error}"
            )
        else:
            copies.append(_ExtraState(name, module, state))
    return copies, not_copied


def _keeps_extra_state(module: nn.Module) -> bool:
    """Whether it both gives and takes extra state."""
    kind = type(module)
    return (
        kind.get_extra_state is not nn.Module.get_extra_state
        and kind.set_extra_state is not nn.Module.set_extra_state
    )


def _restore(before: _Before) -> list[str]:
    """Puts everything back; returns what may have changed nevertheless."""
    with torch.no_grad():
        for table, entries in before.tables:
            table.update(entries)
        for tensor, value in before.values:
            tensor.copy_(value)
    for module in before.modules:
        if (runner := runner_of(module)) is not None:
            runner.rebind()
    lost = list(before.not_copied)
    for extra in before.extra:
        try:
            extra.module.set_extra_state(extra.state)
        except Exception as error:  # This comes of the error before, which is what is raised.
            lost.append(f"{extra.name} may have changed: {type(error).__name__}: {error}")
    return lost
