"""A step of a tensor-parallel model under FSDP2 and ours: 2 replicas x 2 shards x 2 of TP; and what
the wrapper itself takes for parameters that are DTensors."""

import itertools
import statistics
import time
from collections import defaultdict

import torch
import torch.distributed as dist
from ranks import run_ranks
from report import milliseconds, table
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard as torchs_fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import torch_hsdp_ckpt

# "bare": the model alone, each rank its own.
FULLY_SHARD = {"bare": None, "fsdp2": torchs_fully_shard, "ours": torch_hsdp_ckpt.fully_shard}
SYSTEMS = tuple(FULLY_SHARD)
WARMUP = 3


class _Layer(nn.Module):
    def __init__(self, width: int, inside: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inside), nn.Linear(inside, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class _Model:
    """``layers`` units."""

    def __init__(
        self, system: str, mesh: DeviceMesh, parallel: bool, width: int, layers: int
    ) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(*(_Layer(width, 4 * width) for _ in range(layers)))
        if parallel:
            for layer in self.net:
                plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
                parallelize_module(layer, mesh["tp"], plan)
        if (fully_shard := FULLY_SHARD[system]) is not None:
            for module in (*self.net, self.net):
                fully_shard(module, mesh=mesh["replicate", "shard"])
        self.width = width

    def step(self) -> float:
        """Seconds of forward and backward."""
        x = torch.randn(4, self.width)
        dist.barrier()
        start = time.perf_counter()
        self.net(x).square().mean().backward()
        dist.barrier()
        seconds = time.perf_counter() - start
        for parameter in self.net.parameters():
            parameter.grad = None
        return seconds


def _rank(
    rank: int,
    systems: tuple[str, ...],
    shape: tuple[int, int, int],
    parallels: tuple[bool, ...],
    steps: int,
    *case: int,
) -> dict[tuple[str, bool], list[float]]:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard", "tp"))
    keys = list(itertools.product(systems, parallels))
    models = {key: _Model(key[0], mesh, key[1], *case) for key in keys}
    times: dict[tuple[str, bool], list[float]] = defaultdict(list)
    for step in range(WARMUP + steps):
        for key, model in models.items():
            seconds = model.step()
            if step >= WARMUP:
                times[key].append(seconds)
    return times


def _steps(systems: tuple[str, ...], quick: bool) -> str:
    rows = []
    for width, layers in [(64, 4)] if quick else [(64, 4), (512, 4), (1024, 4)]:
        steps = 3 if quick else 15
        case = (systems, (2, 2, 2), (True,), steps, width, layers)
        found = run_ranks(_rank, 8, *case, timeout=900)[0]
        medians = {system: statistics.median(times) for (system, _), times in found.items()}
        of_fsdp2 = medians.get("fsdp2", float("nan"))
        for (system, _), times in found.items():
            ratio = f"{medians[system] / of_fsdp2:.2f}"
            rows.append([f"{layers} x {width}", system, milliseconds(times), ratio])
    return table(["units x width", "system", "step ms", "time / FSDP2"], rows)


def _own_time(systems: tuple[str, ...], quick: bool) -> str:
    """Of one rank, where nothing is sent."""
    layers, steps = (8, 5) if quick else (64, 100)
    chosen = tuple(dict.fromkeys(("bare", *systems)))
    case = (chosen, (1, 1, 1), (True, False), steps, 16, layers)
    found = run_ranks(_rank, 1, *case, timeout=900)[0]
    rows = []
    for system in chosen[1:]:
        own = []
        for parallel in (False, True):
            pairs = zip(found[system, parallel], found["bare", parallel], strict=True)
            own.append([(a - b) / layers * 1e3 for a, b in pairs])
        plain, dtensors = (statistics.median(each) for each in own)
        rows.append([system, f"{plain:.3f}", f"{dtensors:.3f}", f"{dtensors / plain:.2f}"])
    return table(["system", "plain, ms a unit", "DTensors, ms a unit", "DTensors / plain"], rows)


def measure(systems: tuple[str, ...], quick: bool) -> str:
    return (
        "8 processes, 2 replicas x 2 shards x 2 of tensor parallelism (column-wise and row-wise "
        "linear layers), batches of 4: communication decides. Systems take turns.\n\n"
        + _steps(systems, quick)
        + "\n\nWhat the wrapper adds to a unit's forward and backward on one rank, where nothing "
        "is sent, of 64 units; parameters are plain or DTensors, by parallelize_module on a mesh "
        "of one.\n\n" + _own_time(systems, quick)
    )
