"""What the wrapper's tests share: wrapping on a mesh, and gradients to compare with."""

import copy
import functools

import torch
import torch.distributed as dist
from device import DEVICE
from models import Block, Net
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

from torch_hsdp_ckpt import FullyShardedDataParallel
from torch_hsdp_ckpt.hsdp.runner import named_runners


def mesh_of(shape: tuple[int, ...], device: str = DEVICE):
    return init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def _on(net: nn.Module, device: str) -> nn.Module:
    """On the device that the tests run on it is already, or on the meta device for good."""
    return net if device == DEVICE else net.to(device)


def wrap(
    net: nn.Module, shape: tuple[int, ...] = (2, 2), device: str = DEVICE, policy=None, **options
):
    return FullyShardedDataParallel(
        _on(net, device),
        device_mesh=mesh_of(shape, device),
        auto_wrap_policy=policy or ModuleWrapPolicy({Block}),
        **options,
    )


def wrap_fsdp2(net: Net, shape: tuple[int, ...], device: str = DEVICE) -> Net:
    mesh = mesh_of(shape, device)
    for block in _on(net, device).blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


@functools.cache
def _on_cpu(mesh: DeviceMesh) -> DeviceMesh:
    return DeviceMesh("cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, on its device. Torch's Gloo gathers no CUDA tensors: with it they go by way
    of the CPU."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    config = str(dist.get_backend_config(tensor.device_mesh.get_group(0)))
    if tensor.device.type == "cpu" or "cuda:gloo" not in config:
        return tensor.full_tensor().detach()
    on_cpu = DTensor.from_local(
        tensor.to_local().detach().cpu(),
        _on_cpu(tensor.device_mesh),
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
    return on_cpu.full_tensor().to(tensor.device)


def grads(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: None if p.grad is None else full(p.grad) for name, p in model.named_parameters()}


def mean_grads(net: nn.Module, loss) -> dict[str, torch.Tensor | None]:
    """Gradients of the mean over all ranks of ``loss(net, rank)``, on a copy in this process."""
    net = copy.deepcopy(net)
    ranks = dist.get_world_size()
    for rank in range(ranks):
        (loss(net, rank) / ranks).backward()
    return {name: p.grad for name, p in net.named_parameters()}


def assert_close(
    ours: dict[str, torch.Tensor | None], reference: dict[str, torch.Tensor | None]
) -> None:
    assert ours.keys() == reference.keys()
    for name, grad in reference.items():
        if grad is None:
            assert ours[name] is None, name
        else:
            assert ours[name] is not None, name
            torch.testing.assert_close(
                ours[name],
                grad,
                rtol=1e-5,
                atol=1e-6,
                msg=lambda text, name=name: f"{name}: {text}",
            )


def unsharded(model: nn.Module) -> list[str]:
    """The units whose full parameters have memory now."""
    runners = dict(named_runners(model))
    return [name for name, runner in runners.items() if runner.units[0].core.is_unsharded]


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()
