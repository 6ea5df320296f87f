"""Every saver x every loader: what one way of training has saved, any other goes on from.

Savers and loaders are ours and torch's wrappers on several meshes, DDP and one plain process; an
even and an uneven model, Adam state after three steps, through our storage and through stock
storage. Every tensor loaded is the one saved, and three more steps give the losses of the run that
never stopped."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from device import DEVICE
from models import NETS, Block, Net, batch
from ranks import run_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as TorchFSDP
from torch.distributed.fsdp import ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parallel import DistributedDataParallel

import torch_hsdp_ckpt as hsdp

STEPS = 3
GLOBAL_ROWS = 8  # rows of the whole batch, whatever the number of ranks


def _mesh(*shape: int) -> DeviceMesh:
    return init_device_mesh(DEVICE, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def _ours(*shape: int) -> Callable[[Net], nn.Module]:
    strategy = ShardingStrategy.HYBRID_SHARD if len(shape) == 2 else ShardingStrategy.FULL_SHARD
    policy = ModuleWrapPolicy({Block})
    return lambda net: hsdp.FullyShardedDataParallel(
        net, device_mesh=_mesh(*shape), sharding_strategy=strategy, auto_wrap_policy=policy
    )


def _fsdp1(strategy: ShardingStrategy, *shape: int) -> Callable[[Net], nn.Module]:
    return lambda net: TorchFSDP(
        net,
        device_mesh=_mesh(*shape),
        sharding_strategy=strategy,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        device_id=torch.device(DEVICE),
        use_orig_params=True,
    )


def _fsdp2(*shape: int) -> Callable[[Net], nn.Module]:
    def wrap(net: Net) -> nn.Module:
        mesh = _mesh(*shape)
        for block in net.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(net, mesh=mesh)

    return wrap


# name -> (ranks, wrapper)
SYSTEMS: dict[str, tuple[int, Callable[[Net], nn.Module]]] = {
    "ours-2x2": (4, _ours(2, 2)),
    "ours-1x4": (4, _ours(1, 4)),
    "ours-4x1": (4, _ours(4, 1)),
    "ours-1d": (4, _ours(4)),
    "ours-2-ranks": (2, _ours(2)),
    "fsdp1-hybrid": (4, _fsdp1(ShardingStrategy.HYBRID_SHARD, 2, 2)),
    "fsdp1-full": (4, _fsdp1(ShardingStrategy.FULL_SHARD, 4)),
    "fsdp2-2d": (4, _fsdp2(2, 2)),
    "fsdp2-1d": (4, _fsdp2(4)),
    "ddp": (4, DistributedDataParallel),
    "plain": (1, lambda net: net),
}
STORAGE = {
    "ours": (hsdp.FileSystemWriter, hsdp.FileSystemReader),
    "stock": (dcp.FileSystemWriter, dcp.FileSystemReader),
}


def _train(model: nn.Module, net: Net, optimizer: torch.optim.Optimizer, first: int) -> list[float]:
    """``STEPS`` steps from step ``first`` on the same global batches; the global losses."""
    ranks, losses = dist.get_world_size(), list[torch.Tensor]()
    for step in range(first, first + STEPS):
        rows = batch(net, step, 0, GLOBAL_ROWS).chunk(ranks)[dist.get_rank()]
        optimizer.zero_grad()
        loss = model(rows).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    summed = torch.stack(losses)
    dist.all_reduce(summed)
    return (summed / ranks).tolist()


class _Part(NamedTuple):
    """What one rank holds of a tensor, and where in the whole it lies."""

    shape: tuple[int, ...]
    place: tuple[slice, ...]
    values: torch.Tensor


def _parts(state: dict[str, Any], prefix: str = "") -> dict[str, _Part]:
    """This rank's part of every tensor of a nested state dict, by its path; nothing is sent."""
    out = {}
    for key, value in state.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            out.update(_parts(value, f"{name}/"))
        elif isinstance(value, DTensor):
            extent, start = compute_local_shape_and_global_offset(
                value.shape, value.device_mesh, value.placements
            )
            place = tuple(
                slice(first, first + rows) for first, rows in zip(start, extent, strict=True)
            )
            out[name] = _Part(tuple(value.shape), place, _kept(value.to_local()))
        elif isinstance(value, torch.Tensor):
            # FSDP1 hands out ShardedTensors on one-dimensional process groups, DTensors with a
            # mesh; here only the latter.
            out[name] = _Part(tuple(value.shape), (), _kept(value))
    return out


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU, where the ranks' process and this one can compare."""
    return tensor.detach().to("cpu", copy=True)


def _whole(ranks: list[dict[str, _Part]]) -> dict[str, torch.Tensor]:
    """The tensors whose parts the ranks hold; nothing of any of them is lacking."""
    out = {}
    for name, first in ranks[0].items():
        out[name] = torch.full(first.shape, -1, dtype=first.values.dtype)
        held = torch.zeros(first.shape, dtype=torch.bool)
        for part in (rank[name] for rank in ranks):
            out[name][part.place] = part.values
            held[part.place] = True
        assert held.all(), name
    return out


def _build(name: str, kind: str, seed: int) -> tuple[Net, nn.Module, torch.optim.Optimizer]:
    net = NETS[kind](seed)
    model = SYSTEMS[name][1](net)
    options = (
        {"lr": 0.05, "weight_decay": 0.01} if seed == 0 else {"lr": 0.5}
    )  # a loader's come from the checkpoint
    return net, model, torch.optim.Adam(model.parameters(), **options)


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))


def _save(rank: int, root: str, names: list[str]) -> dict[str, Any]:
    """Trains and saves every system of this world size; what was saved (this rank's part) and the
    losses of going on."""
    out = {}
    for name in names:
        for kind in NETS:
            net, model, optimizer = _build(name, kind, seed=0)
            _train(model, net, optimizer, 0)
            state = _state(model, optimizer)
            for storage, (writer, _) in STORAGE.items():
                (hsdp.save if storage == "ours" else dcp.save)(
                    state, storage_writer=writer(f"{root}/{name}-{kind}-{storage}")
                )
            parts = _parts(state)
            out[f"{name}-{kind}"] = (parts, _train(model, net, optimizer, STEPS))
    return out


def _load(rank: int, root: str, name: str, saved: dict[str, Any]) -> list[str]:
    """Loads every checkpoint into ``name``, one over the other; what differs from what was
    saved."""
    wrong = []
    for kind in NETS:
        net, model, optimizer = _build(name, kind, seed=1)
        state = _state(model, optimizer)
        for saver in SYSTEMS:
            whole, losses = saved[f"{saver}-{kind}"]
            for storage, (_, reader) in STORAGE.items():
                where = f"{saver} -> {name}, {kind}, {storage} storage"
                (hsdp.load if storage == "ours" else dcp.load)(
                    state, storage_reader=reader(f"{root}/{saver}-{kind}-{storage}")
                )
                set_state_dict(
                    model,
                    optimizer,
                    model_state_dict=state["model"],
                    optim_state_dict=state["optim"],
                    options=StateDictOptions(strict=True),
                )
                state = _state(
                    model, optimizer
                )  # as the next one's targets it has the values of after the steps below
                parts = _parts(state)
                if parts.keys() != whole.keys():
                    wrong.append(f"{where}: keys {sorted(parts.keys() ^ whole.keys())}")
                for key, part in parts.items():
                    if key in whole and not torch.equal(part.values, whole[key][part.place]):
                        wrong.append(f"{where}: {key}")
                went_on = _train(model, net, optimizer, STEPS)
                if not torch.allclose(
                    torch.tensor(went_on), torch.tensor(losses), rtol=1e-5, atol=1e-6
                ):
                    wrong.append(
                        f"{where}: losses {went_on}, the run that never stopped has {losses}"
                    )
    return wrong


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    root = str(tmp_path_factory.mktemp("matrix"))
    saved: dict[str, Any] = {}
    for ranks in (4, 2, 1):
        names = [name for name, (size, _) in SYSTEMS.items() if size == ranks]
        outcomes = run_ranks(_save, ranks, root, names, timeout=300)
        for key, (_, losses) in outcomes[0].items():
            saved[key] = (_whole([outcome[key][0] for outcome in outcomes]), losses)
    return root, saved


# One loader of each kind, and all savers; `make soak` has every loader.
SAMPLE = ("ours-2x2", "ours-1d", "fsdp1-hybrid", "fsdp2-2d", "plain")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in SAMPLE else pytest.mark.soak) for name in SYSTEMS],
)
def test_loads_what_every_saver_saved(name: str, checkpoints: tuple[str, dict[str, Any]]) -> None:
    root, saved = checkpoints
    for wrong in run_ranks(_load, SYSTEMS[name][0], root, name, saved, timeout=300):
        assert not wrong, "\n".join(wrong)
