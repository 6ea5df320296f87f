"""What does not fit is an error on every rank that lists the names; module and optimizer are as
they were, bit for bit."""

import copy
import threading

import pytest
import torch
from ranks import run_ranks
from states import Wrap, assert_same, bits, fully_sharded, mesh_of, trained, wrapped
from torch import nn, optim
from torch.distributed.tensor import DTensor

from torch_hsdp_ckpt import FullOptimStateDictConfig, StateDictType, fully_shard
from torch_hsdp_ckpt import FullyShardedDataParallel as FSDP


def _model(rank: int) -> None:
    _mismatches(rank, wrapped)


def _model_fully_shard(rank: int) -> None:
    """FSDP2's own copies what fits before it raises, and only on the rank that was given it."""
    _mismatches(rank, fully_sharded)


def _mismatches(rank: int, wrap: Wrap) -> None:
    model, _ = trained("uneven", rank, wrap=wrap)
    other, _ = trained("even", rank, wrap=wrap)
    line, _ = trained("uneven", rank, (4,), wrap=wrap)
    state = copy.deepcopy(model.state_dict())
    before, key = bits(state), "head.weight"
    ones = {k: torch.full_like(v, 9) for k, v in state.items()}
    without = {k: v for k, v in ones.items() if k != key}
    wrong = [
        (without, f'Missing key: "{key}"'),
        ({**ones, "head.strange": torch.ones(1)}, 'Unexpected key: "head.strange"'),
        ({**ones, key: other.state_dict()[key]}, f'size mismatch for "{key}"'),
        ({**ones, key: ones[key].double()}, f'"{key}" is torch.float64'),
        ({**ones, "calls": torch.ones(2)}, 'size mismatch for "calls"'),
        ({**ones, key: torch.ones(3, 7)}, "plain tensor"),
        ({**ones, key: "text"}, "not a tensor"),
        (None, "not a NoneType"),
        ({**ones, 3: torch.ones(1)}, "keys are names, not a int: 3"),
        (
            {**ones, "calls": torch.tensor(9).to_sparse()},
            '"calls" is of another kind (torch.sparse_coo',
        ),
        # One row where the shard has two: a plain copy would fill both with it.
        (
            {**ones, key: DTensor(torch.ones(1, 7), ones[key]._spec, requires_grad=False)},
            f'"{key}": this rank\'s shard',
        ),
        ({**ones, key: line.state_dict()[key]}, "torch.distributed.checkpoint"),
        (dict(other.state_dict()), 'size mismatch for "blocks.1.down.weight"'),
    ]
    for bad, message in wrong:
        for alone in (
            False,
            True,
        ):  # on every rank, or on one only: an error on all of them either way
            with pytest.raises(RuntimeError) as error:
                model.load_state_dict(bad if not alone or rank == 2 else ones)
            assert message in str(error.value) and ("rank 2: " in str(error.value)) == (
                alone and rank != 2
            )
            assert_same(model.state_dict(), before, message)
    _whole_state(model)
    assert_same(model.state_dict(), before, "a whole state")
    partial = model.load_state_dict({**without, "head.strange": torch.ones(1)}, strict=False)
    assert (partial.missing_keys, partial.unexpected_keys) == ([key], ["head.strange"])
    assert torch.equal(
        model.state_dict()["head.bias"]._local_tensor, ones["head.bias"]._local_tensor
    )
    assert torch.equal(model.state_dict()[key]._local_tensor, before[key])


def _whole_state(model: nn.Module) -> None:
    """What to do is said once, then all names."""
    whole = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in model.state_dict().items()}
    sharded = [key for key, value in model.state_dict().items() if isinstance(value, DTensor)]
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(whole)
    _, advice, *lines = str(error.value).splitlines()
    assert advice.strip().startswith("to load whole tensors use set_model_state_dict")
    assert [line.split('"')[1] for line in lines] == sharded and len(sharded) > 2


class _Raises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.tensor(1))

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        if state_dict[prefix + "count"] < 0:
            raise ArithmeticError("a count below 0")
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Extra(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.version = [7]

    def get_extra_state(self):
        return {"version": self.version}

    def set_extra_state(self, state) -> None:
        self.version[:] = state["version"]


def _architecture(rank: int) -> None:
    """Another architecture's checkpoint: what is missing is named whole, what is there beside it up
    to fifty names in all."""
    model, _ = trained("uneven", rank)
    before = bits(model.state_dict())
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict({f"layers.{i}.weight": torch.ones(1) for i in range(60)})
    text, keys = str(error.value), list(model.state_dict())
    assert all(f'Missing key: "{key}"' in text for key in keys)
    shown = text.count("Unexpected key: ")
    assert len(keys) + shown == 50 and f"... and {60 - shown} more" in text
    assert_same(model.state_dict(), before)


def _batch_norm(rank: int) -> None:
    """Modules that load in a way of their own are asked before anything is copied."""
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model = FSDP(net)
    state = copy.deepcopy(model.state_dict())
    before = bits(state)
    ones = {k: torch.full_like(v, 9) for k, v in state.items()}
    for bad, message in (
        ({k: v for k, v in ones.items() if k != "1.running_mean"}, "1.running_mean"),
        ({**ones, "1.running_var": torch.ones(3)}, "1.running_var"),
        ({**ones, "1.running_var": torch.ones(4).to_sparse()}, "1.running_var.*another kind"),
        ({**ones, 3: torch.ones(1)}, "keys are names"),
        ({**ones, "1.strange": torch.ones(3)}, "1.strange"),
    ):
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(bad)
        assert_same(model.state_dict(), before, message)
    model.load_state_dict(ones)
    assert_same(model.state_dict(), ones)
    net[0].register_load_state_dict_pre_hook(
        lambda *args: None
    )  # another way of loading, for all of the model
    with pytest.raises(RuntimeError, match=r'"1\.running_mean" is torch\.float64'):
        model.load_state_dict({**state, "1.running_mean": state["1.running_mean"].double()})
    assert_same(model.state_dict(), ones)
    reads = FSDP(nn.Sequential(nn.Linear(4, 4), _Raises()))
    state = copy.deepcopy(reads.state_dict())
    before = bits(state)
    state["0.weight"] = torch.full_like(state["0.weight"], 9)
    if rank == 1:
        state["1.count"] = torch.tensor(-1)
    with pytest.raises(RuntimeError, match="ArithmeticError: a count below 0"):
        reads.load_state_dict(state)
    assert_same(reads.state_dict(), before)
    extra = FSDP(nn.Sequential(_Extra(), nn.Linear(4, 4)))
    state = {**extra.state_dict(), "0._extra_state": {"version": [8]}}
    del state["1.bias"]
    with pytest.raises(RuntimeError, match=r"1\.bias"):
        extra.load_state_dict(state)
    assert extra.module[0].version == [7]
    extra.load_state_dict(state, strict=False)
    assert extra.module[0].version == [8]
    _extra_state_of_its_own_mind()


class _NoCopy(_Extra):
    """What it keeps can't be copied; nobody but a load that fails needs that."""

    def get_extra_state(self):
        return {"version": self.version, "lock": threading.Lock()}


class _NoWayBack(_Extra):
    def set_extra_state(self, state) -> None:
        if state["version"] == [7]:
            raise ArithmeticError("not that one again")
        super().set_extra_state(state)


def _extra_state_of_its_own_mind() -> None:
    for kind, reason in (
        (_NoCopy, "could not be copied before: TypeError"),
        (_NoWayBack, "ArithmeticError: not that one"),
    ):
        model = FSDP(nn.Sequential(kind(), nn.Linear(4, 4)))
        before = bits({k: v for k, v in model.state_dict().items() if "extra" not in k})
        nines = {
            k: torch.full_like(v, 9) for k, v in model.state_dict().items() if "extra" not in k
        }
        state = {**nines, "0._extra_state": {"version": [8]}}
        lacking = {k: v for k, v in state.items() if k != "1.bias"}
        for assign in (False, True):
            model.module[0].version[:] = [7]
            with pytest.raises(
                RuntimeError, match=rf"(?s)1\.bias.*The extra state of 0 may have changed.*{reason}"
            ):
                model.load_state_dict(lacking, assign=assign)
            assert_same({k: v for k, v in model.state_dict().items() if "extra" not in k}, before)
        model(torch.ones(1, 4)).sum().backward()
        assert all(
            p.grad is not None for p in model.parameters()
        )  # the shards are bound to their unit
        model.load_state_dict(state)
        assert model.module[0].version == [8]
        assert all((p.to_local() == 9).all() for p in model.parameters())


def _optimizer(rank: int) -> None:
    model, optimizer = trained("uneven", rank)
    other, other_optim = trained("even", rank)
    state = copy.deepcopy(FSDP.optim_state_dict(model, optimizer))
    before, key = bits(optimizer.state_dict()), "head.weight"
    groups, steps = (
        copy.deepcopy(optimizer.state_dict()["param_groups"]),
        [s["step"] for s in optimizer.state.values()],
    )

    def changed(**values):
        new = copy.deepcopy(state)
        new["state"][key].update(values)
        return new

    renamed = changed()
    renamed["state"]["nobody"] = renamed["state"].pop(key)
    split = changed()
    group = split["param_groups"][0]
    split["param_groups"] = [
        {**group, "params": group["params"][:3]},
        {**group, "params": group["params"][3:]},
    ]
    lacking = changed()
    lacking["param_groups"][0]["params"].remove(key)

    def regrouped(**options):
        new = changed()
        new["param_groups"] = [{key: value for key, value in options.items() if value is not None}]
        return new

    entry = state["state"][key]
    heavy = {"momentum_buffer": torch.full_like(entry["exp_avg"], 9)}
    sgd = {
        "lr": 0.1,
        "momentum": 0.9,
        "dampening": 0,
        "weight_decay": 0,
        "nesterov": False,
        "params": group["params"],
    }
    wrong = [
        (
            {**state, "state": {**state["state"], key: 3}},
            f"the state of {key} is a int, not a dict",
        ),
        (
            {**state, "state": {**state["state"], key: heavy}},
            f'the state of {key} has no "exp_avg"',
        ),
        (changed(exp_avg=torch.tensor(1.0)), f"{key}: exp_avg is a single value"),
        (changed(exp_avg="text"), f"{key}: exp_avg is a str"),
        (changed(exp_avg=torch.empty(3, 7, device="meta")), f"{key}: exp_avg is on the meta"),
        (changed(step=torch.tensor(1.0, device="meta")), f"{key}: step is on the meta device"),
        ({"state": state["state"]}, 'no "param_groups"'),
        (regrouped(**{**group, "lr": None}), 'no "lr"'),
        (regrouped(**sgd), 'no "betas"'),
        (renamed, "nobody"),
        (split, "1 parameter groups, the state 2"),
        (lacking, f'the state has no parameter "{key}"'),
        (changed(exp_avg=torch.ones(4, 4)), f"size mismatch for {key}: exp_avg"),
        (changed(exp_avg=torch.ones(2, 7)), f"size mismatch for {key}: exp_avg"),
        (
            changed(exp_avg=DTensor(torch.ones(1, 7), entry["exp_avg"]._spec, requires_grad=False)),
            f"{key}: exp_avg: this rank's shard",
        ),
        (
            changed(exp_avg=state["state"][key]["exp_avg"].double()),
            f"{key}: exp_avg is torch.float64",
        ),
        (
            FSDP.optim_state_dict(other, other_optim),
            "size mismatch for blocks.1.down.weight: exp_avg",
        ),
        ({}, 'a dict with "state"'),
        ({"state": {}, "param_groups": [{}]}, "a list of dicts"),
        ({"state": {}, "param_groups": 3}, "a list of dicts"),
    ]
    for bad, message in wrong:
        for alone in (False, True):
            with pytest.raises(ValueError) as error:
                given = bad if not alone or rank == 2 else state
                FSDP.optim_state_dict_to_load(model, optimizer, given, load_directly=True)
            assert message in str(error.value), (message, str(error.value))
            assert_same(optimizer.state_dict(), before, message)
            assert optimizer.state_dict()["param_groups"] == groups
            assert all(
                s["step"] is step for s, step in zip(optimizer.state.values(), steps, strict=True)
            )
    with FSDP.state_dict_type(
        model, StateDictType.FULL_STATE_DICT, None, FullOptimStateDictConfig(rank0_only=True)
    ):
        for item, message in (
            (torch.ones(3, 7).to_sparse(), "another kind"),
            (torch.ones(3, 7, device="meta"), "on the meta device"),
            (threading.Lock(), "can't be sent: TypeError"),
        ):
            whole = FSDP.optim_state_dict(
                model, optimizer
            )  # the first rank's counts, the others have nothing
            if rank == 0:
                whole["state"][key]["exp_avg"] = item
            with pytest.raises(ValueError, match=message):
                FSDP.optim_state_dict_to_load(model, optimizer, whole, load_directly=True)
            assert_same(optimizer.state_dict(), before, message)
    stranger = optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(ValueError, match="not the model's"):
        FSDP.optim_state_dict(model, stranger)
    with pytest.raises(ValueError, match="not the model's"):  # the peers hear of it
        FSDP.optim_state_dict_to_load(model, stranger if rank == 1 else optimizer, state)


def _own_loading(rank: int) -> None:
    """A class under fully_shard that loads in a way of its own is still asked, and what it has done
    is undone."""

    class Renames(nn.Linear):
        def load_state_dict(self, state_dict, strict=True, assign=False):
            loaded = super().load_state_dict(
                {k.removeprefix("old."): v for k, v in state_dict.items()}, strict, assign
            )
            if rank == 3 and "old.bias" in state_dict:
                raise ArithmeticError("no old bias")
            return loaded

    model = fully_shard(Renames(3, 5), mesh=mesh_of(2, 2))
    before = bits(model.state_dict())
    ones = {k: torch.full_like(v, 9) for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="no old bias"):
        model.load_state_dict({f"old.{k}": v for k, v in ones.items()})
    assert_same(model.state_dict(), before)
    model.load_state_dict({"old.weight": ones["weight"], "bias": ones["bias"]})
    assert_same(model.state_dict(), ones)


PARTS = [_model, _model_fully_shard, _architecture, _batch_norm, _own_loading, _optimizer]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__[1:])
def test_what_does_not_fit_changes_nothing(part) -> None:
    run_ranks(part, 4)
