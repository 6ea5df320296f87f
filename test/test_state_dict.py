"""Sharded state dicts: nothing sent, nothing copied, and at home in copy, pickle, torch.save and torch's own helpers."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from models import NETS, Block, batch
from ranks import run_ranks
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from torch_hsdp_ckpt import FullyShardedDataParallel as FSDP
from torch_hsdp_ckpt import ShardedStateDictConfig, StateDictType


def _trained(kind: str, rank: int, shape: tuple[int, ...] = (2, 2), device: str = "cpu", steps: int = 2):
    net = NETS[kind]()
    mesh = init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    model = FSDP(net.to(device), device_mesh=mesh, auto_wrap_policy=ModuleWrapPolicy({Block}))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(steps):
        _step(model, optimizer, kind, step, rank, device)
    return model, optimizer


def _step(model, optimizer, kind: str, step: int, rank: int, device: str = "cpu") -> None:
    optimizer.zero_grad()
    model(batch(NETS[kind](), step, rank).to(device)).square().mean().backward()
    optimizer.step()


def _tensors(state, prefix: str = "") -> dict[str, torch.Tensor]:
    """All tensors in nested dicts by path; DTensors by their local tensors."""
    found = {}
    for key, value in state.items() if isinstance(state, dict) else enumerate(state):
        path = f"{prefix}/{key}"
        if isinstance(value, (dict, list)):
            found |= _tensors(value, path)
        elif isinstance(value, torch.Tensor):
            found[path] = value._local_tensor if isinstance(value, DTensor) else value
    return found


def _assert_same(a, b, where: str = "") -> None:
    a, b = _tensors(a), _tensors(b)
    assert a.keys() == b.keys(), where
    for key, value in a.items():
        assert torch.equal(value, b[key]), f"{key} {where}"


class _Collectives(TorchDispatchMode):
    """Names of the operators that move or copy bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if "c10d" in name or "copy" in name or "clone" in name or "cat" in name:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def _free(rank: int, device: str) -> None:
    for kind in NETS:
        model, optimizer = _trained(kind, rank, device=device)
        with _Collectives() as mode:
            # Proof that the mode sees what the wrapper's core sends.
            model(batch(NETS[kind](), 0, rank).to(device))
            assert any("c10d" in name for name in mode.seen)
            mode.seen.clear()
            state = model.state_dict()
            optim_state = FSDP.optim_state_dict(model, optimizer)
            assert mode.seen == []
        plain = NETS[kind]()
        assert list(state) == list(plain.state_dict())
        for name, p in model.named_parameters():
            assert state[name].placements == (Replicate(), Shard(0)), name
            assert state[name].shape == plain.get_parameter(name).shape, name
            assert state[name]._local_tensor.data_ptr() == p._local_tensor.data_ptr(), name
            assert optim_state["state"][name]["exp_avg"].placements == p.placements, name
        assert "calls" in state and "scratch" not in state


def test_state_dict_sends_and_copies_nothing() -> None:
    run_ranks(_free, 4, "cpu")


@pytest.mark.gpu
def test_state_dict_sends_and_copies_nothing_on_cuda() -> None:
    run_ranks(_free, 4, "cuda", backend="cpu:gloo,cuda:gloo")


def _copies(rank: int) -> None:
    for kind in NETS:
        model, optimizer = _trained(kind, rank)
        for state in (model.state_dict(), optimizer.state_dict(), FSDP.optim_state_dict(model, optimizer)):
            copied = copy.deepcopy(state)
            pickled = pickle.loads(pickle.dumps(state))
            _assert_same(copied, state)
            _assert_same(pickled, state)
            before = {key: value.clone() for key, value in _tensors(state).items()}
            _step(model, optimizer, kind, 7, rank)
            for key, value in _tensors(copied).items():
                assert torch.equal(value, before[key]), key
        for name, value in model.state_dict().items():
            if not isinstance(value, DTensor):
                continue
            local, file = value.to_local(), io.BytesIO()
            torch.save(local, file)
            # A record's own overhead is below 2 KiB: the bytes of any neighbour in the flat buffer would show.
            assert file.tell() < local.nbytes + 2048, name
            assert local.untyped_storage().nbytes() == local.nbytes and local.storage_offset() == 0, name
            file.seek(0)
            assert torch.equal(torch.load(file), local), name


def test_copies_pickles_and_files_of_one_shard() -> None:
    run_ranks(_copies, 4)


def _round_trips(rank: int) -> None:
    for kind in NETS:
        for shape in ((2, 2), (4,)):
            model, optimizer = _trained(kind, rank, shape)
            saved = copy.deepcopy({"model": model.state_dict(), "optim": FSDP.optim_state_dict(model, optimizer)})

            def restore_plainly(model=model, optimizer=optimizer, saved=saved):
                assert not any(model.load_state_dict(saved["model"]))
                FSDP.optim_state_dict_to_load(model, optimizer, copy.deepcopy(saved["optim"]), load_directly=True)

            def restore_by_assignment(model=model, optimizer=optimizer, saved=saved):
                model.load_state_dict(copy.deepcopy(saved["model"]), assign=True)
                optimizer.param_groups[0]["params"] = list(model.parameters())  # as torch's: the parameters are new ones
                optimizer.state.clear()
                FSDP.optim_state_dict_to_load(model, optimizer, copy.deepcopy(saved["optim"]), load_directly=True)

            def restore_with_torch(model=model, optimizer=optimizer, saved=saved):
                optim_state = copy.deepcopy(saved["optim"])  # an optimizer goes on with the tensors it is given
                set_state_dict(model, optimizer, model_state_dict=dict(saved["model"]), optim_state_dict=optim_state)

            def restore_around(model=model, optimizer=optimizer, saved=saved):
                outer = torch.nn.ModuleDict({"inner": model})
                outer.load_state_dict({f"inner.{key}": value for key, value in outer["inner"].state_dict().items()})
                outer.load_state_dict({f"inner.{key}": value for key, value in saved["model"].items()})
                FSDP.optim_state_dict_to_load(model, optimizer, copy.deepcopy(saved["optim"]), load_directly=True)

            after = None
            for restore in (restore_plainly, restore_with_torch, restore_around, restore_by_assignment, restore_plainly):
                _step(model, optimizer, kind, 3, rank)
                restore()
                _assert_same(model.state_dict(), saved["model"], restore.__name__)
                _assert_same(FSDP.optim_state_dict(model, optimizer), saved["optim"], restore.__name__)
                _step(model, optimizer, kind, 4, rank)
                now = copy.deepcopy(model.state_dict())
                if after is not None:
                    _assert_same(
                        {k: v for k, v in now.items() if k != "calls"}, {k: v for k, v in after.items() if k != "calls"}
                    )
                after = now
                for name, p in model.named_parameters():
                    assert p._local_tensor.storage_offset() == 0, name

            theirs_model, theirs_optim = get_state_dict(model, optimizer)
            _assert_same(theirs_model, model.state_dict())
            ours_optim = FSDP.optim_state_dict(model, optimizer)
            _assert_same(theirs_optim["state"], ours_optim["state"])
            assert [g["params"] for g in theirs_optim["param_groups"]] == [g["params"] for g in ours_optim["param_groups"]]
            whole, _ = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
            for name, p in model.named_parameters():
                assert torch.equal(whole[name], p.full_tensor()), name


def test_load_restores_bits_by_every_road() -> None:
    run_ranks(_round_trips, 4)


def _rejections(rank: int) -> None:
    model, optimizer = _trained("uneven", rank)
    other, _ = _trained("even", rank)
    line, _ = _trained("uneven", rank, (4,))
    state = copy.deepcopy(model.state_dict())
    key = "head.weight"

    def changed(**entries):
        return {**{k: copy.deepcopy(v) for k, v in state.items()}, **entries}

    without = changed()
    del without[key]
    ones = changed(**{k: torch.full_like(v, 9) for k, v in state.items()})
    wrong = [
        (without, f'Missing key: "{key}"'),
        ({**ones, "head.strange": torch.ones(1)}, 'Unexpected key: "head.strange"'),
        ({**ones, key: other.state_dict()[key]}, f'size mismatch for "{key}"'),
        ({**ones, key: torch.ones(3, 7)}, "plain tensor"),
        ({**ones, key: "text"}, "not a tensor"),
        ({**ones, key: line.state_dict()[key]}, "torch.distributed.checkpoint"),
    ]
    for bad, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(bad)
        _assert_same(model.state_dict(), state)
    partial = model.load_state_dict(without, strict=False)
    assert partial.missing_keys == [key] and partial.unexpected_keys == []

    optim_state = FSDP.optim_state_dict(model, optimizer)
    optim_state["state"]["nobody"] = optim_state["state"].pop(key)
    with pytest.raises(ValueError, match="nobody"):
        FSDP.optim_state_dict_to_load(model, optimizer, optim_state)
    stranger = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(ValueError, match="not the model's"):
        FSDP.optim_state_dict(model, stranger)

    assert FSDP.get_state_dict_type(model).state_dict_type is StateDictType.SHARDED_STATE_DICT
    with pytest.raises(ValueError, match="full_state_dict=True"):
        FSDP.set_state_dict_type(model, StateDictType.FULL_STATE_DICT)
    config = ShardedStateDictConfig(offload_to_cpu=True)
    with FSDP.state_dict_type(model, StateDictType.SHARDED_STATE_DICT, config):
        assert FSDP.get_state_dict_type(model.module.blocks[0]).state_dict_config is config
    assert not FSDP.get_state_dict_type(model).state_dict_config.offload_to_cpu
    with pytest.raises(ValueError, match="holds no"):
        FSDP.get_state_dict_type(torch.nn.Linear(1, 1))
    dist.barrier()


def test_what_does_not_fit_changes_nothing() -> None:
    run_ranks(_rejections, 4)


def _hooks(rank: int) -> None:
    model, _ = _trained("even", rank)
    called: list[str] = []
    model.register_state_dict_pre_hook(lambda *args: called.append("outer pre"))
    model.register_state_dict_post_hook(lambda m, state, prefix, meta: called.append("outer post"))
    model.module.blocks[0].module.register_state_dict_post_hook(lambda m, s, prefix, meta: called.append(prefix))
    state = model.state_dict()
    assert called == ["outer pre", "blocks.0.", "outer post"]
    assert all("_checkpoint" not in key for key in [*state, *state._metadata])
    assert all("_checkpoint" not in name for name, _ in [*model.named_parameters(), *model.named_buffers()])
    with pytest.raises(TypeError, match="keyword"):
        model.state_dict({})


def test_hooks_and_names() -> None:
    run_ranks(_hooks, 4)
