"""A step of torch's pipelining, its stages under FSDP2 and ours: 2 stages x 2 shards."""

import itertools
import statistics
import time
from collections import defaultdict

import torch
import torch.distributed as dist
from ranks import run_ranks
from report import milliseconds, table
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard as torchs_fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
)

import torch_hsdp_ckpt

# "bare": the stages alone, each rank its own, which is what pipelining itself takes.
FULLY_SHARD = {"bare": None, "fsdp2": torchs_fully_shard, "ours": torch_hsdp_ckpt.fully_shard}
SCHEDULES = {"1F1B": Schedule1F1B, "interleaved 1F1B": ScheduleInterleaved1F1B}
WARMUP = 2
MICROBATCHES = 8
SYSTEMS = tuple(FULLY_SHARD)


class _Pipeline:
    """A rank's stages of a model of ``layers`` units, each a linear layer and a tanh."""

    def __init__(self, system: str, schedule: str, keeps: bool, width: int, layers: int) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "shard"))
        torch.manual_seed(0)
        units = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(layers)]
        self.is_first = mesh.get_local_rank("pp") == 0
        self.width = width
        count = 2 if schedule == "1F1B" else 4
        each = layers // count
        parts = [nn.Sequential(*units[i * each : (i + 1) * each]) for i in range(count)]
        here = range(mesh.get_local_rank("pp"), count, 2)
        self.reductions = 0
        if (fully_shard := FULLY_SHARD[system]) is not None:
            for part in (parts[i] for i in here):
                for unit in (*part, part):
                    fully_shard(unit, mesh=mesh["shard"], reshard_after_forward=not keeps)
                for unit in part:
                    unit.set_all_reduce_hook(self._count)
        group = mesh.get_group("pp")
        device = torch.device("cpu")
        stages = [PipelineStage(parts[i], i, count, device, group=group) for i in here]
        given = stages[0] if count == 2 else stages
        self.schedule = SCHEDULES[schedule](given, MICROBATCHES, loss_fn=nn.functional.mse_loss)
        self.units = sum(len(parts[i]) for i in here)
        parameters = [p for i in here for p in parts[i].parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=0.01)

    def _count(self, _: torch.Tensor) -> None:
        self.reductions += 1

    def step(self) -> float:
        """Seconds of forwards and backwards."""
        x = torch.randn(2 * MICROBATCHES, self.width)
        dist.barrier()
        start = time.perf_counter()
        if self.is_first:
            self.schedule.step(x)
        else:
            self.schedule.step(target=x)
        seconds = time.perf_counter() - start
        self.optimizer.step()
        self.optimizer.zero_grad()
        return seconds


def _rank(
    rank: int, systems: tuple[str, ...], steps: int, schedule: str, *case: int
) -> dict[str, tuple[list[float], float]]:
    pipelines = {system: _Pipeline(system, schedule, *case) for system in systems}
    times: dict[str, list[float]] = defaultdict(list)
    for step in range(WARMUP + steps):
        for system, pipeline in pipelines.items():
            if step == WARMUP:
                pipeline.reductions = 0
            seconds = pipeline.step()
            if step >= WARMUP:
                times[system].append(seconds)
    return {
        system: (times[system], pipeline.reductions / pipeline.units / steps)
        for system, pipeline in pipelines.items()
    }


def measure(systems: tuple[str, ...], quick: bool) -> str:
    sizes = [(64, 4)] if quick else [(64, 4), (512, 8)]
    rows = []
    for schedule, keeps, (width, layers) in itertools.product(SCHEDULES, (False, True), sizes):
        steps = 3 if quick else 20
        case = (systems, steps, schedule, keeps, width, layers)
        found = run_ranks(_rank, 4, *case, timeout=600)[0]
        medians = {system: statistics.median(times) for system, (times, _) in found.items()}
        of_fsdp2 = medians.get("fsdp2", float("nan"))
        for system, (times, reductions) in found.items():
            what = [schedule, f"{layers} x {width}", "kept" if keeps else "freed", system]
            figures = [milliseconds(times), f"{reductions:g}", f"{medians[system] / of_fsdp2:.2f}"]
            rows.append([*what, *figures])
    header = ["schedule", "units x width", "after forward", "system", "step ms"]
    return (
        f"4 processes, 2 stages x 2 shards, {MICROBATCHES} microbatches. Full parameters are kept "
        "after forward (reshard_after_forward=False) or freed. Systems take turns within a step. "
        "Reductions: of each unit in a step.\n\n"
        + table([*header, "reductions", "time / FSDP2"], rows)
    )
