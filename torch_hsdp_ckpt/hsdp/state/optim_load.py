"""From a state by names to what ``Optimizer.load_state_dict`` takes: checked against the model, and
cut where it is whole."""

import pickle
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from ...common.tensors import local_of
from .full_state import (
    broadcast,
    broadcast_object,
    is_first,
    own_rows,
    rows_alone,
    scatter,
    spec_like,
)
from .mismatch import agree, kind_of, listed
from .optim_names import Names, in_order, match_groups

_DENSE = (torch.strided, False, False)


class Remote(NamedTuple):
    """A tensor that only the first rank has, the ``number``-th there; -1 for a DTensor, which is
    not sent."""

    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Home(NamedTuple):
    """The parameter that a state belongs to, and what is known of such states.

    ``current``: the state that the optimizer has now. ``elements``: of all the optimizer's
    parameters together. ``like_parameters``: the keys whose values have dimensions where parameters
    have. Under these (Adam's ``exp_avg``, not its ``step``) a parameter without dimensions has a
    DTensor too."""

    parameter: torch.Tensor
    current: dict[str, Any]
    elements: int
    like_parameters: frozenset[str]


class Source:
    """A state to be loaded. ``mesh``: only its first rank's counts, and is to be sent to all; None:
    every rank has its own."""

    def __init__(self, state: dict[str, Any] | None, mesh: DeviceMesh | None) -> None:
        self.state: Any = state
        self.mesh = mesh
        self.tensors: list[torch.Tensor] = []
        self.unsent = ""
        if mesh is not None:
            packed = b""
            if is_first(mesh):
                try:
                    packed = pickle.dumps((self._without_tensors(state), ""))
                except Exception as error:  # the others wait for something
                    packed = pickle.dumps(
                        (
                            None,
                            f"the first rank's state can't be sent: {type(error).__name__}: "
                            f"{error}",
                        )
                    )
            self.state, self.unsent = pickle.loads(broadcast_object(packed, mesh))

    def _without_tensors(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._without_tensors(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._without_tensors(item) for item in value)
        if isinstance(value, DTensor):
            return Remote(-1, tuple(value.shape), value.dtype)
        if isinstance(value, torch.Tensor) and value.ndim and kind_of(value) == _DENSE:
            self.tensors.append(value)
            return Remote(len(self.tensors) - 1, tuple(value.shape), value.dtype)
        return value.cpu() if isinstance(value, torch.Tensor) else value

    def tensor(self, remote: Remote) -> torch.Tensor | None:
        return self.tensors[remote.number] if self.tensors else None


def import_state(
    source: Source,
    find_names: Callable[[], Names],
    mesh: DeviceMesh,
    optim: torch.optim.Optimizer | None,
    by_name: bool = False,
) -> dict[str, Any]:
    """Keys are the optimizer's numbers, or names. Collective over ``mesh``: ValueError on all ranks
    or on none."""
    try:
        names = find_names()
    except ValueError as error:
        _refuse(mesh, [str(error)])
        raise
    saved = source.state
    problems: list[str] = []
    order: list[int] = []
    if source.unsent:
        problems.append(source.unsent)
        saved = {"state": {}}
    elif not isinstance(saved, dict) or not isinstance(saved.get("state"), dict):
        problems.append(
            f'an optimizer state is a dict with "state" and "param_groups", not {_shown(saved)}'
        )
        saved = {"state": {}}
    elif "param_groups" in saved:
        if _are_groups(saved["param_groups"]):
            order = match_groups(names, saved["param_groups"], problems)
        else:
            problems.append(
                '"param_groups" of an optimizer state is a list of dicts, each with its parameters\' names under "params" (and '
                'as many under "param_names", if at all)'
            )
            saved = {**saved, "param_groups": []}
    elif optim is not None and not by_name:
        problems.append('the optimizer state has no "param_groups"')
    if optim is not None and not problems:
        problems += _lacking_options(optim, saved.get("param_groups", ()))
    listed_names = {name for group in saved.get("param_groups", ()) for name in group["params"]}
    elements = sum(p.numel() for p in names.parameters)
    states = [value for value in saved["state"].values() if isinstance(value, dict)]
    like_parameters = frozenset(
        str(key) for state in states for key, item in state.items() if _has_elements(item)
    )
    values: dict[Any, tuple[Any, Home | None]] = {}
    for name, value in saved["state"].items():
        index = names.index.get(name)
        if index is None:
            if name in listed_names:
                continue  # match_groups has named it
            # Not a parameter's: what somebody keeps in ``optim.state`` under a key of their own.
            if isinstance(value, dict) and (optim is None or name not in optim.state):
                problems.append(f'the optimizer has no parameter "{name}", the state has')
            values[name] = value, None
            continue
        parameter = names.parameters[index]
        home = Home(
            parameter,
            {} if optim is None else optim.state.get(parameter, {}),
            elements,
            like_parameters,
        )
        current = home.current
        expected = _dtype_of(parameter, optim)
        if not isinstance(value, dict):
            problems.append(f"the state of {name} is {_shown(value)}, not a dict")
            continue
        # None at all is what a parameter without gradients has.
        for key in current if value else ():
            if (
                key not in value
                and _has_elements(current[key])
                and current[key].shape == parameter.shape
            ):
                problems.append(f'the state of {name} has no "{key}", the optimizer has')
        for key, item in value.items():
            problem = _misfit(
                f"{name}: {key}", item, home, current.get(key), expected if key != "step" else None
            )
            if problem is not None:
                problems.append(problem)
        values[name if by_name else index] = value, home
    _refuse(mesh, problems)
    state = {key: _placed(*entry, source) for key, entry in values.items()}
    loadable: dict[str, Any] = {"state": state}
    if "param_groups" in saved:
        loadable["param_groups"] = [
            in_order(saved["param_groups"][i], names.index, group, by_key=by_name)
            for i, group in zip(order, names.groups, strict=True)
        ]
    return loadable


def _refuse(mesh: DeviceMesh, problems: list[str]) -> None:
    everybody = agree(mesh, problems)
    if everybody:
        raise ValueError(
            f"the optimizer state does not fit; nothing was loaded:\n\t{listed(everybody)}"
        )


def _are_groups(groups: Any) -> bool:
    return isinstance(groups, (list, tuple)) and all(
        isinstance(group, dict)
        and isinstance(group.get("params"), (list, tuple))
        and all(isinstance(name, (str, int)) for name in group["params"])
        and isinstance(given := group.get("param_names", group["params"]), (list, tuple))
        and len(given) == len(group["params"])
        for group in groups
    )


def _shown(value: Any) -> str:
    return (
        f"a dict with {sorted(map(str, value))}"
        if isinstance(value, dict)
        else f"a {type(value).__name__}"
    )


def _dtype_of(parameter: torch.Tensor, optim: torch.optim.Optimizer | None) -> torch.dtype | None:
    """What ``load_state_dict`` would silently convert floating state to; others than torch's may do
    otherwise."""
    return parameter.dtype if _is_torchs(optim) and parameter.is_floating_point() else None


def _is_torchs(optim: torch.optim.Optimizer | None) -> bool:
    return optim is not None and type(optim).__module__.startswith("torch.optim")


def _lacking_options(optim: torch.optim.Optimizer, groups: Sequence[dict[str, Any]]) -> list[str]:
    """What a step of the optimizer would look for in its groups and not find, after
    ``load_state_dict`` has filled in what states of older torch versions lack."""
    if not _is_torchs(optim):
        return []
    shadow = object.__new__(type(optim))
    shadow.__dict__.update(optim.__dict__)
    shadow.__setstate__(
        {"state": {}, "param_groups": [{**group, "params": []} for group in groups]}
    )
    asked = [key for key in optim.defaults if all(key in group for group in optim.param_groups)]
    lacking = sorted({key for group in shadow.param_groups for key in asked if key not in group})
    return [f'a parameter group of the state has no "{key}", the optimizer has' for key in lacking]


def _has_elements(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, Remote)) and len(value.shape) > 0


def _misfit(
    where: str, value: Any, home: Home, current: Any, dtype: torch.dtype | None
) -> str | None:
    parameter = home.parameter
    if isinstance(value, Remote) and value.number < 0:
        return f"{where} is a DTensor on the first rank: with rank0_only it has to be whole"
    if not _has_elements(value):
        if _has_elements(current):
            what = (
                f"a {type(value).__name__}"
                if not isinstance(value, torch.Tensor)
                else "a single value"
            )
            return f"{where} is {what}, the optimizer has a tensor of shape {tuple(current.shape)}"
        return None
    if isinstance(value, torch.Tensor) and kind_of(value) != _DENSE:
        return f"{where} is of another kind ({value.layout}, {value.dtype}) than the parameter's shards"
    shape, own = tuple(value.shape), tuple(parameter.shape)
    known = _has_elements(current)
    if known:
        own, dtype = tuple(current.shape), current.dtype
        if isinstance(value, DTensor) and not isinstance(current, DTensor):
            return f"{where} is a DTensor, the optimizer has a plain tensor there: pass value.full_tensor()"
    # Without a state to compare with: as the parameter, or (Adafactor's) reduced over some
    # dimensions, or (LBFGS's) of all parameters end to end.
    reduced = len(shape) == len(own) and all(a in (b, 1) for a, b in zip(shape, own, strict=True))
    end_to_end = shape == (home.elements,)
    fits = shape == own if known else reduced or end_to_end
    if not fits:
        # Other optimizers than torch's may keep anything. What, can be seen after a step.
        hint = (
            ""
            if known or dtype is not None
            else "; if it keeps states of such shapes, take a step first, to make them"
        )
        return f"size mismatch for {where}: {shape} given, the optimizer has {own}{hint}"
    if dtype is not None and value.dtype != dtype and value.dtype.is_floating_point:
        return f"{where} is {value.dtype}, the optimizer has {dtype}: convert it"
    if not isinstance(parameter, DTensor):
        return (
            f"{where} is a DTensor, the parameter is a plain tensor"
            if isinstance(value, DTensor)
            else None
        )
    like = current if isinstance(current, DTensor) else parameter
    if isinstance(value, DTensor):
        placed = value.placements == like.placements or shape != tuple(like.shape)
        if value.device_mesh != parameter.device_mesh or not placed:
            return (
                f"{where} is placed {value.placements} on {value.device_mesh}, the parameter "
                f"{like.placements} on "
                f"{like.device_mesh}: load it through torch.distributed.checkpoint, which reshards"
            )
        mine, its = tuple(local_of(like).shape), tuple(local_of(value).shape)
        if shape == tuple(like.shape) and mine != its:
            return f"size mismatch for {where}: this rank's shard has the shape {its}, the optimizer's {mine}"
    elif not known and not end_to_end and shape != own:
        return f"{where} is reduced to {shape}, which is cut in the optimizer's own way: take a step first, to make its state"
    return None


def _placed(value: Any, home: Home | None, source: Source) -> Any:
    if not isinstance(value, dict):
        return value
    current = {} if home is None else home.current
    return {key: _place(item, home, current.get(key), source, key) for key, item in value.items()}


def _place(value: Any, home: Home | None, current: Any, source: Source, key: Any) -> Any:
    if isinstance(value, dict):
        return {key: _place(item, home, None, source, key) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_place(item, home, None, source, key) for item in value)
    if not isinstance(value, (torch.Tensor, Remote)) or isinstance(value, DTensor):
        return value
    spec = _spec_of(value, home, current, key)
    if isinstance(value, Remote):
        assert source.mesh is not None
        if spec is not None and rows_alone(spec):
            return scatter(source.tensor(value), spec)
        value = broadcast(source.tensor(value), value.shape, value.dtype, source.mesh)
    if spec is None:
        return value
    mine = own_rows(value, spec)
    # A copy: the whole tensor may go, and the caller's stays as it is.
    local = local_of(mine).to(spec.mesh.device_type).contiguous()
    local = (
        local.clone() if local.untyped_storage()._cdata == value.untyped_storage()._cdata else local
    )
    return DTensor(local, spec, requires_grad=False)  # type: ignore[no-untyped-call]


def _spec_of(
    value: torch.Tensor | Remote, home: Home | None, current: Any, key: Any
) -> DTensorSpec | None:
    """How a whole ``value`` is placed in the optimizer; None: as a plain tensor."""
    if home is None or not isinstance(home.parameter, DTensor):
        return None
    shape, parameter = tuple(value.shape), home.parameter
    like = current if isinstance(current, torch.Tensor) else parameter
    if not isinstance(like, DTensor):
        return None
    if shape == tuple(like.shape):
        plain = not shape and like is parameter and str(key) not in home.like_parameters
        return None if plain else spec_like(like, value.dtype)
    if shape == (home.elements,):
        meta = TensorMeta(torch.Size(shape), (1,), value.dtype)
        return DTensorSpec(
            parameter.device_mesh, (Replicate(),) * parameter.device_mesh.ndim, tensor_meta=meta
        )
    return None
