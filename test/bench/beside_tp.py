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


def _parallel(layer: _Layer, mesh: DeviceMesh) -> _Layer:
    parallelize_module(layer, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return layer


class _WithTwin(nn.Module):
    """A layer, and beside it a tensor-parallel one that is not the wrapper's."""

    def __init__(self, layer: _Layer, twin: _Layer) -> None:
        super().__init__()
        self.layer = layer
        self.twin = (twin,)  # not registered

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.twin[0](x)


class _Model:
    """``layers`` units. ``kind``: "plain" parameters; "DTensors"; "busy": plain ones, in a model
    that computes with DTensors as well."""

    def __init__(self, system: str, mesh: DeviceMesh, kind: str, width: int, layers: int) -> None:
        torch.manual_seed(0)

        def layer() -> _Layer:
            return _Layer(width, 4 * width)

        if kind == "busy":
            units: list[nn.Module] = [
                _WithTwin(layer(), _parallel(layer(), mesh)) for _ in range(layers)
            ]
        elif kind == "DTensors":
            units = [_parallel(layer(), mesh) for _ in range(layers)]
        else:
            units = [layer() for _ in range(layers)]
        self.net = nn.Sequential(*units)
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
    kinds: tuple[str, ...],
    steps: int,
    *case: int,
) -> dict[tuple[str, str], list[float]]:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard", "tp"))
    keys = list(itertools.product(systems, kinds))
    models = {key: _Model(key[0], mesh, key[1], *case) for key in keys}
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
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
        case = (systems, (2, 2, 2), ("DTensors",), steps, width, layers)
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
    kinds = ("plain", "busy", "DTensors")
    case = (chosen, (1, 1, 1), kinds, steps, 16, layers)
    found = run_ranks(_rank, 1, *case, timeout=900)[0]
    rows = []
    for system in chosen[1:]:
        own = {}
        for kind in kinds:
            pairs = zip(found[system, kind], found["bare", kind], strict=True)
            own[kind] = statistics.median((a - b) / layers * 1e3 for a, b in pairs)
        rows.append(
            [
                system,
                *(f"{own[kind]:.3f}" for kind in kinds),
                f"{own['DTensors'] / own['busy']:.2f}",
            ]
        )
    header = [
        "system",
        "plain, ms a unit",
        "plain in a model that computes with DTensors",
        "DTensors",
        "DTensors / plain there",
    ]
    return table(header, rows)


def measure(systems: tuple[str, ...], quick: bool) -> str:
    return (
        "8 processes, 2 replicas x 2 shards x 2 of tensor parallelism (column-wise and row-wise "
        "linear layers), batches of 4: communication decides. Systems take turns.\n\n"
        + _steps(systems, quick)
        + "\n\nWhat the wrapper adds to a unit's forward and backward on one rank, where nothing "
        "is sent, of 64 units; parameters are plain or DTensors, by parallelize_module on a mesh "
        "of one. What DTensors compute in Python leaves the caches cold for whoever comes next: "
        "plain parameters are measured in such a model too.\n\n" + _own_time(systems, quick)
    )
