"""Durable saves and cold loads: the storage's own limit, DCP with one and two threads, ours, ours
under stock DCP.

4 Gloo ranks, 2 replicas x 2 shards. A save's clock stops when its bytes are durable (all systems
fsync), a load starts from a cold page cache and every tensor is compared afterwards, off the clock.
Rounds are interleaved. The limit writes and reads each byte once: O_DIRECT in 8 MiB requests and
one fsync, plain requests where the file system has no O_DIRECT; the row "pread" reads all that a
rank needs into targets of its own, which no load without an exchange can beat. "ours" is ``save``
and ``load``, "ours under dcp" the writer and the reader in stock ``dcp.save`` and ``dcp.load``. A
second table saves many small tensors."""

import mmap
import os
import shutil
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import run_ranks
from report import file_system, milliseconds, table
from systems import Meter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

RANKS, REPLICAS = 4, 2
SHARDS = RANKS // REPLICAS
REQUEST = 8 << 20
SYSTEMS = ("limit", "pread", "dcp", "dcp, 2 threads", "ours under dcp", "ours")
Readings = dict[tuple[str, str], list[dict[str, Any]]]


def shapes(total: int) -> Iterator[tuple[int, ...]]:
    """fp32 parameters of a transformer of width 1024 with odd-sized embeddings and vectors, until
    ``total`` bytes are full."""
    width = 1024
    matrices = [
        (4 * width, width),
        (width, 4 * width),
        (3 * width, width),
        (width, width),
        (5003, width),
    ]
    vectors = [(width,), (width,), (7,)]
    while True:
        for shape in (*matrices, *vectors):
            if total <= 0:
                return
            yield shape
            total -= 4 * torch.Size(shape).numel()


def make_state(mesh: DeviceMesh, total: int, seed: int | None) -> dict[str, Any]:
    """Of random numbers, or of ones: a target to load into."""
    shard = mesh.get_local_rank(1)
    generator = torch.Generator().manual_seed((seed or 0) + shard)
    state: dict[str, Any] = {"step": torch.tensor(7), "lr": 0.1}
    for i, shape in enumerate(shapes(total)):
        rows = -(-shape[0] // SHARDS)
        mine = max(0, min(rows, shape[0] - shard * rows))
        local = torch.ones(mine, *shape[1:])
        if seed is not None:
            local.uniform_(generator=generator)
        stride = torch.empty(shape, device="meta").stride()
        placements = [Replicate(), Shard(0)]
        whole = torch.Size(shape)
        state[f"layers.{i}"] = DTensor.from_local(
            local, mesh, placements, run_check=False, shape=whole, stride=stride
        )
    return state


def tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value.to_local() for name, value in state.items() if isinstance(value, DTensor)}


def open_raw(path: Path, flags: int) -> int:
    """O_DIRECT where the file system has it."""
    try:
        return os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError:
        return os.open(path, flags, 0o644)


def raw_save(path: Path, share: int) -> None:
    buffer = mmap.mmap(-1, REQUEST)  # page-aligned, as O_DIRECT wants it
    buffer.write(os.urandom(REQUEST))
    fd = open_raw(path / f"raw{dist.get_rank()}", os.O_WRONLY | os.O_CREAT)
    os.posix_fallocate(fd, 0, share)
    for offset in range(0, share, REQUEST):
        os.pwrite(fd, buffer, offset)
    os.fsync(fd)
    os.close(fd)


def raw_load(path: Path, share: int) -> None:
    buffer = mmap.mmap(-1, REQUEST)
    fd = open_raw(path / f"raw{dist.get_rank()}", os.O_RDONLY)
    for offset in range(0, share, REQUEST):
        os.preadv(fd, [buffer], offset)
    os.close(fd)


def pread_load(path: Path, share: int, targets: list[memoryview]) -> None:
    own = range(
        dist.get_rank() % SHARDS, RANKS, SHARDS
    )  # the files that together are this rank's shard
    for rank, target in zip(own, targets, strict=True):
        with open(path / f"raw{rank}", "rb", buffering=0) as f:
            for offset in range(0, share, REQUEST):
                os.preadv(f.fileno(), [target[offset : offset + REQUEST]], offset)


def save(system: str, state: dict[str, Any], path: Path) -> None:
    if system.startswith("ours"):
        import torch_hsdp_ckpt

        if system == "ours":
            torch_hsdp_ckpt.save(state, checkpoint_id=str(path))
            return
        dcp.save(state, storage_writer=torch_hsdp_ckpt.FileSystemWriter(str(path)))
    else:
        dcp.save(
            state, storage_writer=dcp.FileSystemWriter(path, thread_count=2 if "2" in system else 1)
        )


def load(system: str, state: dict[str, Any], path: Path) -> None:
    if system.startswith("ours"):
        import torch_hsdp_ckpt

        if system == "ours":
            torch_hsdp_ckpt.load(state, checkpoint_id=str(path))
        else:
            dcp.load(state, storage_reader=torch_hsdp_ckpt.FileSystemReader(str(path)))
    else:
        dcp.load(state, storage_reader=dcp.FileSystemReader(path))


def cool(path: Path) -> None:
    """Drops ``path``'s files from the page cache; root drops all of it. Every rank waits."""
    if dist.get_rank() == 0:
        os.sync()
        for file in path.iterdir():
            fd = os.open(file, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
        if os.geteuid() == 0 and os.access("/proc/sys/vm/drop_caches", os.W_OK):
            Path("/proc/sys/vm/drop_caches").write_text("3", encoding="utf-8")
    dist.barrier()


def on_disk(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


def _measure(
    rank: int, directory: str, total: int, rounds: int, systems: tuple[str, ...]
) -> tuple[int, Readings]:
    mesh = init_device_mesh("cpu", (REPLICAS, SHARDS), mesh_dim_names=("replicate", "shard"))
    state = make_state(mesh, total, seed=1)
    held = sum(t.nbytes for t in tensors(state).values())
    share = held // REPLICAS // REQUEST * REQUEST
    readings: Readings = defaultdict(list)
    for _ in range(rounds):
        for system in systems:
            path = Path(directory) / system.replace(", ", "-").replace(" ", "-")
            if rank == 0:
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir(parents=True)
            dist.barrier()
            cool(path)
            raw = system in ("limit", "pread")
            with Meter() as meter:
                raw_save(path, share) if raw else save(system, state, path)
            if system != "pread":
                written = on_disk(path) / (held * SHARDS)
                readings[system, "save"].append(
                    meter.reading() | {"bytes": 1.0 if raw else written}
                )
            cool(path)
            target = {} if raw else make_state(mesh, total, seed=None)
            targets = [
                memoryview(bytearray(share)) for _ in range(REPLICAS if system == "pread" else 0)
            ]
            with Meter() as meter:
                if system == "limit":
                    raw_load(path, share)
                elif system == "pread":
                    pread_load(path, share, targets)
                else:
                    load(system, target, path)
            readings[system, "load"].append(meter.reading() | {"bytes": 0.0})
            for name, tensor in tensors(target).items():
                assert torch.equal(tensor, tensors(state)[name]), f"{system} loaded {name} wrong"
            del target, targets
            dist.barrier()
            if rank == 0:
                shutil.rmtree(path)
            dist.barrier()
    return held, dict(readings)


def measure(directory: Path, total: int, rounds: int, systems: tuple[str, ...]) -> str:
    """A Markdown section: saves and loads of ``total`` bytes of state below ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    outcomes = run_ranks(_measure, RANKS, str(directory), total, rounds, systems, timeout=1800.0)
    gib = sum(held for held, _ in outcomes) / REPLICAS / 2**30
    ranks: list[Readings] = [readings for _, readings in outcomes]
    rows = []
    for kind in ("save", "load"):
        medians = {
            s: statistics.median(r["seconds"] for r in ranks[0][s, kind])
            for s in systems
            if (s, kind) in ranks[0]
        }
        for system, median in medians.items():
            mine = [readings[system, kind] for readings in ranks]
            cpu = (
                statistics.median(sum(r["cpu"] for r in one) for one in zip(*mine, strict=True))
                / gib
            )
            mib = max(r["mib"] for one in mine for r in one)
            relative = f"{medians['limit'] / median:.2f}" if "limit" in medians else "-"
            times = milliseconds([r["seconds"] for r in mine[0]])
            size = f"{mine[0][0]['bytes']:.4f}" if kind == "save" else ""
            rows.append(
                [
                    kind,
                    system,
                    times,
                    f"{gib / median:.2f}",
                    relative,
                    f"{cpu:.2f}",
                    f"{mib:.0f}",
                    size,
                ]
            )
    header = [
        "",
        "system",
        "ms, median [range]",
        "GiB/s",
        "of the limit's speed",
        "CPU s/GiB, all",
        "extra MiB, worst rank",
    ]
    header.append("on disk / state")
    cold = "all caches dropped" if os.geteuid() == 0 else "the files' pages dropped"
    mesh = f"{RANKS} ranks = {REPLICAS} replicas x {SHARDS} shards"
    title = f"## {gib:.2f} GiB, {mesh}, {file_system(directory)}, {rounds} rounds, {cold}"
    return f"{title}\n{table(header, rows)}\n"


def _small(
    rank: int, directory: str, count: int, rounds: int, systems: tuple[str, ...]
) -> dict[str, list[dict[str, Any]]]:
    mesh = init_device_mesh("cpu", (REPLICAS, SHARDS), mesh_dim_names=("replicate", "shard"))
    whole, placements = torch.Size((1024,)), [Replicate(), Shard(0)]
    state: dict[str, Any] = {}
    for i in range(count):
        local = torch.rand(1024 // SHARDS)
        state[f"layers.{i}"] = DTensor.from_local(
            local, mesh, placements, run_check=False, shape=whole, stride=(1,)
        )
    readings: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for _ in range(rounds):
        for system in systems:
            path = Path(directory) / "small"
            if rank == 0:
                path.mkdir(parents=True)
            dist.barrier()
            with Meter() as meter:
                save(system, state, path)
            readings[system].append(meter.reading() | {"bytes": on_disk(path)})
            dist.barrier()
            if rank == 0:
                shutil.rmtree(path)
            dist.barrier()
    return dict(readings)


def measure_small(directory: Path, count: int, rounds: int, systems: tuple[str, ...]) -> str:
    """A Markdown section: saves of ``count`` tensors of 4 KiB, each in shards of 2 KiB."""
    systems = tuple(system for system in systems if system not in ("limit", "pread"))
    readings = run_ranks(_small, RANKS, str(directory), count, rounds, systems, timeout=1800.0)[0]
    rows = []
    for system, mine in readings.items():
        size = mine[0]["bytes"]
        rows.append(
            [
                system,
                milliseconds([r["seconds"] for r in mine]),
                f"{size / 2**20:.1f}",
                f"{size / (count * 4096):.2f}",
            ]
        )
    header = ["system", "ms, median [range]", "MiB on disk", "on disk / state"]
    title = f"## Saves of {count} tensors of 4 KiB, {file_system(directory)}, {rounds} rounds"
    return f"{title}\n{table(header, rows)}\n"
