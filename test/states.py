"""What the tests of state dicts share: a model that has been trained a little, tensors by path, and
a count of what moves."""

from collections.abc import Callable
from typing import Any

import torch
from device import DEVICE
from models import NETS, Block, Net, batch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torch_hsdp_ckpt import FullyShardedDataParallel as FSDP
from torch_hsdp_ckpt import fully_shard

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
Wrap = Callable[[Any, DeviceMesh], nn.Module]


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def mesh_of(*shape: int, device: str = DEVICE) -> DeviceMesh:
    return init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def wrapped(net: nn.Module, mesh: DeviceMesh, **options: Any) -> FSDP:
    return FSDP(net, device_mesh=mesh, auto_wrap_policy=ModuleWrapPolicy({Block}), **options)


def fully_sharded(net: Net, mesh: DeviceMesh) -> Net:
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def trained(
    kind: str,
    rank: int,
    shape: tuple[int, ...] = (2, 2),
    device: str = DEVICE,
    steps: int = 2,
    make: Make = adam,
    seed: int = 0,
    wrap: Wrap = wrapped,
) -> tuple[Any, torch.optim.Optimizer]:
    model = wrap(NETS[kind](seed).to(device), mesh_of(*shape, device=device))
    optimizer = make(list(model.parameters()))
    for number in range(steps):
        step(model, optimizer, kind, number, rank, device)
    return model, optimizer


_SHAPES: dict[str, Net] = {}


def step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    kind: str,
    number: int,
    rank: int,
    device: str = DEVICE,
) -> None:
    net = _SHAPES.setdefault(kind, NETS[kind]())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(batch(net, number, rank).to(device)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)


def tensors(state: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """All tensors in nested dicts and lists by path; DTensors by their local tensors."""
    found = {}
    for key, value in state.items() if isinstance(state, dict) else enumerate(state):
        path = f"{prefix}/{key}" if prefix else str(key)
        if isinstance(value, (dict, list)):
            found |= tensors(value, path)
        elif isinstance(value, torch.Tensor):
            found[path] = value._local_tensor if isinstance(value, DTensor) else value
    return found


def bits(state: Any) -> dict[str, torch.Tensor]:
    return {path: value.detach().clone() for path, value in tensors(state).items()}


def with_own_version(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory in a tensor whose version counter is its own: nobody sees that it writes."""
    other = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return other.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape)


def assert_same(a: Any, b: Any, where: str = "") -> None:
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys(), f"{where}: {a.keys() ^ b.keys()}"
    for key, value in a.items():
        assert torch.equal(value, b[key]), f"{key} {where}"


class Moves(TorchDispatchMode):
    """The operators that send bytes or copy them, and how many bytes each copy writes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if any(word in name for word in ("c10d", "copy", "clone", "cat", "contiguous")):
            self.seen.append(name)
            if "c10d" not in name:
                targets = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
                # Once a tensor: a DTensor's operator comes by again as its local tensor's.
                self.bytes += sum(
                    t.nbytes
                    for t in tree_leaves(targets)
                    if isinstance(t, torch.Tensor) and not _is_sharded(t)
                )
        return func(*args, **(kwargs or {}))

    def sent(self) -> list[str]:
        return [name for name in self.seen if "c10d" in name]


def _is_sharded(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, DTensor)
