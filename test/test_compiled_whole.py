"""What ``torch.compile`` makes of a wrapped model, and wrapped models of compiled parts: they
train, and all that is asked of a model can be asked of them."""

import copy
from pathlib import Path

import torch
from models import NETS, Block, batch
from ranks import run_checks, run_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from training import assert_close, full, grads, loss_of, mean_grads, mesh_of, wrap

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt import FullyShardedDataParallel as FSDP
from torch_hsdp_ckpt import fully_shard


def _sharded(net: nn.Module) -> nn.Module:
    for block in net.blocks:
        fully_shard(block, mesh=mesh_of((2,)))
    return fully_shard(net, mesh=mesh_of((2,)))


FACES = {"fsdp": lambda net: wrap(net, (2,)), "fully_shard": _sharded}


def _compiled(face: str, seed: int = 0) -> nn.Module:
    return torch.compile(FACES[face](NETS["even"](seed)), backend="eager")


def _trained(model: nn.Module, rank: int) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loss_of(model, batch(NETS["even"](), 0, rank)).backward()
    optimizer.step()
    return optimizer


def _values(model: nn.Module) -> list[torch.Tensor]:
    return [full(p) for p in model.parameters()]


def _asked_for_states(rank: int, root: str) -> None:
    for face in FACES:
        model, other = _compiled(face), _compiled(face, seed=5)
        optimizer, resumed = _trained(model, rank), _trained(other, rank)
        state = FSDP.optim_state_dict(model, optimizer)
        resumed.load_state_dict(FSDP.optim_state_dict_to_load(other, resumed, state))
        other.load_state_dict(model.state_dict())
        assert all(map(torch.equal, _values(other), _values(model)))
        for p, q in zip(other.parameters(), model.parameters(), strict=True):
            moments = (resumed.state[p]["exp_avg"], optimizer.state[q]["exp_avg"])
            assert torch.equal(*map(full, moments))

        other = _compiled(face, seed=6)
        resumed = _trained(other, rank)
        of_model, of_optimizer = get_state_dict(model, optimizer)
        assert not any("_orig_mod" in name for name in of_model)
        h.save({"m": of_model, "o": of_optimizer}, checkpoint_id=f"{root}/{face}")
        of_other, of_resumed = get_state_dict(other, resumed)
        h.load({"m": of_other, "o": of_resumed}, checkpoint_id=f"{root}/{face}")
        set_state_dict(other, resumed, model_state_dict=of_other, optim_state_dict=of_resumed)
        assert all(map(torch.equal, _values(other), _values(model)))
        other.zero_grad()
        other.eval().train()
        other.apply(lambda module: None)
        if face == "fsdp":
            other.clip_grad_norm_(1.0)
            with other.no_sync():
                pass
            with FSDP.summon_full_params(other):
                assert [tuple(p.shape) for p in other.parameters()][:1] == [(8,)]


def test_a_compiled_model_is_asked_for_its_states(tmp_path: Path) -> None:
    run_ranks(_asked_for_states, 2, str(tmp_path))


def _compiled_parts(rank: int) -> None:
    """Blocks that are compiled modules become units, by a policy that names the block's class."""
    net = NETS["even"]()
    expected = mean_grads(net, lambda n, r: loss_of(n, batch(net, 0, r)))
    for face in FACES:
        parts = copy.deepcopy(net)
        parts.blocks = nn.ModuleList(
            torch.compile(block, backend="eager") for block in parts.blocks
        )
        if face == "fsdp":
            policy = ModuleWrapPolicy({Block})
            model = FSDP(parts, device_mesh=mesh_of((2,)), auto_wrap_policy=policy)
            assert len(FSDP.fsdp_modules(model)) == 3
        else:
            model = _sharded(parts)
        for _ in range(2):
            model.zero_grad()
            loss_of(model, batch(net, 0, rank)).backward()
            found = {name.replace("_orig_mod.", ""): grad for name, grad in grads(model).items()}
            assert_close(found, expected)


def test_compiled_parts() -> None:
    run_checks(2, _compiled_parts)
