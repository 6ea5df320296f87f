"""torch's get_ and set_ functions with every StateDictOptions, on both of our faces and on FSDP2 in
the same process.

The three are trained alike, to the same bits. What FSDP2 gives and takes, ours give and take; where
it raises, ours raise."""

import copy
import itertools
import warnings
from typing import Any

import pytest
import torch
from models import NETS
from ranks import run_ranks
from states import adam, assert_same, bits, fully_sharded, mesh_of, step, wrapped
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard as torch_fully_shard
from torch.distributed.tensor import DTensor
from training import wrap_fsdp2

import torch_hsdp_ckpt as hsdp

FROZEN = "blocks.0.up.bias"


FACES = {
    "FSDP": lambda net: wrapped(net, mesh_of(2, 2)),
    "fully_shard": lambda net: fully_sharded(net, mesh_of(2, 2)),
}
SYSTEMS = {"FSDP2": lambda net: wrap_fsdp2(net, (2, 2)), **FACES}


def _made(
    system: str, rank: int, steps: int, seed: int = 0
) -> tuple[nn.Module, torch.optim.Optimizer]:
    net = NETS["uneven"](seed)
    net.get_parameter(FROZEN).requires_grad_(False)
    model = SYSTEMS[system](net)
    optimizer = adam(list(model.parameters()))
    for number in range(steps):
        step(model, optimizer, "uneven", number, rank)
    return model, optimizer


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """What is in nested dicts and lists, by path; of tensors all that counts."""
    if isinstance(value, dict):
        return {
            k: v for key, item in value.items() for k, v in _flat(item, f"{path}/{key}").items()
        }
    if isinstance(value, (list, tuple)):
        return {k: v for i, item in enumerate(value) for k, v in _flat(item, f"{path}/{i}").items()}
    if isinstance(value, DTensor):
        return {
            path: (
                "DTensor",
                value.placements,
                tuple(value.shape),
                value.dtype,
                value._local_tensor.tolist(),
            )
        }
    if isinstance(value, torch.Tensor):
        return {path: (tuple(value.shape), value.dtype, value.tolist())}
    return {path: value}


def _outcome(call: Any, *args: Any, **options: Any) -> Any:
    """What the call returns, or what it raises: the type, and whether the message names the frozen
    parameter."""
    try:
        return call(*args, **options)
    except (RuntimeError, KeyError, ValueError) as error:
        return type(error), FROZEN in str(error)


def _every_option() -> list[dict[str, bool]]:
    names = (
        "full_state_dict",
        "broadcast_from_rank0",
        "cpu_offload",
        "flatten_optimizer_state_dict",
        "ignore_frozen_params",
    )
    chosen = [
        dict(zip(names, values, strict=True))
        for values in itertools.product((False, True), repeat=len(names))
    ]
    return [
        options
        for options in chosen
        if options["full_state_dict"] or not options["broadcast_from_rank0"]
    ]


def _gets_and_sets(rank: int) -> None:
    trained = {system: _made(system, rank, steps=2) for system in SYSTEMS}
    others = {system: _made(system, rank, steps=0, seed=1)[0] for system in SYSTEMS}
    first = {system: copy.deepcopy(model.state_dict()) for system, model in others.items()}
    for chosen in _every_option():
        where = ", ".join(name for name, value in chosen.items() if value)
        options = StateDictOptions(**chosen)
        states = {system: get_state_dict(*trained[system], options=options) for system in SYSTEMS}
        for system in FACES:
            assert _flat(states[system]) == _flat(states["FSDP2"]), (system, where)
        only_first = chosen["full_state_dict"] and chosen["cpu_offload"]
        assert bool(states["FSDP"][0]) == bool(states["FSDP"][1]) == (not only_first or rank == 0)
        if only_first and not chosen["broadcast_from_rank0"]:
            # only rank 0 has it: torch's set_ functions would wait for the others, for FSDP2 as for
            # ours
            continue
        for strict in (True, False) if options.ignore_frozen_params else (True,):
            options = StateDictOptions(**chosen, strict=strict)
            outcomes = {}
            for system, other in others.items():
                other.load_state_dict(first[system])
                optimizer = adam(list(other.parameters()))
                model_state, optim_state = copy.deepcopy(states[system])
                outcomes[system] = [
                    _outcome(set_model_state_dict, other, model_state, options=options)
                ]
                if isinstance(
                    outcomes[system][0][0], type
                ):  # FSDP2 then has loaded what did fit; see test_bad_state.py
                    if (
                        system in FACES and not options.broadcast_from_rank0
                    ):  # torch broadcasts into the live shards
                        assert_same(other.state_dict(), first[system])
                    other.load_state_dict(first[system])
                outcomes[system].append(
                    _outcome(
                        set_optimizer_state_dict, other, optimizer, optim_state, options=options
                    )
                )
                whole_and_flat = (
                    chosen["full_state_dict"] and chosen["flatten_optimizer_state_dict"]
                )
                assert (outcomes[system][1] is not None) == whole_and_flat, (
                    system,
                    where,
                    outcomes[system][1],
                )
                if whole_and_flat:
                    # torch's function makes the optimizer's own state flat too, and then looks for
                    # its groups in vain. A flat state is seen to be flat without the option, and is
                    # taken.
                    again = StateDictOptions(
                        **{**chosen, "flatten_optimizer_state_dict": False}, strict=strict
                    )
                    set_optimizer_state_dict(
                        other, optimizer, copy.deepcopy(states[system][1]), options=again
                    )
                outcomes[system].append(_flat([other.state_dict(), optimizer.state_dict()]))
            for system in FACES:
                assert outcomes[system] == outcomes["FSDP2"], (system, where, strict)


def _there_and_back(rank: int) -> None:
    """Both in one call, and another mesh in between; the run that goes on is the one that never
    stopped, to the bit."""
    for system in FACES:
        model, optimizer = _made(system, rank, steps=2)
        for chosen in (
            {},
            {"cpu_offload": True},
            {"full_state_dict": True},
            dict.fromkeys(ALL_ON_FIRST, True),
        ):
            options = StateDictOptions(**chosen)
            saved = copy.deepcopy(get_state_dict(model, optimizer, options=options))
            alone = (
                get_model_state_dict(model, options=options),
                get_optimizer_state_dict(model, optimizer, options=options),
            )
            assert _flat(alone) == _flat(saved), (system, chosen)
            before = bits([model.state_dict(), optimizer.state_dict()])
            other, fresh = _made(system, rank, steps=1, seed=2)
            if options.broadcast_from_rank0:
                # With nothing to load, as on these ranks, set_state_dict skips the model, and rank
                # 0 waits: FSDP2's too.
                set_model_state_dict(other, saved[0], options=options)
                set_optimizer_state_dict(other, fresh, saved[1], options=options)
            else:
                set_state_dict(
                    other,
                    fresh,
                    model_state_dict=saved[0],
                    optim_state_dict=saved[1],
                    options=options,
                )
            assert_same([other.state_dict(), fresh.state_dict()], before, f"{system}, {chosen}")
            step(model, optimizer, "uneven", 5, rank)
            step(other, fresh, "uneven", 5, rank)
            assert_same(
                [other.state_dict(), fresh.state_dict()],
                [model.state_dict(), optimizer.state_dict()],
            )

        # Several optimizers, of which one state speaks; and the model's part below some modules,
        # which torch is leaving.
        parts = [
            [p for n, p in model.named_parameters() if n.startswith("head") == head]
            for head in (True, False)
        ]
        two = [adam(part) for part in parts]
        for each in two:
            step(model, each, "uneven", 6, rank)
        state = copy.deepcopy(get_optimizer_state_dict(model, two))
        assert len(state["param_groups"]) == 2 and set(state["state"]) == {
            n for n, _ in model.named_parameters()
        } - {FROZEN}
        after = bits([each.state_dict() for each in two])
        for each in two:
            step(model, each, "uneven", 7, rank)
        set_optimizer_state_dict(model, two, state)
        assert_same([each.state_dict() for each in two], after)
        head = next(module for name, module in model.named_modules() if name.endswith("head"))
        for keep in (True, False):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                options = StateDictOptions(keep_submodule_prefixes=keep)
                part = get_model_state_dict(model, submodules={head}, options=options)
                assert list(part) == [f"head.{key}" if keep else key for key in ("weight", "bias")]
                if not keep:
                    given = {head: {key: value + 1 for key, value in part.items()}}
                    assert (
                        "blocks.0.up.weight"
                        in set_model_state_dict(
                            model, given, options=StateDictOptions(strict=False)
                        ).missing_keys
                    )
                    assert torch.equal(
                        model.state_dict()["head.bias"]._local_tensor,
                        given[head]["bias"]._local_tensor,
                    )


class _Adapter(nn.Module):
    """A linear layer whose own name inside does not show in state dicts: hooks take it out and put
    it back."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 5)
        self.register_state_dict_post_hook(self._hide)
        self.register_load_state_dict_pre_hook(self._show)

    def _fqn_modifiers(self) -> dict[str, str]:
        return {"weight": "inner", "bias": "inner"}

    @staticmethod
    def _hide(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for key in [key for key in state if key.startswith(f"{prefix}inner.")]:
            state[prefix + key.removeprefix(f"{prefix}inner.")] = state.pop(key)

    @staticmethod
    def _show(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for name in module._fqn_modifiers():
            if prefix + name in state:
                state[f"{prefix}inner.{name}"] = state.pop(prefix + name)


def _hidden_names(rank: int) -> None:
    """``dsd_fqn_modifiers``: the modules' method that says which of their names state dicts leave
    out. torch asks for it by the default name where it gets a state dict, whatever the option says.
    """
    options = StateDictOptions(dsd_fqn_modifiers="_fqn_modifiers")
    mesh = mesh_of(2, 2)
    wraps = {
        "FSDP2": torch_fully_shard,
        "FSDP": lambda net, mesh: wrapped(net, mesh),
        "fully_shard": hsdp.fully_shard,
    }
    seen = {}
    for system, wrap in wraps.items():
        torch.manual_seed(0)
        model = wrap(nn.Sequential(_Adapter(), nn.Linear(5, 2)), mesh=mesh)
        state = copy.deepcopy(get_model_state_dict(model, options=options))
        assert sorted(state) == ["0.bias", "0.weight", "1.bias", "1.weight"], system
        seen[system] = _flat(state)
        ones = {key: torch.full_like(value, 9) for key, value in state.items()}
        set_model_state_dict(model, ones, options=options)
        assert_same(get_model_state_dict(model, options=options), ones, system)
    assert seen["FSDP"] == seen["fully_shard"] == seen["FSDP2"]


ALL_ON_FIRST = ("full_state_dict", "cpu_offload", "broadcast_from_rank0")


def _wrong_on_the_first(rank: int) -> None:
    """What rank 0 sends to all, or every rank has, does not fit: an error on every rank that names
    it, and nobody waits."""
    model, optimizer = _made("FSDP", rank, steps=1)
    for chosen in ({"full_state_dict": True}, dict.fromkeys(ALL_ON_FIRST[::2], True)):
        options = StateDictOptions(**chosen)
        before = bits([model.state_dict(), optimizer.state_dict()])
        state = copy.deepcopy(get_model_state_dict(model, options=options))
        here = rank == 0 or not options.broadcast_from_rank0
        strange = {**state, "strange": torch.ones(2)}
        with pytest.raises(RuntimeError, match='Unexpected key: "strange"'):
            set_model_state_dict(model, strange if here else {}, options=options)
        if (
            options.broadcast_from_rank0
        ):  # without, torch fills what is missing from the module itself
            del state["head.bias"]
            with pytest.raises(RuntimeError, match=r'Missing key: "head\.bias"'):
                set_model_state_dict(model, state if here else {}, options=options)
        assert_same([model.state_dict(), optimizer.state_dict()], before)


@pytest.mark.parametrize(
    "part",
    [_gets_and_sets, _there_and_back, _hidden_names, _wrong_on_the_first],
    ids=lambda part: part.__name__[1:],
)
def test_state_dict_options(part) -> None:
    run_ranks(part, 4)
