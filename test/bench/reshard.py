"""Cold loads on another mesh than the one that saved: 2 replicas x 2 shards, onto 1 x 4, two ranks
and one process.

Each system loads the files that it saved itself, every tensor is compared afterwards, off the
clock. Rounds are interleaved. "Read" is what the loading ranks' system calls read from files, over
what their targets hold."""

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import checkpoint
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import run_ranks
from report import file_system, milliseconds, table
from systems import Meter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import torch_hsdp_ckpt

SYSTEMS = ("dcp", "ours under dcp", "ours")
TARGETS = {4: "1 x 4", 2: "2 ranks", 1: "1 process"}


def _values(index: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The same on every rank of every world."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).add_(index).reshape(shape)


def _save(rank: int, directory: str, total: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    state = {
        f"layers.{i}": distribute_tensor(
            _values(i, shape), mesh, [Replicate(), Shard(0)], src_data_rank=None
        )
        for i, shape in enumerate(checkpoint.shapes(total))
    }
    dcp.save(state, storage_writer=dcp.FileSystemWriter(f"{directory}/dcp"))
    torch_hsdp_ckpt.save(state, checkpoint_id=f"{directory}/ours")


def _read_so_far() -> int:
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def _load(
    rank: int, directory: str, total: int, rounds: int, systems: tuple[str, ...]
) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shapes = list(checkpoint.shapes(total))
    state = {
        f"layers.{i}": distribute_tensor(torch.zeros(shape), mesh, [Shard(0)], src_data_rank=None)
        for i, shape in enumerate(shapes)
    }
    need = sum(tensor.to_local().nbytes for tensor in state.values())
    readings = defaultdict(list)
    for _ in range(rounds):
        for system in systems:
            path = Path(directory) / ("dcp" if system == "dcp" else "ours")
            checkpoint.cool(path)
            before = _read_so_far()
            with Meter() as meter:
                checkpoint.load(system, state, path)
            readings[system].append(meter.reading() | {"read": _read_so_far() - before})
            for i, tensor in enumerate(state.values()):
                assert isinstance(tensor, DTensor)
                expected = distribute_tensor(
                    _values(i, shapes[i]), mesh, [Shard(0)], src_data_rank=None
                )
                assert torch.equal(tensor.to_local(), expected.to_local()), (
                    f"{system} loaded layers.{i} wrong"
                )
                tensor.to_local().zero_()
            dist.barrier()
    return need, readings


def measure(directory: Path, total: int, rounds: int, systems: tuple[str, ...]) -> str:
    """A Markdown table: every system, every mesh."""
    run_ranks(_save, 4, str(directory), total, timeout=600.0)
    rows = []
    for ranks, name in TARGETS.items():
        results = run_ranks(_load, ranks, str(directory), total, rounds, systems, timeout=600.0)
        need = sum(need for need, _ in results)
        base = statistics.median(r["seconds"] for r in results[0][1][systems[0]])
        for system in systems:
            seconds = [r["seconds"] for r in results[0][1][system]]
            cpu = statistics.median(
                sum(one[system][i]["cpu"] for _, one in results) for i in range(rounds)
            )
            read = statistics.median(
                sum(one[system][i]["read"] for _, one in results) for i in range(rounds)
            )
            times = f"{base / statistics.median(seconds):.2f}"
            rows.append(
                [
                    name,
                    system,
                    milliseconds(seconds),
                    times,
                    f"{cpu * 2**30 / need:.2f}",
                    f"{read / need:.3f}",
                ]
            )
    header = [
        "onto",
        "",
        "ms, median [range]",
        f"times as fast as {systems[0]}",
        "CPU s per GiB",
        "bytes read / needed",
    ]
    what = f"{total / 2**30:.2f} GiB saved by 2 x 2"
    title = f"## {what}, {file_system(directory)}, {rounds} rounds, cold"
    return f"{title}\n{table(header, rows)}\n"
