"""FULL_STATE_DICT: what torch's FSDP1 returns and takes, a tensor at a time."""

import copy
import io
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from device import DEVICE
from models import NETS, Block, Net
from ranks import process_memory, run_ranks
from states import assert_same, bits, mesh_of, step, tensors, trained, wrapped
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as TorchFSDP
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

from torch_hsdp_ckpt import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    LocalStateDictConfig,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
)
from torch_hsdp_ckpt import FullyShardedDataParallel as FSDP

FULL = StateDictType.FULL_STATE_DICT
# FSDP1 of torch 2.11 reads freed memory where it offloads from the CPU on one rank. (torch compares
# versions, not strings.)
OFFLOADS = torch.__version__ >= "2.12"


def _as_torchs(rank: int) -> None:
    """Keys, values and who has them, beside torch's own on a model with buffers, an ignored
    parameter and shared weights."""
    for kind in NETS:
        nets = [NETS[kind]() for _ in range(2)]
        for net in nets:
            torch.manual_seed(7)
            net.free = nn.Parameter(torch.arange(3.0))
            net.tied = nn.Linear(net.head.in_features, net.head.out_features)
            net.tied.weight = net.head.weight
        ours = wrapped(nets[0], mesh_of(4), ignored_states=[nets[0].free])
        policy, device = ModuleWrapPolicy({Block}), torch.device(DEVICE)
        theirs = TorchFSDP(
            nets[1],
            auto_wrap_policy=policy,
            device_id=device,
            use_orig_params=True,
            ignored_states=[nets[1].free],
        )
        for first_only in (False, True):
            config = FullStateDictConfig(
                rank0_only=first_only, offload_to_cpu=first_only and OFFLOADS
            )
            with FSDP.state_dict_type(ours, FULL, config):
                state = ours.state_dict()
            with TorchFSDP.state_dict_type(theirs, FULL, config):
                expected = theirs.state_dict()
            assert_same(state, expected, kind)
            assert not any(isinstance(value, DTensor) for value in state.values())
        assert list(state) == (list(nets[0].state_dict()) if rank == 0 else ["free"])
        if rank == 0:
            assert state["tied.weight"].data_ptr() == state["head.weight"].data_ptr()


def _whole_and_back(rank: int) -> None:
    for kind in NETS:
        for shape in ((2, 2), (1, 4), (4, 1), (4,)):
            model, optimizer = trained(kind, rank, shape)
            before = bits(model.state_dict())
            with FSDP.state_dict_type(model, FULL):
                state = model.state_dict()
                for name, p in model.named_parameters():
                    assert type(state[name]) is torch.Tensor and torch.equal(
                        state[name], p.full_tensor()
                    ), name
                    file = io.BytesIO()
                    torch.save(state[name], file)
                    assert file.tell() < state[name].nbytes + 2048, (
                        name
                    )  # nobody's padding is in it
                # What is in it stays as it was when the model goes on; and a plain module takes it.
                kept = copy.deepcopy(state)
                step(model, optimizer, kind, 5, rank)
                assert_same(
                    {k: v for k, v in state.items() if k != "calls"},
                    {k: v for k, v in kept.items() if k != "calls"},
                )
                plain = NETS[kind](seed=3)
                plain.load_state_dict(kept)
                assert model.load_state_dict(kept) == ([], [])
                assert_same(model.state_dict(), kept)
            assert_same(model.state_dict(), before)
            # Into another mesh and by assignment, and from within a module that is not wrapped.
            other = wrapped(NETS[kind](seed=4), mesh_of(*reversed(shape)))
            with FSDP.state_dict_type(other, FULL):
                other.load_state_dict(copy.deepcopy(kept), assign=True)
                assert_same(other.state_dict(), kept)
                outer = nn.ModuleDict({"inner": other})
                outer.load_state_dict({f"inner.{key}": value + 1 for key, value in kept.items()})
                assert_same(
                    outer.state_dict(), {f"inner.{key}": value + 1 for key, value in kept.items()}
                )
            assert all(
                isinstance(p, DTensor) and p._local_tensor.storage_offset() == 0
                for p in other.parameters()
            )
            # Half the precision is an error, unless strict is off.
            half = {
                key: value.double() if value.is_floating_point() else value
                for key, value in kept.items()
            }
            with FSDP.state_dict_type(model, FULL):
                with pytest.raises(RuntimeError, match=r'"head\.bias" is torch\.float64'):
                    model.load_state_dict(half)
                model.load_state_dict(half, strict=False)
                assert_same(model.state_dict(), kept)


def _settings(rank: int) -> None:
    model, optimizer = trained("uneven", rank)
    assert FSDP.get_state_dict_type(model).state_dict_type is StateDictType.SHARDED_STATE_DICT
    config, optim_config = (
        FullStateDictConfig(rank0_only=True),
        FullOptimStateDictConfig(rank0_only=True),
    )
    before = FSDP.set_state_dict_type(model, FULL, config, optim_config)
    assert before.state_dict_type is StateDictType.SHARDED_STATE_DICT
    for module in (model, model.module.blocks[0]):
        now = FSDP.get_state_dict_type(module)
        assert (now.state_dict_type, now.state_dict_config, now.optim_state_dict_config) == (
            FULL,
            config,
            optim_config,
        )
    assert bool(model.state_dict()) == bool(FSDP.optim_state_dict(model, optimizer)) == (rank == 0)
    sharded = StateDictType.SHARDED_STATE_DICT
    with (
        pytest.raises(ZeroDivisionError),
        FSDP.state_dict_type(model, sharded, ShardedStateDictConfig(offload_to_cpu=True)),
    ):
        assert len(model.state_dict()) > 10
        raise ZeroDivisionError
    assert FSDP.get_state_dict_type(model).state_dict_type is FULL
    with pytest.raises(RuntimeError, match="takes a FullStateDictConfig"):
        FSDP.set_state_dict_type(model, FULL, ShardedStateDictConfig())
    with pytest.raises(RuntimeError, match="takes a FullOptimStateDictConfig"):
        FSDP.set_state_dict_type(model, FULL, None, ShardedOptimStateDictConfig())
    local = StateDictType.LOCAL_STATE_DICT
    with (
        pytest.warns(UserWarning, match="LOCAL_STATE_DICT is the SHARDED_STATE_DICT here"),
        FSDP.state_dict_type(model, local, LocalStateDictConfig(offload_to_cpu=True)),
    ):
        assert FSDP.get_state_dict_type(model).state_dict_type is local
        state = model.state_dict()
        assert all(isinstance(state[name], DTensor) for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match="holds no"):
        FSDP.get_state_dict_type(nn.Linear(1, 1))
    # As in torch, rank0_only is for saving: to load, every rank needs the values, and is told so.
    with pytest.raises(RuntimeError, match="broadcast_from_rank0") as error:
        model.load_state_dict(model.state_dict())
    assert 'Missing key: "head.weight"' in str(error.value)


def _bounded(rank: int) -> None:
    """What a rank holds on top of its shards and the result: one tensor, whatever the model's
    size."""
    largest = 512 * 2048 * 4
    model = wrapped(Net(512, 2048, 5, blocks=6), mesh_of(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(1, 512)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    whole = sum(p.numel() * 4 for p in model.parameters())
    assert whole > 10 * largest
    config, optim_config = FullStateDictConfig(True, True), FullOptimStateDictConfig(True, True)
    with FSDP.state_dict_type(model, FULL, config, optim_config):
        for call in (model.state_dict, lambda: FSDP.optim_state_dict(model, optimizer)):
            dist.barrier()
            Path("/proc/self/clear_refs").write_text("5")
            resting = process_memory("VmRSS")
            state = call()
            extra = process_memory("VmHWM") - resting
            held = sum(t.nbytes for t in tensors(state).values())
            assert held == (0 if rank else held) and extra < held + 2 * largest, (
                rank,
                extra / 2**20,
                held / 2**20,
            )
            del state


@pytest.mark.parametrize(
    "part", [_as_torchs, _whole_and_back, _settings, _bounded], ids=lambda part: part.__name__[1:]
)
def test_full_state_dict(part) -> None:
    run_ranks(part, 4)
