"""A SIMULATION of many hosts on one shared store: its total bandwidth is fixed, whoever reads, and
ranks stand for hosts.

shared_store.cpp slows the system calls of torch's reader and of ours down alike. Replicas exchange
over Gloo, as between hosts. DCP reads the state once a replica, an exchange once in all: with R
replicas the store is busy 1/R of the time."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "test"), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402
from ranks import run_ranks  # noqa: E402
from report import milliseconds, table  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import DTensor, Replicate, Shard  # noqa: E402

import torch_hsdp_ckpt  # noqa: E402

BANDWIDTH = 48 << 20
SYSTEMS = ("dcp", "ours, no exchange", "ours")


def _state(mesh: Any, total: int, value: float) -> dict[str, Any]:
    rows = total // 4096 // 12
    return {
        f"layers.{i}": DTensor.from_local(
            torch.full((rows, 1024), value + i), mesh, [Replicate(), Shard(0)], run_check=False
        )
        for i in range(12)
    }


def _loads(
    rank: int, directory: str, total: int, rounds: int, systems: list[str]
) -> dict[str, list[float]]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1))
    saved = _state(mesh, total, 1.0)
    dcp.save(saved, storage_writer=dcp.FileSystemWriter(f"{directory}/dcp"))
    torch_hsdp_ckpt.save(saved, checkpoint_id=f"{directory}/ours")
    seconds: dict[str, list[float]] = {system: [] for system in systems}
    for _ in range(rounds):
        for system in systems:
            state = _state(mesh, total, -1.0)
            dist.barrier()
            start = time.perf_counter()
            if system == "dcp":
                dcp.load(state, storage_reader=dcp.FileSystemReader(f"{directory}/dcp"))
            else:
                mode: Any = "network" if system == "ours" else "off"
                torch_hsdp_ckpt.load(state, checkpoint_id=f"{directory}/ours", exchange=mode)
            dist.barrier()
            seconds[system].append(time.perf_counter() - start)
            assert all(torch.equal(state[k].to_local(), v.to_local()) for k, v in saved.items()), (
                system
            )
    return seconds


def measure(quick: bool, systems: tuple[str, ...]) -> str:
    """A Markdown table; runs itself in processes whose reads are slowed down."""
    shims = sorted(ROOT.glob("build/*/test/libshared_store.so"), key=os.path.getmtime)
    if not shims:
        raise SystemExit("libshared_store.so is not built: build with HSDP_CKPT_TESTS=1 first")
    total, rounds = (12 << 20, 1) if quick else (48 << 20, 3)
    rows = []
    for replicas in (2, 4, 8):
        with tempfile.TemporaryDirectory() as scratch:
            Path(scratch, "clock").write_bytes(bytes(4096))
            Path(scratch, "store").mkdir()
            environment = os.environ | {
                "LD_PRELOAD": str(shims[-1]),
                "STORE_DIRECTORY": f"{scratch}/store/",
                "STORE_CLOCK": f"{scratch}/clock",
                "STORE_BYTES_PER_SECOND": str(BANDWIDTH),
            }
            command = [
                sys.executable,
                __file__,
                str(replicas),
                f"{scratch}/store",
                str(total),
                str(rounds),
                *systems,
            ]
            output = subprocess.run(
                command, check=True, text=True, stdout=subprocess.PIPE, env=environment
            ).stdout
        seconds: dict[str, list[float]] = json.loads(output.splitlines()[-1])
        base = statistics.median(seconds[systems[0]])
        for system in systems:
            times = f"{base / statistics.median(seconds[system]):.2f}"
            rows.append([str(replicas), system, milliseconds(seconds[system]), times])
    header = ["replicas", "", "ms, median [range]", f"times as fast as {systems[0]}"]
    title = (
        f"## SIMULATION: a store of {BANDWIDTH >> 20} MiB/s in all, a state of {total >> 20} MiB "
        "on every replica, each a "
        f"process of this machine, {rounds} rounds"
    )
    once = f"{total / BANDWIDTH:.2f} s"
    limit = f"Reading the state once takes {once} there, once a replica R times as long."
    return f"{title}\n{limit}\n\n{table(header, rows)}\n"


if __name__ == "__main__":
    replicas, directory, total, rounds = (
        int(sys.argv[1]),
        sys.argv[2],
        int(sys.argv[3]),
        int(sys.argv[4]),
    )
    print(
        json.dumps(
            run_ranks(_loads, replicas, directory, total, rounds, sys.argv[5:], timeout=600.0)[0]
        )
    )
