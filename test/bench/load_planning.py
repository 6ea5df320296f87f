"""Loads that are all planning: very many small tensors, and one rank's part of a very large job's
metadata."""

import pickle
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import run_ranks
from report import milliseconds, table
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import torch_hsdp_ckpt
from torch_hsdp_ckpt import _C
from torch_hsdp_ckpt.checkpoint.load.state_reads import reads_of_state
from torch_hsdp_ckpt.checkpoint.storage.metadata import encode_metadata


def _timed(work: Callable[[], Any], rounds: int) -> list[float]:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return seconds


def _small(rank: int, count: int, rounds: int) -> dict[str, list[float]]:
    state = {f"layers.{i}.bias": torch.full((16,), float(i)) for i in range(count)}
    with tempfile.TemporaryDirectory() as scratch:
        dcp.save(state, storage_writer=dcp.FileSystemWriter(f"{scratch}/dcp"))
        dcp.save(state, storage_writer=torch_hsdp_ckpt.FileSystemWriter(f"{scratch}/ours"))
        target = {name: torch.zeros(16) for name in state}

        def check(work: Callable[[], None]) -> list[float]:
            seconds = _timed(work, rounds)
            assert all(torch.equal(target[name], tensor) for name, tensor in state.items())
            for tensor in target.values():
                tensor.zero_()
            return seconds

        stock = dcp.FileSystemReader(f"{scratch}/dcp")
        ours = torch_hsdp_ckpt.FileSystemReader(f"{scratch}/ours")
        return {
            "dcp": check(lambda: dcp.load(target, storage_reader=stock)),
            "ours under dcp.load": check(lambda: dcp.load(target, storage_reader=ours)),
            "ours": check(lambda: torch_hsdp_ckpt.load(target, checkpoint_id=f"{scratch}/ours")),
        }


def _big_metadata(ranks: int, tensors: int) -> Metadata:
    properties = TensorProperties(dtype=torch.bfloat16)
    entries: dict[str, Any] = {}
    storage: dict[MetadataIndex, Any] = {}
    for t in range(tensors):
        name = f"model.layers.{t}.weight"
        chunks = [
            ChunkStorageMetadata(torch.Size([8 * r, 0]), torch.Size([8, 64])) for r in range(ranks)
        ]
        entries[name] = TensorStorageMetadata(properties, torch.Size([8 * ranks, 64]), chunks)
        for r, chunk in enumerate(chunks):
            storage[MetadataIndex(name, chunk.offsets, r)] = _StorageInfo(
                f"__{r}_0.distcp", 2048 * t, 2048
            )
    return Metadata(entries, {name: (name,) for name in entries}, storage)


def _plan(rank: int, ranks: int, tensors: int, rounds: int) -> dict[str, list[float]]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=ranks // 2, world_size=ranks)
    metadata = _big_metadata(ranks, tensors)
    stock_file, our_file = pickle.dumps(metadata), encode_metadata(metadata)
    names = list(metadata.state_dict_metadata)
    del metadata
    mesh = init_device_mesh("cpu", (ranks,))
    state = {
        name: DTensor.from_local(
            torch.zeros(8, 64, dtype=torch.bfloat16), mesh, [Shard(0)], run_check=False
        )
        for name in names
    }

    def stock() -> None:
        planner = dcp.DefaultLoadPlanner()
        planner.set_up_planner(state, pickle.loads(stock_file), False)
        assert len(planner.create_local_plan().items) == tensors

    def ours() -> None:
        native = _C.LoadPlanner(our_file, "bench")
        reads = reads_of_state(state, dcp.DefaultLoadPlanner(), native, False)
        assert len(reads.sharded) == tensors

    return {"dcp": _timed(stock, rounds), "ours": _timed(ours, rounds)}


def _rows(readings: dict[str, list[float]]) -> list[list[str]]:
    base = statistics.median(readings["dcp"])
    return [
        [name, milliseconds(seconds), f"{base / statistics.median(seconds):.1f}"]
        for name, seconds in readings.items()
    ]


def measure(quick: bool) -> str:
    """Markdown tables of both."""
    count, (ranks, tensors), rounds = (
        (5_000, (128, 100), 2) if quick else (100_000, (1024, 1000), 3)
    )
    header = ["", "ms, median [range]", "times as fast as DCP"]
    (small,) = run_ranks(_small, 1, count, rounds, timeout=1800.0)
    (plan,) = run_ranks(_plan, 1, ranks, tensors, rounds, timeout=1800.0)
    return (
        f"## {count} tensors of 64 bytes, one rank, page cache, "
        f"checked\n{table(header, _rows(small))}\n\n"
        f"## Planning one rank's load, metadata of {ranks} ranks x {tensors} "
        f"tensors\n{table(header, _rows(plan))}\n"
    )
