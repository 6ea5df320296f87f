"""A step of Muon: torch's on whole matrices, all of them on each rank, torch's on sharded ones, and
ours on the same."""

import itertools
import logging
import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import torch
import torch.distributed as dist
from ranks import run_ranks
from report import milliseconds, table
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import torch_hsdp_ckpt

SYSTEMS = ("whole", "torch", "ours")
WARMUP = 2


def gpt_matrices(width: int, blocks: int) -> list[tuple[int, int]]:
    """The attention's and the feed-forward layer's weights of each block."""
    block = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    return block * blocks


def _optimizer(system: str, mesh: DeviceMesh, sizes: list[tuple[int, int]]) -> torch.optim.Muon:
    placements = [Replicate(), Shard(0)][-mesh.ndim :]
    torch.manual_seed(0)
    parameters = []
    for size in sizes:
        value, gradient = torch.randn(size), torch.randn(size)
        if system != "whole":
            value = distribute_tensor(value, mesh, placements, src_data_rank=None)
            gradient = distribute_tensor(gradient, mesh, placements, src_data_rank=None)
        parameters.append(nn.Parameter(value))
        parameters[-1].grad = gradient
    kind = torch_hsdp_ckpt.Muon if system == "ours" else torch.optim.Muon
    return kind(parameters, lr=0.01)


def _seconds(step: Callable[[], None]) -> float:
    """Until all ranks are done."""
    dist.barrier()
    start = time.perf_counter()
    step()
    dist.barrier()
    return time.perf_counter() - start


def _rank(
    rank: int, systems: tuple[str, ...], shape: tuple[int, ...], width: int, blocks: int, steps: int
) -> dict[str, list[float]]:
    logging.disable(logging.WARNING)  # DTensor's, of reductions that it makes one by one
    mesh, sizes = init_device_mesh("cpu", shape), gpt_matrices(width, blocks)
    optimizers = {system: _optimizer(system, mesh, sizes) for system in systems}
    times: dict[str, list[float]] = defaultdict(list)
    for step in range(WARMUP + steps):
        for system, optimizer in optimizers.items():
            seconds = _seconds(optimizer.step)
            if step >= WARMUP:
                times[system].append(seconds)
    return times


def measure(systems: tuple[str, ...], quick: bool) -> str:
    sizes = [(64, 2)] if quick else [(64, 8), (256, 8), (512, 4)]
    rows = []
    for shape, (width, blocks) in itertools.product(((2, 2), (4,)), sizes):
        steps = 3 if quick else 11
        times = run_ranks(_rank, 4, systems, shape, width, blocks, steps, timeout=600)[0]
        medians = {system: statistics.median(each) for system, each in times.items()}
        of_torchs = medians.get("torch", float("nan"))
        for system, each in times.items():
            what = [" x ".join(map(str, shape)), f"{blocks} x {width}", system]
            rows.append([*what, milliseconds(each), f"{medians[system] / of_torchs:.2f}"])
    return (
        "4 processes of one thread each, Gloo, float32. A GPT's matrices: of each block 3d x d, "
        "d x d, 4d x d and d x 4d, sharded by rows over 2 replicas x 2 shards or over 4 shards. "
        "whole: torch.optim.Muon on plain matrices, all on each rank; torch: on DTensors; ours: "
        "torch_hsdp_ckpt.Muon on such. A step is over when all ranks are done; systems take turns."
        "\n\n" + table(["mesh", "blocks x d", "system", "step ms", "time / torch"], rows)
    )
