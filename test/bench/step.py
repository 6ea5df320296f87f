"""A training step under FSDP1, FSDP2 and ours: what the wrapper itself costs, a step that is all
communication, its memory."""

import ctypes
import multiprocessing
import statistics
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.distributed as dist
from ranks import run_ranks
from report import milliseconds, table
from systems import Meter, mebibytes, model, wrap
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

WARMUP = 3
Times = dict[str, list[float]]


def _steps(
    mesh: DeviceMesh,
    systems: tuple[str, ...],
    kind: str,
    width: int,
    layers: int,
    steps: int,
    real: bool,
) -> tuple[Times, Times]:
    """Seconds of forward and backward, and losses, step by step; systems take turns within a
    step."""
    models = {}
    for system in systems:
        torch.manual_seed(0)
        wrapped = wrap(system, model(kind, width, layers), mesh)
        models[system] = wrapped, torch.optim.SGD(wrapped.parameters(), lr=0.01)
    inputs = next(iter(models.values()))[0].head.in_features
    times: Times = defaultdict(list)
    losses: Times = defaultdict(list)
    for step in range(WARMUP + steps):
        torch.manual_seed(1000 * step + dist.get_rank())
        x = torch.randn(1, 1, inputs)
        for system, (wrapped, optimizer) in models.items():
            if real:
                dist.barrier()
            start = time.perf_counter()
            loss = wrapped(x).square().mean()
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
    return _steps(mesh, ("bare", *systems), "blocks", width, layers, steps, real=False)[0]


def own_time(systems: tuple[str, ...], steps: int) -> str:
    """The wrapper's own time: a process group that moves no data, the bare model's time
    subtracted."""
    width, layers = 64, 24
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        times = pool.submit(_fake, systems, width, layers, steps).result(timeout=600)
    bare = statistics.median(times["bare"])
    units = layers + 1
    own = {system: statistics.median(times[system]) - bare for system in systems}
    best = min((own[s] for s in systems if s != "ours"), default=float("nan"))
    rows = [["bare", milliseconds(times["bare"]), "", ""]]
    rows += [
        [s, milliseconds(times[s]), f"{1e6 * own[s] / units:.0f}", f"{own[s] / best:.2f}"]
        for s in systems
    ]
    header = [
        "system",
        "forward + backward ms, median [range]",
        "own us per unit",
        "of torch's better one",
    ]
    title = f"## Own time: no data moves, 2 replicas x 4 shards, {units} units, {steps} steps"
    return f"{title}\n{table(header, rows)}\n"


def _collectives(mesh: DeviceMesh, mib: float, units: int, swap: bool) -> float:
    """Seconds of one step's four collectives alone: two all-gathers, a reduce-scatter and an
    all-reduce a unit. ``swap``: an all-to-all and a sum for the reduce-scatter (Gloo's is an
    all-reduce inside)."""
    replicate, shard = mesh.get_group(0), mesh.get_group(1)
    full = torch.zeros(
        int(mib * 2**20) // 4 // units // dist.get_world_size(shard) * dist.get_world_size(shard)
    )
    part = torch.zeros(full.numel() // dist.get_world_size(shard))
    swapped = torch.zeros_like(full)
    dist.barrier()
    start = time.perf_counter()
    for _ in range(units):
        dist.all_gather_into_tensor(full, part, group=shard)
    for _ in range(units):
        dist.all_gather_into_tensor(full, part, group=shard)
        if swap:
            dist.all_to_all_single(swapped, full, group=shard)
            torch.sum(swapped.view(-1, part.numel()), 0, out=part)
        else:
            dist.reduce_scatter_tensor(part, full, group=shard)
        dist.all_reduce(part, group=replicate)
    return time.perf_counter() - start


COLLECTIVES = {"collectives": False, "collectives, all-to-all and sum": True}


def _real(
    rank: int, systems: tuple[str, ...], kind: str, width: int, layers: int, steps: int
) -> tuple[Times, Times, float]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    mib = mebibytes(model(kind, width, layers))
    units = 1 if kind == "small" else layers

    def alone(times: int) -> Times:
        return {
            name: [_collectives(mesh, mib, units, swap) for _ in range(times)]
            for name, swap in COLLECTIVES.items()
        }

    before = alone(WARMUP + steps // 2)
    times, losses = _steps(mesh, systems, kind, width, layers, steps, real=True)
    after = alone(steps - steps // 2)
    times.update({name: before[name][WARMUP:] + after[name] for name in COLLECTIVES})
    return times, losses, mib


def communication(systems: tuple[str, ...], kind: str, steps: int, quick: bool) -> str:
    """A step of one token: nearly all of it is communication. 4 Gloo ranks, 2 replicas x 2
    shards."""
    width, layers = (128, 4) if quick else (512, 8)
    outcomes = run_ranks(_real, 4, systems, kind, width, layers, steps, timeout=1200.0)
    times, losses, mib = outcomes[0]
    for system in systems:  # a fast step that computes something else would be no result
        torch.testing.assert_close(losses[system], losses[systems[0]], rtol=1e-4, atol=1e-6)
    medians = {s: statistics.median(t) for s, t in times.items()}
    best = min((medians[s] for s in systems if s != "ours"), default=float("nan"))
    limit = min(medians[name] for name in COLLECTIVES)
    rows = [
        [s, milliseconds(times[s]), f"{medians[s] / best:.2f}", f"{medians[s] / limit:.2f}"]
        for s in (*COLLECTIVES, *systems)
    ]
    header = [
        "system",
        "forward + backward ms, median [range]",
        "of torch's better one",
        "of the better collectives alone",
    ]
    where = "4 Gloo ranks, 2 replicas x 2 shards"
    title = f"## Communication, {kind}: {mib:.0f} MiB, {where}, {steps} steps"
    return f"{title}\n{table(header, rows)}\n"


def _peak(
    rank: int, system: str, kind: str, width: int, layers: int, steps: int
) -> tuple[list[float], float, float]:
    """MiB that a step takes on top of what lies still between steps; MiB of parameters; bytes that
    ours copies an element."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    net = model(kind, width, layers)
    mib = mebibytes(net)
    wrapped = wrap(system, net, mesh)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01)
    peaks: list[float] = []
    copied = 0.0
    for step in range(WARMUP + steps):
        x = torch.randn(1, 1, wrapped.head.in_features)
        optimizer.zero_grad()
        ctypes.CDLL(None).malloc_trim(
            0
        )  # what the allocator keeps for the next step is no resting state
        before = copied_bytes()
        with Meter() as meter:
            wrapped(x).square().mean().backward()
        copied = (copied_bytes() - before) / (mib * 2**20 / 4)
        optimizer.step()
        if step >= WARMUP:
            peaks.append(meter.mib)
    return peaks, mib, copied


def copied_bytes() -> int:
    from torch_hsdp_ckpt import _C

    return _C._copied_bytes()


def memory(systems: tuple[str, ...], kind: str, steps: int, quick: bool) -> str:
    """Peak of forward and backward above the resting state, gradients included; every system in
    processes of its own."""
    width, layers = (128, 4) if quick else (512, 8)
    rows, mib = [], 0.0
    for system in systems:
        outcomes = run_ranks(_peak, 4, system, kind, width, layers, steps, timeout=600.0)
        worst = [max(peaks) for peaks in zip(*(peaks for peaks, _, _ in outcomes), strict=True)]
        mib = outcomes[0][1]
        copied = f"{outcomes[0][2]:.1f}, counted" if system == "ours" else ""
        rows.append(
            [system, f"{statistics.median(worst):.1f} [{min(worst):.1f}..{max(worst):.1f}]", copied]
        )
    header = [
        "system",
        "MiB above the resting state, worst rank, median [range]",
        "bytes copied an element and step",
    ]
    where = "4 Gloo ranks, 2 replicas x 2 shards"
    title = f"## Memory, {kind}: {mib:.0f} MiB of float32, {where}, {steps} steps"
    return f"{title}\n{table(header, rows)}\n"


SIZES = [1 << k for k in range(12, 21)]  # bytes of one message


def _swap(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    peer, group = (
        1 - dist.get_rank(),
        dist.group.WORLD,
    )  # its own methods: dist.isend's checks would count for the pieces
    works = [group.recv([t], peer, 0) for t in theirs] + [group.send([t], peer, 0) for t in mine]
    for work in works:
        work.wait()


def _ways(rank: int, rounds: int) -> dict[tuple[int, str], list[float]]:
    times: dict[tuple[int, str], list[float]] = defaultdict(list)
    for size in SIZES:
        mine = [torch.ones(size // 4) for _ in range(max(4, (4 << 20) // size))]
        theirs = [torch.zeros_like(t) for t in mine]
        packed = [torch.zeros(size // 4 * len(mine)) for _ in range(2)]
        for step in range(WARMUP + rounds):
            for way in ("in place", "packed"):
                dist.barrier()
                start = time.perf_counter()
                if way == "in place":
                    _swap(mine, theirs)
                else:
                    torch.cat(mine, out=packed[0])
                    _swap(packed[:1], packed[1:])
                    torch._foreach_copy_(theirs, packed[1].split(size // 4))
                if step >= WARMUP:
                    times[size, way].append(time.perf_counter() - start)
    return dict(times)


def in_place(rounds: int) -> str:
    """From which size on a parameter's rows travel alone: what two ranks exchange, piece by piece
    or packed and unpacked."""
    times = run_ranks(_ways, 2, rounds)[0]
    rows = []
    for size in SIZES:
        alone, packed = (statistics.median(times[size, way]) for way in ("in place", "packed"))
        both = [milliseconds(times[size, way]) for way in ("in place", "packed")]
        rows.append([f"{size >> 10}", *both, f"{alone / packed:.2f}"])
    header = [
        "KiB a piece",
        "in place ms, median [range]",
        "packed ms, median [range]",
        "in place / packed",
    ]
    title = f"## In place or packed: 4 MiB between 2 Gloo ranks, {rounds} rounds"
    return f"{title}\n{table(header, rows)}\n"
