"""How many bytes a save writes, and how evenly: large tensors, small ones, the metadata, each
rank's share."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from device import DEVICE, cpu_only
from ranks import memory_of, run_ranks
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt import _C


def _size(path: str | Path) -> int:
    return sum(file.stat().st_size for file in Path(path).iterdir())


def _few_large_tensors(rank: int, path: str) -> None:
    mesh = init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("replicate", "shard"))
    shard = mesh.get_local_rank("shard")
    for name, shapes in {
        "one": [(5000, 1024)],
        "three": [(3001, 1024), (500, 700), (2000, 1024)],
        "one row": [(2, 3 << 20)],  # of 12 MiB a shard: cut inside
    }.items():
        state = {}
        for i, shape in enumerate(shapes):
            rows = -(-shape[0] // 2)
            local = torch.ones(min(rows, shape[0] - shard * rows), shape[1])
            whole = {"shape": torch.Size(shape), "stride": (shape[1], 1)}
            state[f"w{i}"] = DTensor.from_local(
                local, mesh, (Replicate(), Shard(0)), run_check=False, **whole
            )
        result = h.save(state, checkpoint_id=f"{path}/{name}").result
        held = 4 * sum(rows * columns for rows, columns in shapes)
        assert _size(f"{path}/{name}") <= 1.005 * held, name
        assert max(result.bytes_written) <= 1.02 * held / 4, (name, result.bytes_written)
        assert min(result.bytes_written) >= 0.98 * held / 4, (name, result.bytes_written)
        # One shard group saves all of it; so it does under stock dcp.save.
        if rank < 2:
            group = mesh.get_group("shard")
            assert (
                max(
                    h.save(
                        state, checkpoint_id=f"{path}/group", process_group=group
                    ).result.bytes_written
                )
                < 0.51 * held
            )
            dcp.save(state, storage_writer=h.FileSystemWriter(f"{path}/dcp"), process_group=group)
            for each in ("group", "dcp"):
                assert len(list(Path(f"{path}/{each}").glob("*.distcp"))) == 2
                assert held < _size(f"{path}/{each}") <= 1.005 * held


def test_large_tensors_take_their_own_bytes_and_ranks_the_same_share(tmp_path: Path) -> None:
    run_ranks(_few_large_tensors, 4, str(tmp_path))


def test_many_tensors_of_4_kib_take_no_more_than_dcps(tmp_path: Path) -> None:
    state = {f"layers.{i}.weight": torch.ones(1024) for i in range(2000)}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "dcp"), no_dist=True)
    h.save(state, checkpoint_id=tmp_path / "ours", no_dist=True)
    assert _size(tmp_path / "ours") <= _size(tmp_path / "dcp")


def test_the_metadata_hardly_grows_with_the_replicas(tmp_path: Path) -> None:
    """Against whole chunks, which one replica alone would write: chunks that are cut, and every
    replica's file names."""
    shapes = [
        (4096, 1024),
        (1024, 4096),
        (3072, 1024),
        (1024, 1024),
        (1024,),
        (1024,),
        (5003, 1024),
        (7,),
    ] * 25
    names = [f"model.layers.{i}.weight" for i in range(len(shapes))]
    sizes = {}
    for replicas in (1, 2, 8):
        ranks = range(replicas * 8)
        plan = _C.SavePlan(
            [_C.Sharding([replicas, 8], ranks, (-1, 0), whole=False)],
            [
                _C.TensorToPlan(name, "float32", shape, 0, None, pinned=False)
                for name, shape in zip(names, shapes, strict=True)
            ],
        )
        writers = [_C.SaveWriter(_C.ProcessIdentity(1, 2, rank, 4), []) for rank in ranks]
        built = plan.complete_metadata(Metadata({}), None, writers, 1, True)
        assert len(built.files) == len(ranks)
        sizes[replicas] = len(built.encoded)
    assert sizes[1] < sizes[2] <= sizes[8] <= 1.1 * sizes[1], sizes


def _memory(rank: int, path: str) -> dict[str, int]:
    """Memory that a save takes on top of the state: of tensors that lie contiguous, and of those
    that have to be copied."""
    mesh = init_device_mesh(DEVICE, (2, 1))
    locals_ = {
        "contiguous": torch.ones(9000, 1000),
        "transposed": torch.ones(1000, 9000).t(),
        "every other": torch.ones(5000, 2000)[:, ::2],
        "one row": torch.ones(1, 10_000_000)[:, ::2],
        "conjugated": torch.ones(5000, 500, dtype=torch.complex64).conj(),
        "expanded": torch.ones(1, 1000).expand(5000, 1000),
        **{f"small {i}": torch.ones(100, 100).t() for i in range(500)},
    }
    sharded = {
        name: DTensor.from_local(local, mesh, [Replicate(), Shard(0)], run_check=False)
        for name, local in locals_.items()
    }
    extra = {}
    for name, state in (("sharded", sharded), ("plain", locals_)):
        for call in ("save", "dcp.save"):
            dist.barrier()
            if call == "save":
                extra[f"{name} {call}"] = memory_of(
                    lambda state=state: h.save(state, checkpoint_id=path)
                )
            else:
                writer = h.FileSystemWriter(path)
                extra[f"{name} {call}"] = memory_of(
                    lambda state=state, writer=writer: dcp.save(state, storage_writer=writer)
                )
    loaded = {name: torch.zeros(local.shape, dtype=local.dtype) for name, local in locals_.items()}
    h.load(loaded, checkpoint_id=path)
    assert all(torch.equal(loaded[name], local) for name, local in locals_.items())
    return extra


def test_memory_on_top_of_the_state_is_bounded(tmp_path: Path) -> None:
    extra = run_ranks(_memory, 2, str(tmp_path))
    assert all(size < 64 << 20 for each in extra for size in each.values()), extra


def _memory_of_many(rank: int, path: str) -> list[int]:
    """A first save, which brings in what saves bring in once, then one over it and its metadata;
    the same of DTensors."""
    mesh = init_device_mesh(DEVICE, (1, dist.get_world_size()))
    extra = []
    for sharded, count in ((False, 50_000), (True, 20_000)):
        state: dict[str, torch.Tensor] = {f"layers.{i}.weight": torch.ones(2) for i in range(count)}
        if sharded:
            state = {
                k: DTensor.from_local(v, mesh, [Replicate(), Shard(0)], run_check=False)
                for k, v in state.items()
            }
        for _ in range(2):
            dist.barrier()
            extra.append(
                memory_of(lambda state=state: h.save({"model": state}, checkpoint_id=path))
            )
    return extra


@cpu_only("it is the host's memory, of which simulated devices take theirs")
@pytest.mark.parametrize("ranks", [1, 2])
def test_many_small_tensors_take_no_more(tmp_path: Path, ranks: int) -> None:
    extra = run_ranks(_memory_of_many, ranks, str(tmp_path))
    assert all(size < 64 << 20 for each in extra for size in each), extra
