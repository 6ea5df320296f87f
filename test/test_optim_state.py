"""Optimizer state: every optimizer that torch allows on DTensors, several groups, FSDP1's whole
family of functions."""

import copy

import pytest
import torch
from device import DEVICE
from models import NETS, Block, batch
from ranks import run_ranks
from states import adam, assert_same, bits, mesh_of, step, tensors, trained, wrapped
from torch import nn, optim
from torch.distributed.fsdp import FullyShardedDataParallel as TorchFSDP
from torch.distributed.fsdp import OptimStateKeyType
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.optim import _NamedOptimizer
from torch.distributed.tensor import DTensor

from torch_hsdp_ckpt import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    ShardedOptimStateDictConfig,
    StateDictType,
)
from torch_hsdp_ckpt import FullyShardedDataParallel as FSDP

FULL = StateDictType.FULL_STATE_DICT
SHARDED = StateDictType.SHARDED_STATE_DICT

# Adafactor, LBFGS on uneven shards, and fused SGD and Adagrad are what torch itself refuses on
# DTensors. LBFGS: below.
OPTIMIZERS = {
    "SGD": lambda p: optim.SGD(p, lr=0.01),
    "SGD, momentum": lambda p: optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "Adam, one by one": lambda p: optim.Adam(p, lr=0.01, amsgrad=True, foreach=False),
    "Adam, foreach": lambda p: optim.Adam(p, lr=0.01, foreach=True),
    "Adam, fused": lambda p: optim.Adam(p, lr=0.01, fused=True),
    "Adam, lr as tensor": lambda p: optim.Adam(p, lr=torch.tensor(0.01), foreach=False),
    "AdamW": lambda p: optim.AdamW(p, lr=0.01),
    "AdamW, fused": lambda p: optim.AdamW(p, lr=0.01, fused=True),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.01),
    "Adadelta": lambda p: optim.Adadelta(p, lr=0.01),
    "Adamax": lambda p: optim.Adamax(p, lr=0.01),
    "NAdam": lambda p: optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: optim.RAdam(p, lr=0.01),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
    "ASGD": lambda p: optim.ASGD(p, lr=0.01),
    "Muon": lambda p: optim.Muon([q for q in p if q.ndim == 2], lr=0.01),
}
if torch.__version__ >= "2.12":  # before, not on DTensors, and never by foreach
    OPTIMIZERS["Rprop"] = lambda p: optim.Rprop(p, lr=0.01, foreach=False)


def _every_optimizer(rank: int, names: list[str]) -> None:
    kind = "uneven"
    for name in names:
        model, optimizer = trained(kind, rank, make=OPTIMIZERS[name])
        weights = copy.deepcopy(model.state_dict())
        forms = {SHARDED: copy.deepcopy(FSDP.optim_state_dict(model, optimizer))}
        with FSDP.state_dict_type(model, FULL):
            forms[FULL] = FSDP.optim_state_dict(model, optimizer)
        assert forms[FULL]["state"].keys() == forms[SHARDED]["state"].keys()
        for parameter, values in forms[SHARDED]["state"].items():
            for key, value in values.items():
                whole = forms[FULL]["state"][parameter][key]
                assert torch.equal(
                    whole, value.full_tensor() if isinstance(value, DTensor) else value
                ), (name, parameter, key)
        step(model, optimizer, kind, 2, rank)
        for form, state in forms.items():
            other, fresh = trained(kind, rank, steps=0, make=OPTIMIZERS[name], seed=1)
            other.load_state_dict(weights)
            with FSDP.state_dict_type(other, form):
                FSDP.optim_state_dict_to_load(other, fresh, state, load_directly=True)
                step(other, fresh, kind, 2, rank)
            assert_same(
                other.state_dict(),
                {**model.state_dict(), "calls": other.state_dict()["calls"]},
                f"{name}, {form}",
            )
            assert_same(
                FSDP.optim_state_dict(other, fresh),
                FSDP.optim_state_dict(model, optimizer),
                f"{name}, {form}",
            )


@pytest.mark.parametrize("half", [0, 1])
def test_every_optimizer_goes_on_from_either_form(half: int) -> None:
    run_ranks(_every_optimizer, 4, list(OPTIMIZERS)[half::2])


def _grouped(
    net: nn.Module, mesh, *, frozen: str = "blocks.0.up.bias"
) -> tuple[FSDP, optim.Optimizer]:
    """Three groups in an order of their own, one frozen and one unused parameter."""
    net.get_parameter(frozen).requires_grad_(False)
    net.unused = nn.Linear(4, 4)
    model = wrapped(net, mesh)
    named = dict(model.named_parameters())
    norms = [p for n, p in named.items() if "norm" in n]
    biases = [p for n, p in named.items() if n.endswith("bias") and "norm" not in n]
    rest = [p for n, p in named.items() if n.endswith("weight") and "norm" not in n]
    optimizer = optim.AdamW([{"params": biases, "weight_decay": 0.0}, {"params": rest}], lr=0.01)
    optimizer.add_param_group({"params": norms, "lr": 0.002, "name": "norms"})
    return model, optimizer


def _groups(rank: int) -> None:
    kind = "uneven"
    model, optimizer = _grouped(NETS[kind](), mesh_of(2, 2))
    for number in range(2):
        step(model, optimizer, kind, number, rank)
    state = FSDP.optim_state_dict(model, optimizer)
    without = {"blocks.0.up.bias", "unused.weight", "unused.bias"}
    every = {name for name, _ in model.named_parameters()}
    assert set(state["state"]) == every - without
    assert [g["lr"] for g in state["param_groups"]] == [0.01, 0.01, 0.002] and state[
        "param_groups"
    ][2]["name"] == "norms"
    assert {name for g in state["param_groups"] for name in g["params"]} == every
    state = copy.deepcopy(state)
    weights = copy.deepcopy(model.state_dict())
    with FSDP.state_dict_type(model, FULL):
        whole = FSDP.optim_state_dict(model, optimizer)
    step(model, optimizer, kind, 2, rank)

    shuffled = copy.deepcopy(state)
    shuffled["param_groups"] = [
        {**g, "params": g["params"][::-1]} for g in reversed(shuffled["param_groups"])
    ]
    numbers = copy.deepcopy(state)
    for values in numbers["state"].values():
        values["step"] = int(values["step"])
    for saved in (state, shuffled, numbers, whole):
        other, fresh = _grouped(NETS[kind](seed=2), mesh_of(2, 2))
        other.load_state_dict(weights)
        FSDP.optim_state_dict_to_load(other, fresh, copy.deepcopy(saved), load_directly=True)
        assert [g["lr"] for g in fresh.param_groups] == [0.01, 0.01, 0.002]
        step(other, fresh, kind, 2, rank)
        assert_same(FSDP.optim_state_dict(other, fresh), FSDP.optim_state_dict(model, optimizer))
        for name, p in other.named_parameters():
            assert torch.equal(p._local_tensor, model.get_parameter(name)._local_tensor), name

    # State of the user's own, and a second optimizer for a part of the model.
    optimizer.state["mine"] = {"seen": 5}
    assert FSDP.optim_state_dict(model, optimizer)["state"]["mine"] == {"seen": 5}
    loadable = FSDP.optim_state_dict_to_load(
        model, optimizer, FSDP.optim_state_dict(model, optimizer)
    )
    assert loadable["state"]["mine"] == {"seen": 5}
    head = optim.SGD(model.module.head.parameters(), lr=0.1, momentum=0.9)
    assert FSDP.optim_state_dict(model, head)["param_groups"][0]["params"] == [
        "head.weight",
        "head.bias",
    ]


def _named(rank: int) -> None:
    """torch's optimizer that keys its state by names."""
    kind = "even"
    model, _ = trained(kind, rank, steps=0)
    optimizer = _NamedOptimizer(model.named_parameters(), optim.SGD, lr=0.1, momentum=0.9)
    model(batch(NETS[kind](), 0, rank)).sum().backward()
    optimizer.step()
    state = copy.deepcopy(FSDP.optim_state_dict(model, optimizer))
    assert set(state["state"]) == {name for name, _ in model.named_parameters()}
    loadable = FSDP.optim_state_dict_to_load(model, optimizer, state, is_named_optimizer=True)
    assert set(loadable["state"]) == set(state["state"])
    assert_same(loadable["state"], state["state"])
    optimizer.load_state_dict(loadable)
    assert_same(FSDP.optim_state_dict(model, optimizer)["state"], state["state"])


class _Scaled(nn.Module):
    """A parameter without dimensions beside others."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 6), nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.scale


# LBFGS: on shards of equal size; torch refuses others.
SHAPES = {
    "no dimensions, Adam": (_Scaled, adam),
    "no dimensions, SGD": (_Scaled, lambda p: optim.SGD(p, lr=0.01, momentum=0.9)),
    "end to end": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)),
        lambda p: optim.LBFGS(p, 0.1, 3),
    ),
}


class _Counting(optim.SGD):
    """Keeps a table of its own for every parameter, a plain tensor. (Not torch's by its module: it
    may keep what it likes.)"""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                shape = tuple(p.shape) if p.ndim == 1 else (3,)
                self.state[p].setdefault("table", torch.zeros(shape)).add_(1)
        return super().step(closure)


def _tables(rank: int) -> None:
    models = [FSDP(_Scaled(), device_mesh=mesh_of(4, 1)) for _ in range(2)]
    optimizers = [_Counting(m.parameters(), lr=0.01) for m in models]
    (model, other), (optimizer, fresh) = models, optimizers
    optimizer.step()
    for form in (SHARDED, FULL):
        with FSDP.state_dict_type(model, form), FSDP.state_dict_type(other, form):
            optimizer.step()
            state = copy.deepcopy(FSDP.optim_state_dict(model, optimizer))
            if not fresh.state:
                with pytest.raises(ValueError, match=r"layer\.weight: table: .*take a step first"):
                    FSDP.optim_state_dict_to_load(other, fresh, state)
                fresh.step()
            FSDP.optim_state_dict_to_load(other, fresh, state, load_directly=True)
        assert all(type(values["table"]) is torch.Tensor for values in fresh.state.values())
        assert_same(fresh.state_dict(), optimizer.state_dict())


def _shapes(rank: int) -> None:
    """States that are not cut by rows: of parameters without dimensions, and LBFGS's, of all
    parameters end to end."""
    x = torch.linspace(-1, 1, 8).reshape(2, 4) * (rank + 1)
    for what, (make_net, make) in SHAPES.items():

        def go_on(model: nn.Module, optimizer: optim.Optimizer) -> None:
            def closure() -> torch.Tensor:
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)

        for form, first_only in ((SHARDED, False), (FULL, False), (FULL, True)):
            configs = (
                (FullStateDictConfig(), FullOptimStateDictConfig(False, first_only))
                if form is FULL
                else ()
            )
            models = [FSDP(make_net(), device_mesh=mesh_of(2, 2)) for _ in range(2)]
            (model, other), (optimizer, fresh) = (
                models,
                [make(list(m.parameters())) for m in models],
            )
            for _ in range(2):
                go_on(model, optimizer)
            for where in (
                f"{what}, {form}, into a fresh optimizer",
                f"{what}, {form}, into one with a state",
            ):
                with (
                    FSDP.state_dict_type(model, form, *configs),
                    FSDP.state_dict_type(other, form, *configs),
                ):
                    state = copy.deepcopy(FSDP.optim_state_dict(model, optimizer))
                    FSDP.optim_state_dict_to_load(other, fresh, state, load_directly=True)
                other.load_state_dict(model.state_dict())
                assert_same(fresh.state_dict(), optimizer.state_dict(), where)
                go_on(model, optimizer)
                go_on(other, fresh)
                assert_same(other.state_dict(), model.state_dict(), where)
                assert_same(fresh.state_dict(), optimizer.state_dict(), where)
                go_on(other, fresh)


def _named_by_the_user(rank: int) -> None:
    """Optimizers that were made of named parameters keep the names, each with its parameter."""
    model, _ = trained("even", rank, steps=0)
    optimizer = optim.AdamW(model.named_parameters(), lr=0.01)
    step(model, optimizer, "even", 0, rank)
    state = copy.deepcopy(FSDP.optim_state_dict(model, optimizer))
    names = [name for name, _ in model.named_parameters()]
    assert state["param_groups"][0]["param_names"] == names
    other, _ = trained("even", rank, steps=0, seed=1)
    fresh = optim.AdamW(list(other.named_parameters())[::-1], lr=0.02)
    FSDP.optim_state_dict_to_load(other, fresh, copy.deepcopy(state), load_directly=True)
    assert (
        fresh.param_groups[0]["param_names"] == names[::-1] and fresh.param_groups[0]["lr"] == 0.01
    )
    assert_same(FSDP.optim_state_dict(other, fresh), state)
    by_number = FSDP.rekey_optim_state_dict(
        FSDP.optim_state_dict(other, fresh), OptimStateKeyType.PARAM_ID, other, optim=fresh
    )
    assert by_number["param_groups"][0]["param_names"] == names[::-1]
    state["param_groups"][0]["param_names"].pop()
    with pytest.raises(ValueError, match='as many under "param_names"'):
        FSDP.optim_state_dict_to_load(other, fresh, state)


def _configs(rank: int) -> None:
    model, optimizer = trained("uneven", rank)
    for offload in (False, True):
        with FSDP.state_dict_type(
            model, SHARDED, None, ShardedOptimStateDictConfig(offload_to_cpu=offload)
        ):
            state = FSDP.optim_state_dict(model, optimizer, optimizer.state_dict())
            shared = FSDP.optim_state_dict_to_load(model, optimizer, state)["state"][0]["exp_avg"]
            first = next(iter(optimizer.state.values()))["exp_avg"]
            is_there = DEVICE == "cpu" or not offload  # already: the memory is the optimizer's
            is_shared = shared._local_tensor.data_ptr() == first._local_tensor.data_ptr()
            assert is_shared == is_there
        for first_only in (False, True):
            config = FullOptimStateDictConfig(offload, first_only)
            with FSDP.state_dict_type(model, FULL, FullStateDictConfig(), config):
                whole = FSDP.optim_state_dict(model, optimizer)
                assert bool(whole) == (not first_only or rank == 0)
                before = bits(optimizer.state_dict())
                # rank0_only when loading too: rank 0's is sent to all.
                FSDP.optim_state_dict_to_load(model, optimizer, whole, load_directly=True)
                assert_same(optimizer.state_dict(), before)
    if rank == 2:
        del optimizer.state[next(iter(optimizer.state))]
    with (
        FSDP.state_dict_type(model, FULL),
        pytest.raises(RuntimeError, match="states of different tensors"),
    ):
        FSDP.optim_state_dict(model, optimizer)


def _family(rank: int) -> None:
    """Beside torch's own functions, on its own wrapper: the same dicts; and each takes what the
    other has made."""
    for kind, shape in (("even", (4,)), ("uneven", (4,)), ("uneven", (2, 2))):
        ours, our_optim = trained(kind, rank, shape)
        net = NETS[kind]()
        policy, device = ModuleWrapPolicy({Block}), torch.device(DEVICE)
        theirs = TorchFSDP(net, auto_wrap_policy=policy, device_id=device, use_orig_params=True)
        their_optim = adam(list(theirs.parameters()))
        for number in range(2):
            step(theirs, their_optim, kind, number, rank)
        state = FSDP.full_optim_state_dict(ours, our_optim)
        expected = _theirs(theirs, their_optim, rank0_only=True)
        assert expected.keys() == TorchFSDP.full_optim_state_dict(theirs, their_optim).keys()
        _close(state, expected)
        assert bool(state) == (rank == 0)
        everywhere = FSDP.full_optim_state_dict(ours, our_optim, rank0_only=False)
        _close(everywhere, _theirs(theirs, their_optim))
        _close(
            FSDP.full_optim_state_dict(ours, our_optim, our_optim.param_groups, False), everywhere
        )
        _close(FSDP.full_optim_state_dict(ours, our_optim, ours.parameters(), False), everywhere)

        sharded = FSDP.sharded_optim_state_dict(ours, our_optim)
        assert_same(sharded, FSDP.optim_state_dict(ours, our_optim))
        mine = bits(our_optim.state_dict())
        assert_same(
            FSDP.flatten_sharded_optim_state_dict(sharded, ours, our_optim), our_optim.state_dict()
        )
        from_all = FSDP.shard_full_optim_state_dict(everywhere, ours, optim=our_optim)
        from_first = FSDP.scatter_full_optim_state_dict(
            state if rank == 0 else None, ours, optim=our_optim
        )
        without_optim = FSDP.shard_full_optim_state_dict(everywhere, ours)
        for loadable in (from_all, from_first, without_optim):
            assert_same(loadable, mine, "as the optimizer has it")
            for value in tensors(loadable).values():
                assert (
                    value.untyped_storage().nbytes() == value.nbytes
                )  # not a view of the whole tensor
            assert loadable["param_groups"] == our_optim.state_dict()["param_groups"]

        # Out to torch's FSDP1 and back from it.
        their_optim.load_state_dict(
            TorchFSDP.shard_full_optim_state_dict(everywhere, theirs, optim=their_optim)
        )
        _close(_theirs(theirs, their_optim), everywhere, exact=True)
        our_optim.load_state_dict(
            FSDP.scatter_full_optim_state_dict(expected, ours, optim=our_optim)
        )
        _close(FSDP.full_optim_state_dict(ours, our_optim), expected, exact=True)

        # And to a model that nobody has wrapped.
        plain = NETS[kind](seed=1)
        for order in (1, -1):
            plain_optim = adam(list(plain.parameters())[::order])
            rekeyed = FSDP.rekey_optim_state_dict(
                everywhere, OptimStateKeyType.PARAM_ID, plain, optim=plain_optim
            )
            theirs_too = TorchFSDP.rekey_optim_state_dict(
                everywhere, OptimStateKeyType.PARAM_ID, plain, optim=plain_optim
            )
            assert list(rekeyed["state"]) == list(theirs_too["state"])
            assert rekeyed["param_groups"] == theirs_too["param_groups"]
            assert_same(rekeyed, theirs_too)
            plain_optim.load_state_dict(rekeyed)
            back = FSDP.rekey_optim_state_dict(
                plain_optim.state_dict(),
                OptimStateKeyType.PARAM_NAME,
                plain,
                list(plain.parameters())[::order],
            )
            assert back["state"].keys() == everywhere["state"].keys()
            assert_same(
                FSDP.shard_full_optim_state_dict(back, ours, optim=our_optim)["state"],
                from_all["state"],
            )
        assert FSDP.rekey_optim_state_dict(back, OptimStateKeyType.PARAM_NAME, plain) is back
        with pytest.raises(ValueError, match="no such parameters"):
            strange = {"state": {"nobody": {}}, "param_groups": []}
            FSDP.rekey_optim_state_dict(
                strange, OptimStateKeyType.PARAM_ID, plain, optim=plain_optim
            )
        with pytest.raises(ValueError, match="keys of types"):
            mixed = {"state": {"head.bias": {}, 3: {}}, "param_groups": []}
            FSDP.rekey_optim_state_dict(mixed, OptimStateKeyType.PARAM_ID, plain, optim=plain_optim)


def _theirs(model: TorchFSDP, optimizer: optim.Optimizer, rank0_only: bool = False) -> dict:
    """What torch's full_optim_state_dict is meant to return. That asks for copies on the CPU, and
    takes the gather's own buffer for one where that is on the CPU: every state then shows the last
    one's values."""
    with TorchFSDP.state_dict_type(
        model, FULL, FullStateDictConfig(), FullOptimStateDictConfig(False, rank0_only)
    ):
        return TorchFSDP.optim_state_dict(model, optimizer)


def _close(state, expected, exact: bool = False) -> None:
    assert state.keys() == expected.keys()
    if not state:
        return
    assert state["state"].keys() == expected["state"].keys()
    assert [sorted(g["params"]) for g in state["param_groups"]] == [
        sorted(g["params"]) for g in expected["param_groups"]
    ]
    assert [g["lr"] for g in state["param_groups"]] == [g["lr"] for g in expected["param_groups"]]
    for name, values in expected["state"].items():
        assert state["state"][name].keys() == values.keys()
        for key, value in values.items():
            torch.testing.assert_close(
                state["state"][name][key],
                value,
                rtol=0 if exact else 1e-4,
                atol=0 if exact else 1e-6,
                check_device=False,  # full_optim_state_dict's are on the CPU, these not always
                msg=lambda m, at=f"{name} {key}": at + m,
            )


@pytest.mark.parametrize(
    "part",
    [_groups, _named, _shapes, _tables, _named_by_the_user, _configs, _family],
    ids=lambda part: part.__name__[1:],
)
def test_optimizer_state(part) -> None:
    run_ranks(part, 4)
