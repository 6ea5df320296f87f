"""``FileSystemWriter`` in stock ``dcp.async_save``, process mode too, and what its constructor's
arguments do."""

import errno
import inspect
import multiprocessing
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from device import DEVICE
from ranks import run_ranks
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt import _C
from torch_hsdp_ckpt.checkpoint.storage.data_file import DataFile

FULL = torch.arange(40000.0).reshape(200, 200)


def _state(value: float) -> dict[str, Any]:
    mesh = init_device_mesh(DEVICE, (2, 1), mesh_dim_names=("replicate", "shard"))
    return {
        "w": distribute_tensor(FULL + value, mesh, (Replicate(), Shard(0))),
        "b": torch.full((9,), value),
        "n": value,
    }


def _loaded(path: str) -> tuple[float, float, float]:
    """What is in the checkpoint, by stock's reader: the value that each of the state's parts was
    made of."""
    like: dict[str, Any] = {"w": torch.zeros_like(FULL), "b": torch.zeros(9), "n": None}
    dcp.load(like, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    offset = (like["w"] - FULL).unique()
    assert len(offset) == 1
    return offset.item(), like["b"].unique().item(), like["n"]


def _asynchronous(rank: int, path: str, kind: AsyncCheckpointerType) -> None:
    # Only a process that is no daemon may have children; torch's has to.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    os.environ["MASTER_ADDR"] = "127.0.0.1"

    def save(value: float, **options: Any) -> Any:
        state = _state(value)
        writer = h.FileSystemWriter(path, **options)
        future = dcp.async_save(state, storage_writer=writer, async_checkpointer_type=kind)
        state["w"].to_local().zero_()
        state["b"].zero_()
        return future

    save(1.0).result()
    assert _loaded(path) == (1.0, 1.0, 1.0)
    dist.barrier()
    save(2.0, single_file_per_rank=False, thread_count=3).result()
    assert _loaded(path) == (2.0, 2.0, 2.0)
    assert len(list(Path(path).glob("*.distcp"))) == 3
    dist.barrier()
    with pytest.raises(CheckpointException, match="overwrite=False"):
        save(3.0, overwrite=False).result()
    assert _loaded(path) == (2.0, 2.0, 2.0)
    dist.barrier()
    if rank == 0:
        (Path(path) / "obstacle").write_text("a file where a directory has to be made")
    dist.barrier()
    path = f"{path}/obstacle/checkpoint"
    with pytest.raises(CheckpointException) as failed:
        save(4.0).result()
    causes = [error for error, _ in failed.value.failures.values()]
    assert all(isinstance(error, OSError) and error.errno == errno.ENOTDIR for error in causes)


@pytest.mark.parametrize("kind", list(AsyncCheckpointerType), ids=lambda kind: kind.value)
def test_async_save(tmp_path: Path, kind: AsyncCheckpointerType) -> None:
    run_ranks(_asynchronous, 2, str(tmp_path / "checkpoint"), kind)


def test_the_staged_copy_is_kept_as_torchs_is(tmp_path: Path) -> None:
    for writer_type in (dcp.FileSystemWriter, h.FileSystemWriter):
        for kept in (False, True):
            writer = writer_type(tmp_path / writer_type.__module__, cache_staged_state_dict=kept)
            # torch pins what it keeps, which needs CUDA: the copy of an earlier save is given to it
            # instead
            if kept:
                writer.state_dict_cache = {"w": torch.zeros(1000)}
            first, second = (
                writer.stage({"w": torch.full((1000,), value)})["w"] for value in (1.0, 2.0)
            )
            assert (first.data_ptr() == second.data_ptr()) == kept
            assert bool((second == 2).all())
    state = {"w": torch.ones(1000)}
    dcp.async_save(state, storage_writer=writer, no_dist=True).result()
    state["w"].zero_()
    like = {"w": torch.zeros(1000)}
    dcp.load(like, storage_reader=dcp.FileSystemReader(writer.path), no_dist=True)
    assert bool((like["w"] == 1).all())


def test_the_arguments_are_torchs() -> None:
    ours, torchs = (
        inspect.signature(each.__init__).parameters
        for each in (h.FileSystemWriter, dcp.FileSystemWriter)
    )
    assert ours == torchs


@pytest.mark.parametrize("save", ["save", "dcp.save"])
def test_sync_files_is_whether_anything_is_synced(tmp_path: Path, save: str) -> None:
    for sync in (True, False):
        calls: list[tuple[str, str]] = []
        _C._inject_fault(lambda op, path, calls=calls: calls.append((op, path)) or 0)  # type: ignore[misc]
        writer = h.FileSystemWriter(tmp_path / str(sync), sync_files=sync)
        state = {"w": torch.ones(10)}
        if save == "save":
            h.save(state, storage_writer=writer, no_dist=True)
        else:
            dcp.save(state, storage_writer=writer, no_dist=True)
        _C._inject_fault(None)
        synced = [path for op, path in calls if op == "fsync"]
        names = {Path(path).name.rpartition("_")[2] or path for path in synced}
        assert bool(synced) == sync
        # the two directories above the new one, the data, the directory, the metadata, the
        # directory once more
        if sync:
            assert synced[:2] == [str(tmp_path.parent), str(tmp_path)]
            assert {"0.distcp", "True", "1.distcp.tmp"} <= names
            assert synced[-1] == str(tmp_path / "True")


@pytest.mark.parametrize("count", [1, 3])
def test_thread_count_is_the_threads_that_write(tmp_path: Path, count: int) -> None:
    """Three writes that wait for one another get on only if three threads write; of one, torch's
    default, we make two."""
    threads = max(2, count)
    together, seen = threading.Barrier(threads), set()

    def meet(op: str, path: str) -> int:
        if op == "pwrite" and path.endswith(".distcp"):
            seen.add(threading.get_native_id())
            if not together.broken:
                together.wait(60)
                together.abort()  # all are here: later writes go on at once
        return 0

    def meet_once(op: str, path: str) -> int:
        try:
            return meet(op, path)
        except threading.BrokenBarrierError:
            return 0

    state = {"w": torch.ones(15 << 20)}
    _C._inject_fault(meet_once)
    h.save(state, storage_writer=h.FileSystemWriter(tmp_path, thread_count=count), no_dist=True)
    _C._inject_fault(None)
    assert len(seen) == threads
    assert len(list(tmp_path.glob("*.distcp"))) == 1, (
        "unlike torch's, the number of files does not depend on it"
    )


@pytest.mark.parametrize("block", [1 << 16, 0])
def test_copy_ahead_bounds_what_is_copied(tmp_path: Path, block: int) -> None:
    tensor = torch.randn(3000, 1500).t()
    file = DataFile(
        str(tmp_path), _C.data_file_name(0, _C.new_save_id(claimed=True), 0), block=block
    )
    writer, sizes = file._writer, []

    class Watched:
        def write_tensors(self, parts: Any) -> Any:
            sizes.append(sum(part.size for part in parts))
            return writer.write_tensors(parts)

        def finish(self) -> Any:
            return writer.finish()

    file._writer = Watched()  # type: ignore[assignment]
    file.add_tensor("w", tensor)
    file.finish()
    assert sum(sizes) == tensor.nbytes
    assert max(sizes) <= (block or 16 << 20)
    assert len(sizes) >= tensor.nbytes // (block or 16 << 20)
