"""FSDP2's gather extensions: torch's numbers with a tensor subclass that gathers in bfloat16."""

from typing import Any

import pytest
import torch
from device import DEVICE
from ranks import run_checks
from sides import SIDES, sharded
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map
from training import mesh_of

import torch_hsdp_ckpt as ours

_KEEPING = {  # what these make of one is one, too
    torch.ops.aten.detach.default,
    torch.ops.aten.split.Tensor,
    torch.ops.aten.slice.Tensor,
    torch.ops.aten.new_zeros.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.view.default,
    torch.ops.aten.as_strided.default,
    torch.ops.aten.copy_.default,
    torch.ops.aten.add_.Tensor,
    torch.ops.aten.clone.default,
}


class Low(Tensor):
    """Float32 values that are gathered in bfloat16 and computed with in what the policy says."""

    @staticmethod
    def __new__(cls, values: Tensor) -> "Low":
        return Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), dtype=values.dtype, device=values.device
        )

    def __init__(self, values: Tensor) -> None:
        self.values_ = values

    def __repr__(self) -> str:
        return f"Low({self.values_})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(each: Any) -> Any:
            return each.values_ if isinstance(each, Low) else each

        result = func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))
        if func in _KEEPING:
            if func is torch.ops.aten.copy_.default or func is torch.ops.aten.add_.Tensor:
                return args[0]
            return tree_map(lambda each: cls(each) if isinstance(each, Tensor) else each, result)
        return result

    def fsdp_pre_all_gather(self, mesh: DeviceMesh) -> tuple[tuple[Tensor, ...], Any]:
        padded = self.values_
        if padded.size(0) < self.rows_of_chunk:  # of an uneven shard
            padded = torch.cat([padded, padded.new_zeros(self.rows_of_chunk - len(padded), 4)])
        return (padded.to(torch.bfloat16),), self.values_.dtype

    rows_of_chunk = 0

    def fsdp_post_all_gather(
        self,
        outputs: tuple[Tensor, ...],
        metadata: Any,
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> Any:
        (gathered,) = outputs
        assert metadata == torch.float32
        if out is not None:
            out = out._local_tensor if isinstance(out, DTensor) else out
            with torch.no_grad(), _unsafe_preserve_version_counter(out):  # a graph may have it
                out.copy_(gathered[: len(out)].to(param_dtype))
            return None
        full = gathered.to(param_dtype, copy=True)
        return full, (full,)


class Even(Low):
    """Asks for all that an extension can be told."""

    def fsdp_pre_all_gather(
        self,
        mesh: DeviceMesh,
        outer_size: torch.Size,
        outer_stride: tuple[int, ...],
        module: nn.Module,
        mp_policy: MixedPrecisionPolicy,
    ) -> tuple[tuple[Tensor, ...], Any]:
        assert mesh.ndim == 1 and mesh.size() == 2
        assert tuple(outer_size) == (4, 4) and tuple(outer_stride) == (4, 1)
        assert isinstance(module, nn.Linear) and isinstance(mp_policy, MixedPrecisionPolicy)
        return (self.values_.to(torch.bfloat16),), self.values_.dtype


def _model(kind: type[Low]) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))).to(DEVICE)
    for layer in model[:2]:
        layer.weight = nn.Parameter(kind(layer.weight.detach()))
    model[1].weight.requires_grad_(False)
    return model


def _trained(side: Any, kind: type[Low], **arguments: Any) -> list[Tensor]:
    model = sharded(side, _model(kind), mesh=mesh_of((2, 2)), **arguments)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    for step in range(3):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(10 * step + torch.distributed.get_rank())
        model(torch.randn(3, 4, generator=generator).to(DEVICE)).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        return [_plain(parameter) for parameter in model.parameters()]


def _plain(parameter: DTensor) -> Tensor:
    local = parameter._local_tensor
    return local.values_ if isinstance(local, Low) else local


def _trains_as_torchs(rank: int) -> None:
    for reshard in (True, False):
        policies = (None, MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        for policy in policies:
            Low.rows_of_chunk = 2
            arguments: dict[str, Any] = {"reshard_after_forward": reshard}
            if policy is not None:
                arguments["mp_policy"] = policy
            for kind in (Low, Even):
                outcomes = [_trained(side, kind, **arguments) for side in SIDES]
                for found, wanted in zip(*outcomes, strict=True):
                    assert torch.equal(found, wanted)


class Half(Tensor):
    """Has one of the two methods."""

    def fsdp_pre_all_gather(self, mesh: DeviceMesh) -> Any:
        return (self,), None


class Short(Low):
    """Forgets the padding of an uneven shard."""

    def fsdp_pre_all_gather(
        self, mesh: Any, size: Any, stride: Any, module: Any, policy: Any
    ) -> Any:
        return (self.values_.to(torch.bfloat16),), self.values_.dtype


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(4, len(weight)).to(DEVICE)
    layer.weight = nn.Parameter(weight)
    return layer


def _refused(rank: int) -> None:
    start = f"^rank {rank}: module Linear: parameter weight "
    with pytest.raises(ValueError, match=start + ".* which go together"):
        ours.fully_shard(_linear(torch.ones(4, 4).as_subclass(Half)))
    mesh = mesh_of((1, 4))
    with pytest.raises(ValueError, match=start + ".* gathers itself"):
        ours.fully_shard(_linear(Low(torch.ones(4, 4))), mesh=mesh, reshard_after_forward=2)
    uneven = ours.fully_shard(_linear(Short(torch.ones(5, 4))), mesh=mesh)
    message = rf"^rank {rank}: module FSDPLinear: .* \(5, 4\) can't be .* whole chunk, \(2, 4\)"
    with pytest.raises(ValueError, match=message):
        uneven(torch.ones(1, 4, device=DEVICE))


def test_gather_extensions() -> None:
    run_checks(4, _trains_as_torchs, _refused)
