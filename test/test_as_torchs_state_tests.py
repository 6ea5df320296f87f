"""Public behaviour that torch's own tests of FSDP1's state dicts pin, on both
sides."""

import io
from contextlib import nullcontext
from types import ModuleType

import pytest
import torch
import torch.distributed.fsdp as torchs
from ranks import run_checks
from sides import SIDES, assert_same, fsdp1, layers
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from training import mesh_of

import torch_hsdp_ckpt as ours


def _whole_states_in_other_orders(rank: int) -> None:
    """``test_optim_state_dict_nested`` with ``use_diff_optim_inputs``; beside one process, as
    torch's FSDP1 gives wrong whole states where a unit has several parameters on the CPU."""
    net = layers()
    alone = torch.optim.Adam(net.parameters())
    net(torch.ones(2, 4)).sum().backward()
    alone.step()
    expected = {name: alone.state[p]["exp_avg"].cpu() for name, p in net.named_parameters()}
    for side in SIDES:
        model = fsdp1(side, layers())
        parameters = list(model.parameters())
        optimizer = torch.optim.Adam(parameters[::-1] if rank % 2 else parameters)
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        fsdp = side.FullyShardedDataParallel
        with fsdp.state_dict_type(model, side.StateDictType.FULL_STATE_DICT):
            state = fsdp.optim_state_dict(model, optimizer)
            moments = _moments(state)
            optimizer.load_state_dict(fsdp.optim_state_dict_to_load(model, optimizer, state))
        assert moments["0.weight"].shape == (4, 4)
        if side is ours:
            assert_same([moments, expected])


def _moments(state: dict) -> dict[str, Tensor]:
    """Copies, as a load on torch's side changes what it is given."""
    return {name: each["exp_avg"].clone() for name, each in state["state"].items()}


def _states_without_groups(rank: int) -> None:
    """``test_optim_state_without_param_groups``."""
    for side in SIDES:
        model = fsdp1(side, layers())
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        fsdp = side.FullyShardedDataParallel
        state = optimizer.state_dict()
        groups = state.pop("param_groups")
        named = fsdp.optim_state_dict(model, optimizer, optim_state_dict=state)
        assert "param_groups" not in named
        loadable = fsdp.optim_state_dict_to_load(model, optimizer, named)
        assert "param_groups" not in loadable
        optimizer.load_state_dict({**loadable, "param_groups": groups})
    with pytest.raises(ValueError, match='no "param_groups"'):
        fsdp = ours.FullyShardedDataParallel
        model = fsdp1(ours, layers())
        optimizer = torch.optim.Adam(model.parameters())
        fsdp.optim_state_dict_to_load(model, optimizer, {"state": {}}, load_directly=True)


def _hung_on_the_wrapper(rank: int) -> None:
    """``test_named_parameters_and_buffers``: what is registered on the wrapper itself."""
    for side in SIDES:
        model = fsdp1(side, layers())
        model.register_buffer("seen", torch.ones(1))
        model.extra = nn.Linear(2, 2)
        for kind in (ours.StateDictType.SHARDED_STATE_DICT, ours.StateDictType.FULL_STATE_DICT):
            with side.FullyShardedDataParallel.state_dict_type(model, kind):
                state = model.state_dict()
            assert {"seen", "extra.weight", "0.weight"} <= set(state)
            if side is torchs:
                continue  # and a load of what torch itself has saved finds other keys
            state["seen"] = torch.full((1,), 5.0)
            with side.FullyShardedDataParallel.state_dict_type(model, kind):
                model.load_state_dict(state)
            assert float(model.seen) == 5.0
            model.seen.fill_(1.0)
        assert dict(model.named_buffers(prefix="p"))["p.seen"] is model.seen
        prefixed = model.state_dict(prefix="foo.")
        assert {"foo.seen", "foo.0.weight"} <= set(prefixed)


def _checkpointing_after_wrapping(rank: int) -> None:
    """``test_fsdp_state_dict_with_activation_checkpoint``."""
    plain = layers()
    for side in SIDES:
        model = fsdp1(side, layers(), auto_wrap_policy=ModuleWrapPolicy({nn.Linear}))
        apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, nn.Linear))
        model(torch.ones(2, 4)).sum().backward()
        kind = side.StateDictType.FULL_STATE_DICT
        with side.FullyShardedDataParallel.state_dict_type(model, kind):
            state = model.state_dict()
            assert list(state) == list(plain.state_dict())
            model.load_state_dict(state)


def _compiled(rank: int) -> None:
    """``test_compiled_fsdp``: names without the compiler's."""
    compiled = torch.compile(ours.fully_shard(layers()), backend="eager")
    optimizer = torch.optim.Adam(compiled.parameters())
    compiled(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    model, optim = get_state_dict(compiled, optimizer)
    assert set(model) == set(layers().state_dict())
    set_state_dict(compiled, optimizer, model_state_dict=model, optim_state_dict=optim)
    named = ours.FullyShardedDataParallel.optim_state_dict(compiled, optimizer)
    # As FSDP1's, which leaves the compiler's prefix.
    assert set(named["state"]) == {name for name, _ in compiled.named_parameters()}
    loadable = ours.FullyShardedDataParallel.optim_state_dict_to_load(compiled, optimizer, named)
    optimizer.load_state_dict(loadable)


def _saved_by_torch_save(rank: int) -> None:
    """``test_torch_save_load``: a sharded state through ``torch.save``."""
    for side in SIDES:
        model = side.fully_shard(layers())
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=side is ours)
        with nullcontext() if side is ours else torch.no_grad():
            model.load_state_dict(state)


class _Sparse(nn.Module):
    """A wrapped part, and one that each rank has under a name of its own."""

    def __init__(self, side: ModuleType, rank: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dense = fsdp1(side, nn.Linear(4, 4))
        setattr(self, f"sparse{rank}", nn.Linear(4, 4))


def _states_of_some_ranks(rank: int) -> None:
    """``test_compatible_with_trec``, ``test_state_dict_with_none_tensor_state``."""
    for side in SIDES:
        model = _Sparse(side, rank)
        optimizer = torch.optim.Adam(model.parameters())
        (
            model.dense(torch.ones(2, 4)) + getattr(model, f"sparse{rank}")(torch.ones(2, 4))
        ).sum().backward()
        optimizer.step()
        fsdp = side.FullyShardedDataParallel
        state = fsdp.optim_state_dict(model, optimizer)
        assert {f"sparse{rank}.weight", "dense.weight"} <= set(state["state"])
        for each in state["state"].values():
            each["nothing"], each["number"] = None, 1.5
        loadable = fsdp.optim_state_dict_to_load(model, optimizer, state)
        assert all(each["number"] == 1.5 for each in loadable["state"].values())
        optimizer.load_state_dict(loadable)


def _mixed_strategies(rank: int) -> None:
    """``MIXED_HYBRID_FULL_SHARD``, ``test_optim_state_dict_nested``: whole states over several
    meshes."""
    states = []
    for side in SIDES:
        net = layers(3)
        strategies = side.ShardingStrategy
        net[0] = fsdp1(side, net[0], sharding_strategy=strategies.NO_SHARD)
        net[1] = fsdp1(
            side,
            net[1],
            sharding_strategy=strategies.HYBRID_SHARD,
            device_mesh=mesh_of((2, 2)),
        )
        model = fsdp1(side, net, sharding_strategy=strategies.SHARD_GRAD_OP)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for _ in range(2):
            model(torch.full((2, 4), rank + 1.0)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        fsdp = side.FullyShardedDataParallel
        with fsdp.state_dict_type(model, side.StateDictType.FULL_STATE_DICT):
            weights, moments = model.state_dict(), fsdp.optim_state_dict(model, optimizer)
            states.append(weights)
            shapes = {name: moment.shape for name, moment in _moments(moments).items()}
            assert shapes == {name: weight.shape for name, weight in weights.items()}
            optimizer.load_state_dict(fsdp.optim_state_dict_to_load(model, optimizer, moments))
            model.load_state_dict(weights)
    assert_same(states)


def _taken_out_while_wrapping(rank: int) -> None:
    """``test_state_dict_skip_module``."""
    for side in SIDES:
        net = layers(3)
        kept, net[2] = net[2], nn.Identity()
        model = fsdp1(side, net)
        model.module[2] = kept
        kind = side.StateDictType.FULL_STATE_DICT
        with side.FullyShardedDataParallel.state_dict_type(model, kind):
            state = model.state_dict()
            assert list(state) == list(layers(3).state_dict())
            model.load_state_dict(state)


def test_fsdp1_states() -> None:
    run_checks(
        4,
        _whole_states_in_other_orders,
        _states_without_groups,
        _hung_on_the_wrapper,
        _compiled,
        _saved_by_torch_save,
        _states_of_some_ranks,
        _mixed_strategies,
        _taken_out_while_wrapping,
        _checkpointing_after_wrapping,
    )
