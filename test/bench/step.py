"""A training step under FSDP1, FSDP2 and ours: what the wrapper itself costs, and a step that is all communication."""

import multiprocessing
import statistics
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.distributed as dist
from ranks import run_ranks
from report import milliseconds, table
from systems import Net, mebibytes, wrap
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

WARMUP = 3
Times = dict[str, list[float]]


def _steps(mesh: DeviceMesh, systems: tuple[str, ...], width: int, layers: int, steps: int, real: bool) -> tuple[Times, Times]:
    """Seconds of forward and backward, and losses, step by step; systems take turns within a step."""
    models = {}
    for system in systems:
        torch.manual_seed(0)
        model = wrap(system, Net(width, layers), mesh)
        models[system] = model, torch.optim.SGD(model.parameters(), lr=0.01)
    times: Times = defaultdict(list)
    losses: Times = defaultdict(list)
    for step in range(WARMUP + steps):
        torch.manual_seed(1000 * step + dist.get_rank())
        x = torch.randn(1, 1, width)
        for system, (model, optimizer) in models.items():
            if real:
                dist.barrier()
            start = time.perf_counter()
            loss = model(x).square().mean()
            loss.backward()
            seconds = time.perf_counter() - start
            optimizer.step()
            optimizer.zero_grad()
            losses[system].append(loss.item())
            if step >= WARMUP:
                times[system].append(seconds)
    return dict(times), dict(losses)


def _fake(systems: tuple[str, ...], width: int, layers: int, steps: int) -> Times:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("replicate", "shard"))
    return _steps(mesh, ("bare", *systems), width, layers, steps, real=False)[0]


def own_time(systems: tuple[str, ...], steps: int) -> str:
    """The wrapper's own time: a process group that moves no data, the bare model's time subtracted."""
    width, layers = 64, 24
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        times = pool.submit(_fake, systems, width, layers, steps).result(timeout=600)
    bare = statistics.median(times["bare"])
    units = layers + 1
    own = {system: statistics.median(times[system]) - bare for system in systems}
    best = min((own[s] for s in systems if s != "ours"), default=float("nan"))
    rows = [["bare", milliseconds(times["bare"]), "", ""]]
    rows += [[s, milliseconds(times[s]), f"{1e6 * own[s] / units:.0f}", f"{own[s] / best:.2f}"] for s in systems]
    header = ["system", "forward + backward ms, median [range]", "own us per unit", "of torch's better one"]
    return f"## Own time: no data moves, 2 replicas x 4 shards, {units} units, {steps} steps\n{table(header, rows)}\n"


def _collectives(mesh: DeviceMesh, mib: float, units: int) -> float:
    """Seconds of one step's four collectives alone: two all-gathers, a reduce-scatter and an all-reduce a unit."""
    replicate, shard = mesh.get_group(0), mesh.get_group(1)
    full = torch.zeros(int(mib * 2**20) // 4 // units // dist.get_world_size(shard) * dist.get_world_size(shard))
    part = torch.zeros(full.numel() // dist.get_world_size(shard))
    dist.barrier()
    start = time.perf_counter()
    for _ in range(units):
        dist.all_gather_into_tensor(full, part, group=shard)
    for _ in range(units):
        dist.all_gather_into_tensor(full, part, group=shard)
        dist.reduce_scatter_tensor(part, full, group=shard)
        dist.all_reduce(part, group=replicate)
    return time.perf_counter() - start


def _real(rank: int, systems: tuple[str, ...], width: int, layers: int, steps: int) -> tuple[Times, Times, float]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    mib = mebibytes(Net(width, layers))
    before = [_collectives(mesh, mib, layers) for _ in range(WARMUP + steps // 2)][WARMUP:]
    times, losses = _steps(mesh, systems, width, layers, steps, real=True)
    times["collectives"] = before + [_collectives(mesh, mib, layers) for _ in range(steps - len(before))]
    return times, losses, mib


def communication(systems: tuple[str, ...], steps: int, quick: bool) -> str:
    """A step of one token: nearly all of it is communication. 4 Gloo ranks, 2 replicas x 2 shards."""
    width, layers = (128, 4) if quick else (512, 8)
    outcomes = run_ranks(_real, 4, systems, width, layers, steps, timeout=1200.0)
    times, losses, mib = outcomes[0]
    for system in systems:  # a fast step that computes something else would be no result
        torch.testing.assert_close(losses[system], losses[systems[0]], rtol=1e-4, atol=1e-6)
    medians = {s: statistics.median(t) for s, t in times.items()}
    best = min((medians[s] for s in systems if s != "ours"), default=float("nan"))
    rows = [[s, milliseconds(times[s]), f"{medians[s] / best:.2f}"] for s in ("collectives", *systems)]
    header = ["system", "forward + backward ms, median [range]", "of torch's better one"]
    title = f"## Communication: {mib:.0f} MiB, 4 Gloo ranks, 2 replicas x 2 shards, {layers + 1} units, {steps} steps"
    return f"{title}\n{table(header, rows)}\n"
