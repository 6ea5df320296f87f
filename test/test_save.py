"""``save``: what it writes, who writes it, and what the ranks say to each other."""

import json
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from device import DEVICE
from ranks import run_ranks
from save_faults import calls_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.profiler import ProfilerActivity, profile

import torch_hsdp_ckpt as h

FULL = {
    f"w{n}": torch.arange(n * 1000, dtype=torch.float32).reshape(n, 1000) for n in (1, 2, 5, 8, 503)
}
PLAIN = {
    "buffer": torch.arange(300000.0),
    "step": torch.tensor(7),
    "empty": torch.empty(0, 3),
    "strided": torch.ones(6, 4).t(),
}


def _state(mesh: Any) -> dict[str, Any]:
    sharded = {k: distribute_tensor(v, mesh, (Replicate(), Shard(0))) for k, v in FULL.items()}
    return {
        "model": sharded,
        "plain": dict(PLAIN),
        "nested": [1, {"x": "text"}, torch.ones(2)],
        "lr": 0.1,
    }


def _check_loads(path: str, keys: Any, reader: Any = dcp.FileSystemReader) -> None:
    """Everything, on every rank, through stock torch's reader."""
    like: dict[str, Any] = {
        "model": {k: torch.zeros_like(FULL[k]) for k in keys},
        "plain": {k: torch.zeros_like(v) for k, v in PLAIN.items()},
        "nested": [None, {"x": None}, torch.zeros(2)],
        "lr": None,
    }
    dcp.load(like, storage_reader=reader(path), no_dist=True)
    for key in keys:
        assert torch.equal(like["model"][key], FULL[key]), key
    for key, value in PLAIN.items():
        assert torch.equal(like["plain"][key], value), key
    assert like["lr"] == 0.1
    assert like["nested"][:2] == [1, {"x": "text"}]


def _collectives(events: Any) -> dict[str, int]:
    return {e.key: e.count for e in events.key_averages() if "gloo" in e.key or "c10d" in e.key}


def _static(rank: int, path: str, log: str) -> None:
    logging.basicConfig(filename=f"{log}/{rank}", level=logging.INFO)
    mesh = init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("replicate", "shard"))
    state = _state(mesh)
    for _ in range(2):
        with profile(activities=[ProfilerActivity.CPU]) as events:
            metadata = h.save(state, checkpoint_id=path)
        talk = _collectives(events)
        assert sum(talk.values()) == 3, (
            talk
        )  # two small all-gathers and the verdict: no gather, no scatter
        assert {k.split(":")[-1] for k in talk} == {"all_gather", "broadcast"}, talk
    dist.barrier()
    for reader in (dcp.FileSystemReader, h.FileSystemReader):
        _check_loads(path, FULL, reader)
    assert len(list(Path(path).iterdir())) == 5, (
        "one file a rank and the metadata; the older save's files are gone"
    )
    stored = h.FileSystemReader(path).read_metadata()
    stored.storage_meta.load_id = None
    assert metadata == stored
    assert isinstance(metadata, dcp.Metadata)
    assert pickle.loads(pickle.dumps(metadata)) == stored
    assert type(pickle.loads(pickle.dumps(metadata))) is dcp.Metadata
    assert (
        {index.fqn for index in metadata.storage_data}
        == set(metadata.state_dict_metadata)
        == set(metadata.planner_data)
    )

    result = metadata.result
    assert isinstance(result, h.SaveResult)
    sizes = {int(p.name.split("_")[2]): p.stat().st_size for p in Path(path).glob("*.distcp")}
    assert result.bytes_written == tuple(sizes[r] for r in range(4))
    assert result.total_bytes == sum(sizes.values())
    assert set(result.seconds) == {"plan", "write", "commit", "total"}
    assert max(sizes.values()) - min(sizes.values()) < (1 << 20) + PLAIN["buffer"].nbytes, (
        "plain tensors are not cut"
    )

    dist.barrier()  # the next save's claim is one more file
    h.save({"other": torch.ones(2)}, checkpoint_id=path)
    if rank > 0:
        old = h.save(state, checkpoint_id=path)
        h.save(state, checkpoint_id=path)
        with pytest.raises(h.CheckpointError, match="a later save has replaced"):
            _ = old.storage_data
    else:
        h.save(state, checkpoint_id=path)
        h.save(state, checkpoint_id=path)
    # One more with options, through a writer.
    for options in (
        {"single_file_per_rank": False, "thread_count": 3},
        {"sync_files": False, "per_thread_copy_ahead": 1000},
    ):
        h.save(state, storage_writer=h.FileSystemWriter(path, **options))
        _check_loads(path, FULL)
        dist.barrier()
    before = sorted(os.listdir(path))

    def refused() -> None:
        with pytest.raises(h.CheckpointError, match="overwrite=False; nothing was written"):
            h.save(state, storage_writer=h.FileSystemWriter(path, overwrite=False))

    assert {op for op, _ in calls_of(refused)} <= {"stat", "readdir", "fsync"}, (
        "nothing was made, opened or written"
    )
    assert sorted(os.listdir(path)) == before
    _check_loads(path, FULL)


def test_the_result_is_shown_in_units_that_fit() -> None:
    seconds = {"plan": 0.25, "write": 1.5, "commit": 0.25, "total": 2.0}
    result = h.SaveResult("checkpoint", 0, (3 << 30, 5 << 20, 1536, 40), (1.0,) * 4, seconds)
    assert str(result) == (
        "3.00 GiB in 2.000 s, 1.50 GiB/s (plan 0.250 s, write 1.500 s, commit 0.250 s; "
        "4 ranks with 40 bytes to 3.00 GiB at 40 bytes/s to 3.00 GiB/s)"
    )
    small = h.SaveResult("checkpoint", 0, (5 << 20, 1536), (1.0, 1.0), seconds)
    assert str(small).startswith("5.00 MiB in 2.000 s, 2.50 MiB/s")
    assert "2 ranks with 1.50 KiB to 5.00 MiB at 1.50 KiB/s to 5.00 MiB/s" in str(small)


def test_static_plan(tmp_path: Path) -> None:
    path, log = tmp_path / "checkpoint", tmp_path / "log"
    log.mkdir()
    run_ranks(_static, 4, str(path), str(log))
    lines = (log / "0").read_text().splitlines()
    assert sum("saved" in line and "KiB" in line and "iB/s" in line for line in lines) == 7
    assert not any("planned through DCP" in line for line in lines)
    assert "saved" not in (log / "1").read_text()


def _chunks(path: str, name: str) -> int:
    stored = h.FileSystemReader(path).read_metadata().storage_data
    return len({index for index in stored if index.fqn == name})


def _differing(rank: int, path: str, log: str) -> dict[str, Any]:
    logging.basicConfig(filename=f"{log}/{rank}", level=logging.INFO)
    mesh = init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("replicate", "shard"))
    out: dict[str, Any] = {}
    # Keys that differ by rank.
    state = _state(mesh)
    state[f"rng{rank}"] = torch.full((100,), rank, dtype=torch.uint8)
    state["rank"] = {f"object{rank}": rank}
    for _ in range(2):
        h.save(state, checkpoint_id=f"{path}/rng")
    _check_loads(f"{path}/rng", FULL)
    like: dict[str, Any] = {f"rng{r}": torch.zeros(100, dtype=torch.uint8) for r in range(4)}
    like["rank"] = {f"object{r}": None for r in range(4)}
    dcp.load(like, storage_reader=h.FileSystemReader(f"{path}/rng"), no_dist=True)
    assert all((like[f"rng{r}"] == r).all() and like["rank"][f"object{r}"] == r for r in range(4))
    assert _chunks(f"{path}/rng", "model.w503") == 4, "still split among the replicas"

    # Equal keys and shapes, other values: one rank's whole tensor, never parts of two.
    h.save(
        {"ema": torch.full((1 << 20,), rank), "small": torch.full((7,), rank)},
        checkpoint_id=f"{path}/ema",
    )
    like = {"ema": torch.full((1 << 20,), -1), "small": torch.full((7,), -1)}
    dcp.load(like, storage_reader=h.FileSystemReader(f"{path}/ema"), no_dist=True)
    assert all(0 <= value[0] < 4 and (value == value[0]).all() for value in like.values())

    # Meshes that differ by rank: each pair of ranks has one of its own.
    own = init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("replicate", "shard"))["shard"]
    state = {
        "model": {k: distribute_tensor(v, own, [Shard(0)]) for k, v in FULL.items()},
        **_rest(),
    }
    h.save(state, checkpoint_id=f"{path}/submesh")
    _check_loads(f"{path}/submesh", FULL)
    assert _chunks(f"{path}/submesh", "model.w503") == 4, "meshes that hold the same are replicas"

    # Three dimensions; a dimension that is cut twice, in both orders; a split factor that no other
    # cut explains.
    cube = init_device_mesh(DEVICE, (2, 1, 2), mesh_dim_names=("replicate", "shard", "tensor"))
    for name, placements in {
        "3d": (Replicate(), Shard(0), Shard(1)),
        "twice": (Shard(0), Replicate(), Shard(0)),
        "strided": (Replicate(), _StridedShard(0, split_factor=2), Shard(0)),
        "unexplained": (Replicate(), _StridedShard(0, split_factor=4), Shard(0)),
    }.items():
        state = {"model": {}, **_rest()}
        for key, value in FULL.items():
            if name in ("strided", "unexplained"):
                local = distribute_tensor(value, cube, (Replicate(), Shard(0), Shard(0))).to_local()
                state["model"][key] = DTensor.from_local(
                    local,
                    cube,
                    placements,
                    run_check=False,
                    shape=value.shape,
                    stride=value.stride(),
                )
            else:
                state["model"][key] = distribute_tensor(value, cube, placements)
        h.save(state, checkpoint_id=f"{path}/{name}")
        _check_loads(f"{path}/{name}", FULL)
        dist.barrier()

    # One shard group of the mesh writes all; a replica group has not all shards.
    state = _state(mesh)
    if rank < 2:
        h.save(state, checkpoint_id=f"{path}/group", process_group=mesh.get_group("shard"))
        _check_loads(f"{path}/group", FULL)
        out["files"] = len(list(Path(f"{path}/group").glob("*.distcp")))
    replicas, half = (
        mesh.get_group("replicate"),
        f"{path}/half{mesh.get_local_rank('shard')}",
    )  # of each group its own
    with pytest.raises(
        h.CheckpointError, match="w2: no rank of the saving process group holds its shard at"
    ):
        h.save(
            {k: v for k, v in state["model"].items() if k != "w1"},
            checkpoint_id=half,
            process_group=replicas,
        )
    dist.barrier()
    assert not os.path.isdir(half) or os.listdir(half) == []
    return out


def _rest() -> dict[str, Any]:
    return {"plain": dict(PLAIN), "nested": [1, {"x": "text"}, torch.ones(2)], "lr": 0.1}


def test_what_differs_by_rank_and_what_only_dcp_can_plan(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.mkdir()
    outcomes = run_ranks(_differing, 4, str(tmp_path), str(log))
    assert outcomes[0]["files"] == outcomes[1]["files"] == 2
    lines = (log / "0").read_text()
    assert lines.count("planned through DCP") == 1
    assert lines.count("tensors of types or placements that only DCP knows") == 1


class _Planner(dcp.DefaultSavePlanner):
    pass


def _delegated(rank: int, path: str, log: str) -> None:
    logging.basicConfig(filename=f"{log}/{rank}", level=logging.INFO)
    mesh = init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("replicate", "shard"))
    state = _state(mesh)

    def files(name: str) -> set[str]:
        dist.barrier()
        names = set(os.listdir(f"{path}/{name}"))
        dist.barrier()
        return names

    for name, arguments in {
        "planner": {"planner": _Planner(), "checkpoint_id": f"{path}/planner"},
        "lowest": {
            "planner": dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True),
            "checkpoint_id": f"{path}/lowest",
        },
        "stock": {"storage_writer": dcp.FileSystemWriter(f"{path}/stock")},
        "default": {"planner": dcp.DefaultSavePlanner(), "checkpoint_id": f"{path}/default"},
    }.items():
        metadata = h.save(state, **arguments)
        assert isinstance(metadata, dcp.Metadata)
        assert hasattr(metadata, "result") == (name == "default")
        older = files(name)
        h.save(state, **arguments)
        # Whoever plans, our writer goes over no file of the older checkpoint.
        assert older & files(name) == (older if name == "stock" else {".metadata"}), name
        _check_loads(f"{path}/{name}", FULL)
    for save in (h.save, lambda *args, **named: h.async_save(*args, **named).result(60)):
        save(state, checkpoint_id=f"{path}/alone", use_collectives=False)
        names = files("alone")
        assert {name for name in names if name.endswith(".metadata")} == {
            f"__{r}.metadata" for r in range(4)
        }
        assert len(names) == 8
        assert not {f"__{r}_0.distcp" for r in range(4)} & names, "our writer's"
    flat = {"a": torch.ones(3), "b": {"nested": 1}}
    h.save(
        flat, checkpoint_id=f"{path}/flat", planner=dcp.DefaultSavePlanner(flatten_state_dict=False)
    )
    assert set(h.FileSystemReader(f"{path}/flat").read_metadata().state_dict_metadata) == {"a", "b"}


def test_what_dcp_has_to_plan_goes_to_dcp(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.mkdir()
    run_ranks(_delegated, 4, str(tmp_path), str(log))
    lines = (log / "0").read_text()
    for why in (
        "the planner is a _Planner",
        "the planner is a DefaultSavePlanner or keeps",
        "the storage writer is a",
    ):
        assert why in lines


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_alone_and_of_every_form(tmp_path: Path, device: str) -> None:
    class Counter:
        def state_dict(self) -> dict[str, int]:
            return {"count": 3}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.loaded = state

    # More than a copy block, and not contiguous; on a device several blocks, copied while others
    # are written.
    big = torch.randn(3000, 1500, device=device).t()
    whole = torch.randn(
        (6 if device == "cuda" else 1) << 20, dtype=torch.complex64, device=device
    ).conj()
    half = torch.nn.Parameter(torch.randn(5, device=device).half())
    state = {
        "counter": Counter(),
        "big": big,
        "whole": whole,
        "half": half,
        "view": torch.ones(1 << 20, device=device)[:9],
    }
    metadata = h.save(state, checkpoint_id=tmp_path, no_dist=True)
    assert metadata.result.total_bytes < (big.nbytes + whole.nbytes) * 1.005
    like = {
        k: torch.zeros(v.shape, dtype=v.dtype, device=device)
        for k, v in state.items()
        if isinstance(v, torch.Tensor)
    }
    like |= {"counter": Counter()}
    dcp.load(like, storage_reader=dcp.FileSystemReader(tmp_path), no_dist=True)
    for key in ("big", "whole", "half", "view"):
        assert torch.equal(like[key], state[key]), key
    assert like["counter"].loaded == {"count": 3}
    json.dumps(metadata.result.seconds)
    freed = torch.ones(1000)
    freed.untyped_storage().resize_(0)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(h.CheckpointError, match=r"freed: shape .1000. needs 4000 bytes"):
        h.save({"freed": freed}, checkpoint_id=tmp_path, no_dist=True)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    "save, writer",
    [
        (dcp.save, dcp.FileSystemWriter),
        (dcp.save, h.FileSystemWriter),
        (h.save, h.FileSystemWriter),
    ],
)
def test_a_checkpoint_id_moves_the_writer(tmp_path: Path, save: Any, writer: Any) -> None:
    """Both at once mean the writer's options and the other directory, as in torch."""
    before, after = tmp_path / "before", tmp_path / "after"
    options = writer(before, single_file_per_rank=False)
    save(
        {"w": torch.arange(6.0), "v": torch.ones(2)},
        checkpoint_id=after,
        storage_writer=options,
        no_dist=True,
    )
    assert not before.exists()
    assert len(list(after.glob("*.distcp"))) == 2
    like = {"w": torch.zeros(6), "v": torch.zeros(2)}
    dcp.load(like, checkpoint_id=after, no_dist=True)
    assert torch.equal(like["w"], torch.arange(6.0))
    assert torch.equal(like["v"], torch.ones(2))
