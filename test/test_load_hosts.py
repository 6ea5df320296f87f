"""``load`` across hosts, by fewer replicas than saved, and with parts of the checkpoint gone."""

import logging
import os
import pickle
import resource
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from device import DEVICE
from ranks import run_ranks
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt.checkpoint.load import exchange as _exchange
from torch_hsdp_ckpt.checkpoint.load import ranks as _ranks

HYBRID = [Replicate(), Shard(0)]


def _on_host(name: str) -> None:
    """This process takes itself to be on a host of that name, as the engine asks: once, by
    gethostname()."""
    socket.gethostname = lambda: name
    _ranks.host_identity.cache_clear()


def _exchanges_seen() -> list[str]:
    """The kinds of exchange that this process goes on to run."""
    kinds: list[str] = []
    for kind in (_exchange._Network, _exchange._Shared):

        def run(self: Any, plan: Any, run: Any = kind.run) -> None:
            kinds.append(type(self).__name__)
            run(self, plan)

        kind.run = run  # type: ignore[method-assign]
    return kinds


class _Counted(h.FileSystemReader):
    """A reader that counts how often it reads .metadata."""

    reads = 0

    def read_metadata_file(self, rank: int | None = None) -> bytes:
        self.reads += 1
        return super().read_metadata_file(rank)


def _two_hosts(rank: int, path: str) -> tuple[list[int], list[str]]:
    """2 replicas x 2 shards, a replica on each host."""
    _on_host(f"host{rank // 2}")
    kinds = _exchanges_seen()
    mesh = init_device_mesh(DEVICE, (2, 2))
    full = torch.arange(1_200_000.0).reshape(-1, 1000)
    dcp.save(
        {"w": distribute_tensor(full, mesh, HYBRID)},
        storage_writer=h.FileSystemWriter(f"{path}/one"),
    )
    dcp.save(
        {"w": distribute_tensor(-full, mesh, HYBRID)},
        storage_writer=h.FileSystemWriter(f"{path}/two"),
    )
    reads = []
    for mode in ("network", "shared", "off"):
        reader = _Counted(f"{path}/one")
        state = {"w": distribute_tensor(torch.zeros_like(full), mesh, HYBRID)}
        h.load(state, storage_reader=reader, exchange=mode)  # type: ignore[arg-type]
        assert torch.equal(state["w"].full_tensor(), full)
        reads.append(reader.reads)
    # Hosts whose directories of one name are different ones: no rank takes parts of both.
    state = {"w": distribute_tensor(torch.zeros_like(full), mesh, HYBRID)}
    with pytest.raises(h.CheckpointError, match="hosts read different files"):
        h.load(state, checkpoint_id=f"{path}/{'one' if rank < 2 else 'two'}")
    assert not state["w"].to_local().any()
    return reads, kinds


def test_hosts_read_metadata_once_and_exchange_between_replicas(tmp_path: Path) -> None:
    results = run_ranks(_two_hosts, 4, str(tmp_path))
    for load in range(3):
        reads = [result[0][load] for result in results]
        assert sorted(reads[:2]) == sorted(reads[2:]) == [0, 1]
    # A shard's replicas are on two hosts: forced to shared memory they have nobody to share with.
    assert all(kinds == ["_Network"] for _, kinds in results)


def _shards_on_a_host(rank: int, path: str) -> list[str]:
    """4 replicas on two hosts."""
    _on_host(f"host{rank // 2}")
    kinds = _exchanges_seen()
    mesh = init_device_mesh(DEVICE, (4, 1))
    full = torch.arange(1_200_000.0).reshape(-1, 1000)
    dcp.save({"w": distribute_tensor(full, mesh, HYBRID)}, storage_writer=h.FileSystemWriter(path))
    for mode in ("shared", "network"):
        state = {"w": distribute_tensor(torch.zeros_like(full), mesh, HYBRID)}
        h.load(state, checkpoint_id=path, exchange=mode)  # type: ignore[arg-type]
        assert torch.equal(state["w"].to_local(), full)
    return kinds


def test_replicas_of_a_host_share_memory_when_asked_to(tmp_path: Path) -> None:
    assert all(
        kinds == ["_Shared", "_Network"] for kinds in run_ranks(_shards_on_a_host, 4, str(tmp_path))
    )


def _no_shared_memory(rank: int, path: str) -> list[str]:
    """Rank 0 gets none from the system: no file of it may be larger than a megabyte, nor may one in
    memory."""
    kinds = _exchanges_seen()
    lines: list[str] = []
    logging.getLogger("torch_hsdp_ckpt.checkpoint.load.exchange").addFilter(
        lambda record: lines.append(record.getMessage()) is None
    )
    _exchange._C.is_in_memory = lambda path: False  # wherever the tests' directory is
    if rank == 0:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (1 << 20, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        )
    state = {"w": torch.zeros(1200, 1000)}
    h.load(state, checkpoint_id=path)
    assert (state["w"] == 1).all()
    assert any("they exchange over Gloo" in line for line in lines), lines
    assert rank != 0 or any(
        "no memory shared with other ranks: [Errno 27]" in line for line in lines
    ), lines
    with pytest.raises(h.CheckpointError, match="can't share memory; use 'network' or 'off'"):
        h.load(state, checkpoint_id=path, exchange="shared")
    return kinds


def test_without_shared_memory_they_exchange_over_gloo_and_say_so(tmp_path: Path) -> None:
    h.save({"w": torch.ones(1200, 1000)}, checkpoint_id=tmp_path, no_dist=True)
    assert run_ranks(_no_shared_memory, 2, str(tmp_path)) == 2 * [["_Network"]]


def _made_of_metadata(rank: int, path: str) -> None:
    """Up to torch 2.11 dcp.load says no more than that there is no metadata, and the reader's log
    the rest."""
    with pytest.raises(
        CheckpointException, match=r"w: expected records of 4398046511104 bytes|metadata is None"
    ):
        _load_state_dict({}, h.FileSystemReader(path), planner=_EmptyStateDictLoadPlanner())


def test_sizes_that_files_do_not_explain_under_stock_load_on_several_ranks(tmp_path: Path) -> None:
    h.save({"w": torch.ones(3000)}, checkpoint_id=tmp_path, no_dist=True)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    metadata.state_dict_metadata["w"].size = torch.Size([1 << 40])
    metadata.state_dict_metadata["w"].chunks[0].sizes = torch.Size([1 << 40])
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    run_ranks(_made_of_metadata, 2, str(tmp_path))


def _save_hybrid(rank: int, path: str) -> None:
    mesh = init_device_mesh(DEVICE, (2, 2))
    state = {
        f"w{i}": distribute_tensor(torch.arange(4000.0).reshape(8, 500) + i, mesh, HYBRID)
        for i in range(8)
    }
    dcp.save(state, storage_writer=h.FileSystemWriter(path))


def _fewer(rank: int, path: str) -> None:
    """One replica where two have saved, and a mesh in which not every rank takes part."""
    wanted = {f"w{i}": torch.arange(4000.0).reshape(8, 500) + i for i in range(8)}
    whole = dist.get_world_size()
    for ranks in (list(range(whole)), list(range(whole - 1))):
        mesh = DeviceMesh(DEVICE, ranks)
        state = {k: distribute_tensor(torch.zeros(8, 500), mesh, [Shard(0)]) for k in wanted}
        h.load(state, checkpoint_id=path)
        if mesh.get_coordinate() is not None:
            assert all(torch.equal(state[k].full_tensor(), v) for k, v in wanted.items())


def _lost_file(rank: int, path: str) -> None:
    """A data file is lost: both ranks are told. What the other files hold is loaded as ever."""
    with open(f"{path}/.metadata", "rb") as file:
        metadata = pickle.load(file)
    needed = {
        i.fqn
        for i, info in metadata.storage_data.items()
        if not os.path.exists(f"{path}/{info.relative_path}")
    }
    mesh = init_device_mesh(DEVICE, (2,))
    names = set(metadata.state_dict_metadata)
    assert needed and needed < names
    state = {
        k: distribute_tensor(torch.zeros(8, 500), mesh, [Shard(0)]) for k in sorted(names - needed)
    }
    h.load(state, checkpoint_id=path)
    for k, v in state.items():
        assert torch.equal(v.full_tensor(), torch.arange(4000.0).reshape(8, 500) + int(k[1:]))
    state = {k: distribute_tensor(torch.zeros(8, 500), mesh, [Shard(0)]) for k in sorted(names)}
    with pytest.raises(FileNotFoundError, match=r"the file of w\d.*rank \d.*distcp"):
        h.load(state, checkpoint_id=path)


def _lost_chunk(rank: int, path: str) -> None:
    """.metadata no longer lists the second half of w3, which only rank 1 needs."""
    mesh = init_device_mesh(DEVICE, (2,))
    state: dict[str, DTensor] = {
        f"w{i}": distribute_tensor(torch.zeros(8, 500), mesh, [Shard(0)])  # type: ignore[misc]
        for i in range(8)
    }
    with pytest.raises(h.CorruptCheckpointError, match=r"rank \d.*w3"):
        h.load(state, checkpoint_id=path)
    assert not any(v.to_local().any() for v in state.values())
    del state["w3"]
    h.load(state, checkpoint_id=path)
    assert all(
        torch.equal(v.full_tensor(), torch.arange(4000.0).reshape(8, 500) + int(k[1:]))
        for k, v in state.items()
    )


def test_missing_replicas_files_and_chunks(tmp_path: Path) -> None:
    path = tmp_path / "c"
    run_ranks(_save_hybrid, 4, str(path))
    for ranks in (2, 3):
        run_ranks(_fewer, ranks, str(path))
    metadata = pickle.loads((path / ".metadata").read_bytes())
    whole = (path / ".metadata").read_bytes()
    (index,) = [i for i in metadata.storage_data if i.fqn == "w3" and i.offset[0] == 4]
    chunks = metadata.state_dict_metadata["w3"].chunks
    chunks[:] = [c for c in chunks if c.offsets[0] != 4]
    del metadata.storage_data[index]
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    run_ranks(_lost_chunk, 2, str(path))
    (path / ".metadata").write_bytes(whole)
    next(iter(sorted(path.glob("__*.distcp")))).unlink()
    run_ranks(_lost_file, 2, str(path))


WIDE = {f"layers.{i}": (4000 + i, 1000) for i in range(4)}


def _save_wide(rank: int, path: str) -> None:
    mesh = init_device_mesh(DEVICE, (2, 2))
    state = {k: distribute_tensor(torch.full(v, 3.0), mesh, HYBRID) for k, v in WIDE.items()}
    dcp.save(state, storage_writer=h.FileSystemWriter(path))


def _bytes_read(rank: int, path: str) -> tuple[int, int]:
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    state = {k: distribute_tensor(torch.zeros(v), mesh, [Shard(0)]) for k, v in WIDE.items()}

    def count() -> int:
        return next(
            int(line.split()[1])
            for line in Path("/proc/self/io").read_text().splitlines()
            if line.startswith("rchar")
        )

    dist.barrier()
    before = count()
    h.load(state, checkpoint_id=path)
    read = count() - before
    assert all((v.to_local() == 3).all() for v in state.values())
    return read, sum(v.to_local().nbytes for v in state.values())


def test_resharding_reads_little_more_than_the_rows_it_needs(tmp_path: Path) -> None:
    run_ranks(_save_wide, 4, str(tmp_path))
    for ranks in (4, 2, 1):
        counts = run_ranks(_bytes_read, ranks, str(tmp_path))
        assert sum(read for read, _ in counts) < 1.02 * sum(need for _, need in counts), (
            ranks,
            counts,
        )
