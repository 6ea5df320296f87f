"""What planning a save costs as the job grows: this rank's part before its first byte, and the
coordinator's whole metadata.

One process stands for one rank of ``replicas * shards`` (torch's fake process group); the state is
DTensors of 8 x 64 elements a shard. All that a rank does between the call and its first byte is
timed, the one small all-gather excepted."""

import os
import tempfile
import time

import torch
import torch.distributed as dist
from report import milliseconds, table
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from torch_hsdp_ckpt import _C
from torch_hsdp_ckpt.checkpoint.save.division import Division
from torch_hsdp_ckpt.checkpoint.save.local_state import LocalState
from torch_hsdp_ckpt.checkpoint.save.static_plan import make_static_plan
from torch_hsdp_ckpt.common.agreement import _SLOT

REPLICAS, TENSORS = 8, 1000


def _row(shards: int, rounds: int) -> list[str]:
    replicas, tensors = REPLICAS, TENSORS
    world = replicas * shards
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    mesh = init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replicate", "shard"))
    shape = torch.Size((shards * 8, 64))
    state = {
        f"layers.{i}.weight": DTensor.from_local(
            torch.empty(8, 64),
            mesh,
            [Replicate(), Shard(0)],
            run_check=False,
            shape=shape,
            stride=(64, 1),
        )
        for i in range(tensors)
    }
    before, whole, writing = [], [], []
    for _ in range(rounds):
        start = time.perf_counter()
        planner = DefaultSavePlanner()
        planner.set_up_planner({"model": state}, is_coordinator=True)
        local = LocalState(planner)
        local.holdings(range(world))
        static = make_static_plan(local, Division.alike(0, world), range(world))
        static.plan.layout(static.chunks, [], True)
        before.append(time.perf_counter() - start)
        start = time.perf_counter()
        assert local.paths is not None
        paths = static.plan.paths([], (local.paths[name] for name in static.names))
        assert paths is not None
        writers = [_C.SaveWriter(_C.ProcessIdentity(1, 2, rank, 4), []) for rank in range(world)]
        built = static.plan.complete_metadata(Metadata({}), paths, writers, 1, True)
        whole.append(time.perf_counter() - start)
        with tempfile.NamedTemporaryFile(dir=".") as file:
            start = time.perf_counter()
            file.write(built.encoded)
            file.flush()
            os.fsync(file.fileno())
            writing.append(time.perf_counter() - start)
    dist.destroy_process_group()
    times = [milliseconds(each) for each in (before, whole, writing)]
    return [f"{world} ({replicas} x {shards})", *times, f"{len(built.encoded) / 2**20:.0f}"]


def measure(quick: bool) -> str:
    """A Markdown section: 1,024 and 16,384 ranks."""
    rounds = 3 if quick else 5
    rows = [_row(shards, rounds) for shards in ((16,) if quick else (128, 2048))]
    header = [
        "ranks",
        "a rank, before its first byte",
        "the coordinator's metadata",
        "written and synced",
        "MiB",
    ]
    checksum = _C._build_info()["crc32"]
    what = f"{TENSORS} tensors, {REPLICAS} replicas, {rounds} rounds"
    title = f"## {what}; ms, median [range]; CRC-32 by {checksum}"
    told = (
        "What a rank tells the others before its first byte, in one all-gather: "
        f"{_SLOT.size} bytes."
    )
    return f"{title}\n{table(header, rows)}\n\n{told}\n"
