"""Sharded state dicts: nothing sent, nothing copied, and at home in copy, pickle, torch.save and
torch's own helpers."""

import copy
import io
import itertools
import pickle
import warnings

import pytest
import torch
from device import DEVICE
from models import NETS, batch
from ranks import run_ranks
from states import Moves, assert_same, bits, fully_sharded, mesh_of, step, tensors, trained, wrapped
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel as TorchFSDP
from torch.distributed.fsdp import MixedPrecision
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard

from torch_hsdp_ckpt import FSDPModule, StateDictType
from torch_hsdp_ckpt import FullyShardedDataParallel as FSDP


def _free(rank: int, device: str) -> None:
    for kind, wrap in itertools.product(NETS, (wrapped, fully_sharded)):
        model, optimizer = trained(kind, rank, device=device, wrap=wrap)
        with Moves() as mode:
            # Proof that the mode sees what the wrapper's core sends.
            model(batch(NETS[kind](), 0, rank).to(device))
            assert any("c10d" in name for name in mode.seen)
            mode.seen.clear()
            state = model.state_dict()
            optim_state = FSDP.optim_state_dict(model, optimizer)
            assert mode.seen == []
        if isinstance(model, FSDPModule):
            model.reshard()  # it shows what forward has kept for backward
        plain = NETS[kind]()
        assert list(state) == list(plain.state_dict())
        for name, p in model.named_parameters():
            assert state[name].placements == (Replicate(), Shard(0)), name
            assert state[name].shape == plain.get_parameter(name).shape, name
            assert state[name]._local_tensor.data_ptr() == p._local_tensor.data_ptr(), name
            exp_avg = optim_state["state"][name]["exp_avg"]
            assert exp_avg.placements == p.placements, name
            assert (
                exp_avg._local_tensor.data_ptr()
                == optimizer.state[p]["exp_avg"]._local_tensor.data_ptr()
            ), name
        assert "calls" in state and "scratch" not in state

        other = copy.deepcopy(state)
        loadable = FSDP.optim_state_dict_to_load(model, optimizer, copy.deepcopy(optim_state))
        for value in tensors(other).values():
            value.add_(1)
        with Moves() as mode:
            model.load_state_dict(other)
            agreed = 8 if device == "cuda" else 0  # the number on which the ranks agree
            assert mode.bytes == agreed + sum(value.nbytes for value in tensors(other).values())
            # The ranks agree that it fits; nothing else is sent.
            assert (
                all(name == "c10d.allreduce_.default" for name in mode.sent())
                and len(mode.sent()) == 1
            )
            mode.seen.clear()
            optimizer.load_state_dict(loadable)
            assert mode.seen == []
        assert_same(model.state_dict(), other)


def test_state_dict_sends_and_copies_nothing() -> None:
    run_ranks(_free, 4, DEVICE)


@pytest.mark.gpu
def test_state_dict_sends_and_copies_nothing_on_cuda() -> None:
    run_ranks(_free, 4, "cuda", backend="cpu:gloo,cuda:gloo")


def _copies(rank: int) -> None:
    for kind in NETS:
        model, optimizer = trained(kind, rank)
        for state in (
            model.state_dict(),
            optimizer.state_dict(),
            FSDP.optim_state_dict(model, optimizer),
        ):
            copied = copy.deepcopy(state)
            pickled = pickle.loads(pickle.dumps(state))
            assert_same(copied, state)
            assert_same(pickled, state)
            before = {key: value.clone() for key, value in tensors(state).items()}
            step(model, optimizer, kind, 7, rank)
            for key, value in tensors(copied).items():
                assert torch.equal(value, before[key]), key
        for name, value in model.state_dict().items():
            if not isinstance(value, DTensor):
                continue
            local, file = value.to_local(), io.BytesIO()
            torch.save(local, file)
            # A record's own overhead is below 2 KiB: the bytes of any neighbour in the flat buffer
            # would show.
            assert file.tell() < local.nbytes + 2048, name
            assert (
                local.untyped_storage().nbytes() == local.nbytes and local.storage_offset() == 0
            ), name
            file.seek(0)
            assert torch.equal(torch.load(file), local), name


def test_copies_pickles_and_files_of_one_shard() -> None:
    run_ranks(_copies, 4)


def _round_trips(rank: int) -> None:
    for kind in NETS:
        for shape in ((2, 2), (4,)):
            model, optimizer = trained(kind, rank, shape)
            saved = copy.deepcopy(
                {"model": model.state_dict(), "optim": FSDP.optim_state_dict(model, optimizer)}
            )

            def restore_plainly(model=model, optimizer=optimizer, saved=saved):
                assert not any(model.load_state_dict(saved["model"]))
                FSDP.optim_state_dict_to_load(
                    model, optimizer, copy.deepcopy(saved["optim"]), load_directly=True
                )

            def restore_by_assignment(model=model, optimizer=optimizer, saved=saved):
                model.load_state_dict(copy.deepcopy(saved["model"]), assign=True)
                optimizer.param_groups[0]["params"] = list(
                    model.parameters()
                )  # as torch's: the parameters are new ones
                optimizer.state.clear()
                FSDP.optim_state_dict_to_load(
                    model, optimizer, copy.deepcopy(saved["optim"]), load_directly=True
                )

            def restore_with_torch(model=model, optimizer=optimizer, saved=saved):
                optim_state = copy.deepcopy(
                    saved["optim"]
                )  # an optimizer goes on with the tensors it is given
                set_state_dict(
                    model,
                    optimizer,
                    model_state_dict=dict(saved["model"]),
                    optim_state_dict=optim_state,
                )

            def restore_around(model=model, optimizer=optimizer, saved=saved):
                outer = torch.nn.ModuleDict({"inner": model})
                outer.load_state_dict(
                    {f"inner.{key}": value for key, value in outer["inner"].state_dict().items()}
                )
                outer.load_state_dict(
                    {f"inner.{key}": value for key, value in saved["model"].items()}
                )
                FSDP.optim_state_dict_to_load(
                    model, optimizer, copy.deepcopy(saved["optim"]), load_directly=True
                )

            after = None
            for restore in (
                restore_plainly,
                restore_with_torch,
                restore_around,
                restore_by_assignment,
                restore_plainly,
            ):
                step(model, optimizer, kind, 3, rank)
                restore()
                assert_same(model.state_dict(), saved["model"], restore.__name__)
                assert_same(
                    FSDP.optim_state_dict(model, optimizer), saved["optim"], restore.__name__
                )
                step(model, optimizer, kind, 4, rank)
                now = copy.deepcopy(model.state_dict())
                if after is not None:
                    assert_same(
                        {k: v for k, v in now.items() if k != "calls"},
                        {k: v for k, v in after.items() if k != "calls"},
                    )
                after = now
                for name, p in model.named_parameters():
                    assert p._local_tensor.storage_offset() == 0, name

            theirs_model, theirs_optim = get_state_dict(model, optimizer)
            assert_same(theirs_model, model.state_dict())
            ours_optim = FSDP.optim_state_dict(model, optimizer)
            assert_same(theirs_optim["state"], ours_optim["state"])
            assert [g["params"] for g in theirs_optim["param_groups"]] == [
                g["params"] for g in ours_optim["param_groups"]
            ]
            whole, _ = get_state_dict(
                model, optimizer, options=StateDictOptions(full_state_dict=True)
            )
            for name, p in model.named_parameters():
                assert torch.equal(whole[name], p.full_tensor()), name


def test_load_restores_bits_by_every_road() -> None:
    run_ranks(_round_trips, 4)


def _drop_bias(module, state, prefix, metadata) -> None:
    del state[prefix + "bias"]


class _Odd(nn.Module):
    """All that a state dict may hold beside parameters: kinds of buffers, extra state, hooks, a
    parameter in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 5)
        self.last.weight = self.first.weight
        self.kept = nn.Parameter(torch.arange(3.0))
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.version = 1
        self.first.register_state_dict_post_hook(_drop_bias)

    def get_extra_state(self) -> dict[str, int]:
        return {"version": self.version}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.version = state["version"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x)))


def _odd(rank: int) -> None:
    net = _Odd()
    plain = copy.deepcopy(net)
    model = FSDP(net, device_mesh=mesh_of(2, 2), ignored_states=[net.kept])
    model(torch.randn(4, 5)).sum().backward()
    state = model.state_dict()
    expected = plain.state_dict()
    assert list(state) == list(expected) and "first.bias" not in state
    assert state._metadata == expected._metadata
    assert (
        state["first.weight"]._local_tensor.data_ptr()
        == state["last.weight"]._local_tensor.data_ptr()
    )
    assert type(state["kept"]) is torch.Tensor and state["kept"].data_ptr() == net.kept.data_ptr()
    assert state["norm.running_mean"].data_ptr() == net.norm.running_mean.data_ptr()
    assert all(
        isinstance(value, nn.Parameter)
        for key, value in model.state_dict(keep_vars=True).items()
        if "weight" in key
    )

    saved = copy.deepcopy(state)
    for value in tensors(state).values():
        value.zero_()
    net.version = 7
    assert model.load_state_dict(saved, strict=False).missing_keys == ["first.bias"]
    assert_same(model.state_dict(), saved)
    assert net.version == 1


def test_buffers_extra_state_and_what_is_not_sharded() -> None:
    run_ranks(_odd, 4)


def _checkpointed(rank: int) -> None:
    """Activation checkpointing's wrapper, inside a unit and around one."""
    net = NETS["even"]()
    net.blocks[0] = checkpoint_wrapper(net.blocks[0])
    model = wrapped(net, mesh_of(2, 2))
    model.module.blocks[1] = checkpoint_wrapper(model.module.blocks[1])
    model(batch(NETS["even"](), 0, rank)).sum().backward()
    state = copy.deepcopy(model.state_dict())
    assert list(state) == list(NETS["even"]().state_dict())
    doubled = {key: value * 2 for key, value in state.items()}
    assert not any(model.load_state_dict(doubled))
    assert_same(model.state_dict(), doubled)
    with pytest.raises(RuntimeError, match=r'Unexpected key: "blocks\.0\.nothing"'):
        model.load_state_dict({**state, "blocks.0.nothing": torch.ones(1)})


def test_activation_checkpointing_leaves_no_name() -> None:
    run_ranks(_checkpointed, 4)


# As with torch's wrappers, load hooks below one hear the names that are there while loading.
INSIDE = "_checkpoint_wrapped_module.blocks.0._checkpoint_wrapped_module."


def _hooks(rank: int) -> None:
    model, _ = trained("even", rank)
    called: list[str] = []
    model.register_state_dict_pre_hook(lambda *args: called.append("outer pre"))
    model.register_state_dict_post_hook(lambda m, state, prefix, meta: called.append("outer post"))
    model.module.blocks[0].module.register_state_dict_post_hook(
        lambda m, s, prefix, meta: called.append(prefix)
    )
    state = model.state_dict()
    assert called == ["outer pre", "blocks.0.", "outer post"]
    assert all("_checkpoint" not in key for key in [*state, *state._metadata])
    assert all(
        "_checkpoint" not in name for name, _ in [*model.named_parameters(), *model.named_buffers()]
    )
    with pytest.raises(TypeError, match="keyword"):
        model.state_dict({})

    # Hooks on loading: one that forgives a key, one that knows an older name.
    called.clear()
    block = model.module.blocks[0].module

    def old_name(module, state, prefix, *rest):
        called.append(prefix)
        if prefix + "up.old" in state:
            state[prefix + "up.weight"] = state.pop(prefix + "up.old")

    block.register_load_state_dict_pre_hook(old_name)
    block.register_load_state_dict_post_hook(
        lambda module, keys: keys.missing_keys.remove(INSIDE + "norm.bias")
    )
    older = copy.deepcopy(state)
    older["blocks.0.up.old"] = older.pop("blocks.0.up.weight")
    del older["blocks.0.norm.bias"]
    for value in tensors(older).values():
        value.add_(1)
    assert model.load_state_dict(older) == ([], [])
    assert called == [INSIDE]
    now = model.state_dict()
    assert torch.equal(
        now["blocks.0.up.weight"]._local_tensor, older["blocks.0.up.old"]._local_tensor
    )
    before = bits(now)
    del older["head.bias"]
    with pytest.raises(RuntimeError, match=r"head\.bias"):
        model.load_state_dict(older)
    assert_same(model.state_dict(), before)  # also what the failed loading had copied is back
    whole = {
        key: value.full_tensor() if isinstance(value, DTensor) else value
        for key, value in state.items()
    }
    whole["blocks.0.up.old"] = whole.pop("blocks.0.up.weight")
    del whole["blocks.0.norm.bias"]
    with FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT):
        model.load_state_dict(whole)
    assert torch.equal(
        model.state_dict()["blocks.0.up.weight"].full_tensor(), whole["blocks.0.up.old"]
    )


def test_hooks_and_names() -> None:
    run_ranks(_hooks, 4)


class _Buffered(nn.Module):
    """Buffers of several dtypes: persistent and not, on the way in and in a module that gets
    ignored."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.inner.register_buffer("scale", torch.rand(4))
        self.inner.register_buffer("offset", torch.rand(4).double())
        self.inner.register_buffer("count", torch.arange(3))
        self.inner.register_buffer("scratch", torch.rand(2), persistent=False)
        self.aside = nn.Identity()
        self.aside.register_buffer("table", torch.rand(2))
        self.register_buffer("small", torch.rand(3).half())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.aside(x)) * self.inner.scale


def _cast_buffers(rank: int) -> None:
    """Beside torch's FSDP1: what is live is in ``buffer_dtype``, what is in state dicts in the
    dtype that it was made in."""
    low = MixedPrecision(param_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16)
    policy = ModuleWrapPolicy({nn.Linear})
    models: list[nn.Module] = []
    for kind, device in ((FSDP, None), (TorchFSDP, torch.device(DEVICE))):
        torch.manual_seed(3)
        net = _Buffered()
        options = {
            "auto_wrap_policy": policy,
            "ignored_modules": [net.aside],
            "device_id": device,
            "use_orig_params": True,
        }
        models.append(kind(net, mixed_precision=low, **options))
        with torch.no_grad():
            models[-1](torch.ones(2, 4))
    ours, theirs = models
    live = {name: buffer.dtype for name, buffer in ours.named_buffers()}
    assert live == {
        name.replace("_fsdp_wrapped_module.", ""): buffer.dtype
        for name, buffer in theirs.named_buffers()
    }
    assert live["inner.scale"] == live["inner.offset"] == live["small"] == torch.bfloat16
    with FSDP.state_dict_type(ours, StateDictType.FULL_STATE_DICT), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        with TorchFSDP.state_dict_type(theirs, StateDictType.FULL_STATE_DICT):
            assert_same(ours.state_dict(), theirs.state_dict())
    state = ours.state_dict()
    dtypes = {
        name: buffer.dtype for name, buffer in _Buffered().named_buffers() if "scratch" not in name
    }
    assert {name: state[name].dtype for name in dtypes} == dtypes
    kept = ours.state_dict(keep_vars=True)
    assert kept["inner.scale"] is ours.module.inner.module.scale

    # Back: by copying, from what is live, under a load hook, by assignment; the live ones keep
    # their dtype.
    saved = {name: value + 1 for name, value in state.items()}
    for road in ("copy", "as it is live", "hook", "assign"):
        given = dict(saved)
        if road == "as it is live":
            given["inner.scale"] = given["inner.scale"].bfloat16()
        if road == "hook":
            ours.module.aside.register_load_state_dict_pre_hook(lambda *args: None)
        for value in tensors(ours.state_dict()).values():
            value.zero_()
        assert ours.load_state_dict(copy.deepcopy(given), assign=road == "assign") == ([], []), road
        assert {name: buffer.dtype for name, buffer in ours.named_buffers()} == live, road
        for name, dtype in dtypes.items():
            expected = saved[name].to(live[name]).to(dtype)
            assert torch.equal(ours.state_dict()[name], expected), (road, name)
    with pytest.raises(RuntimeError, match=r'"inner\.scale" is torch\.float16'):
        ours.load_state_dict({**saved, "inner.scale": saved["inner.scale"].half()})
    ours.double()  # what the user converts later is saved as it is
    assert ours.state_dict()["inner.scale"].dtype == torch.float64


def test_buffers_are_saved_in_the_dtype_that_they_were_made_in() -> None:
    run_ranks(_cast_buffers, 4)
