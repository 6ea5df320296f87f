"""The wrappers that are compared, around one model, and the meter that they are measured with."""

import gc
import resource
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

WRAPPERS = ("fsdp1", "fsdp2", "ours")


class Block(nn.Module):
    """A transformer block: attention and MLP, each behind a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.qkv(self.norms[0](x)).chunk(3, -1))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class Net(nn.Module):
    """``layers`` blocks, a unit each, and a small head in the root unit."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, 11)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Pile(nn.Module):
    """1,000 parameters of a few KiB, in one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(
            nn.Parameter(torch.full((24 + i % 9, 32), 0.01)) for i in range(1000)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.cat([weight.view(-1) for weight in self.weights]).square().mean()


class Odd(nn.Module):
    """Rows that no group divides."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width - 1), nn.Linear(2 * width - 1, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


def model(kind: str, width: int, layers: int) -> Net:
    """ "blocks", "small" (one unit of 1,000 small parameters) or "uneven" (odd widths, odd
    rows)."""
    net = Net(width - 1 if kind == "uneven" else width, layers if kind == "blocks" else 0)
    if kind == "small":
        net.blocks.append(Pile())
    elif kind == "uneven":
        net.blocks.extend(Odd(width - 1) for _ in range(layers))
    return net


def mebibytes(module: nn.Module) -> float:
    return sum(p.numel() * p.element_size() for p in module.parameters()) / 2**20


MIXED = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}


def wrap(system: str, net: Net, mesh: DeviceMesh, mixed: bool = False) -> nn.Module:
    """``net`` on ``mesh``, of (replicas, shards) or of shards, by one of WRAPPERS or "ours,
    fully_shard", a unit per Block; "bare" leaves it as it is. ``mixed``: computes in bfloat16 and
    reduces in float32."""
    policy = ModuleWrapPolicy({type(block) for block in net.blocks})
    if system == "bare":
        return net.bfloat16() if mixed else net
    if system == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(
            net,
            device_mesh=mesh,
            sharding_strategy=_strategy(mesh),
            auto_wrap_policy=policy,
            device_id=torch.device(mesh.device_type),
            use_orig_params=True,
            mixed_precision=MixedPrecision(**MIXED) if mixed else None,
        )
    if system == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        return _fully_sharded(fully_shard, net, mesh, mixed)
    if system.startswith("ours"):
        import torch_hsdp_ckpt as ours

        if system == "ours, fully_shard":
            return _fully_sharded(ours.fully_shard, net, mesh, mixed)
        return ours.FullyShardedDataParallel(
            net,
            device_mesh=mesh,
            sharding_strategy=_strategy(mesh),
            auto_wrap_policy=policy,
            mixed_precision=MixedPrecision(**MIXED) if mixed else None,
        )
    raise ValueError(
        f"unknown system {system!r}: one of bare, {', '.join(WRAPPERS)} or ours, fully_shard"
    )


def _strategy(mesh: DeviceMesh) -> ShardingStrategy:
    return ShardingStrategy.HYBRID_SHARD if mesh.ndim == 2 else ShardingStrategy.FULL_SHARD


def _fully_sharded(
    fully_shard: Callable[..., Any], net: Net, mesh: DeviceMesh, mixed: bool
) -> nn.Module:
    policy = MixedPrecisionPolicy(**MIXED) if mixed else MixedPrecisionPolicy()
    for block in net.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(net, mesh=mesh, mp_policy=policy)


def _memory(key: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


class Meter:
    """One block of code between two barriers: ``seconds``, this rank's ``cpu`` seconds and ``mib``
    of memory that it took on top of what the process held before."""

    def __enter__(self) -> "Meter":
        gc.collect()
        Path("/proc/self/clear_refs").write_text(
            "5", encoding="utf-8"
        )  # the high-water mark starts again from here
        dist.barrier()
        self._resting, self._mapped = _memory("VmRSS"), _memory("RssFile")
        self._cpu, self._start = self._used(), time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            dist.barrier()
            self.seconds = time.perf_counter() - self._start
            self.cpu = self._used() - self._cpu
            # Pages of libraries that were touched for the first time are no memory that the block
            # took.
            mapped = max(0.0, _memory("RssFile") - self._mapped)
            self.mib = max(0.0, _memory("VmHWM") - self._resting - mapped)

    def reading(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "cpu": self.cpu, "mib": self.mib}

    @staticmethod
    def _used() -> float:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime
