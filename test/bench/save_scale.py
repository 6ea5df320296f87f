"""What planning a save costs as the job grows: this rank's part before its first byte, and the coordinator's whole metadata.

usage: python test/bench/save_scale.py [--replicas 8] [--tensors 1000] [--shards 128 2048]

One process stands for one rank of ``replicas * shards`` (torch's fake process group); the state is DTensors of 8 x 64 elements
a shard. All that a rank does between the call and its first byte is timed, the one small all-gather excepted.
"""

import argparse
import os
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from torch_hsdp_ckpt import _C
from torch_hsdp_ckpt._plan import LocalState, make_static_plan

ROUNDS = 5


def measure(replicas: int, shards: int, tensors: int) -> str:
    world = replicas * shards
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    mesh = init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replicate", "shard"))
    shape = torch.Size((shards * 8, 64))
    state = {
        f"layers.{i}.weight": DTensor.from_local(
            torch.empty(8, 64), mesh, [Replicate(), Shard(0)], run_check=False, shape=shape, stride=(64, 1)
        )
        for i in range(tensors)
    }
    before, whole, writing = [], [], []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        planner = DefaultSavePlanner()
        planner.set_up_planner({"model": state}, is_coordinator=True)
        local = LocalState(planner)
        local.digests()
        static = make_static_plan(local, 0, range(world), True, True, True)
        static.plan.layout(static.pieces, [], True)
        before.append(time.perf_counter() - start)
        start = time.perf_counter()
        static.skeleton.planner_data = local.paths_of(static.names)
        writers = [((1, 2, rank, 4), []) for rank in range(world)]
        built = static.plan.complete_metadata(static.skeleton, writers, 1, True, True)
        assert built is not None
        assert isinstance(built[0], bytes)
        whole.append(time.perf_counter() - start)
        with tempfile.NamedTemporaryFile(dir=".") as file:
            start = time.perf_counter()
            file.write(built[0])
            file.flush()
            os.fsync(file.fileno())
            writing.append(time.perf_counter() - start)
    dist.destroy_process_group()
    return (
        f"| {world} ({replicas} x {shards}) | {tensors} | {statistics.median(before):.3f} | {statistics.median(whole):.2f} | "
        f"{statistics.median(writing):.2f} | {len(built[0]) / 2**20:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--tensors", type=int, default=1000)
    parser.add_argument("--shards", type=int, nargs="+", default=[128, 2048])
    args = parser.parse_args()
    print(f"crc32 by {_C._build_info()['crc32']}; medians of {ROUNDS}, seconds")
    print("| ranks | tensors | a rank, before the first byte | the coordinator's metadata | written, synced | MiB |")
    print("|---|---|---|---|---|---|")
    for shards in args.shards:
        print(measure(args.replicas, shards, args.tensors), flush=True)


if __name__ == "__main__":
    main()
