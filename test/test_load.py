"""``load``: DCP's signature on our engine, in every way of exchange, onto every mesh, with every
planner, in bounded memory."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import training
from device import DEVICE, cpu_only, not_on_device
from load_states import (
    OtherPlanner,
    blank_state,
    check_state,
    full_tensors,
    save_state,
    sharded,
)
from ranks import memory_of, run_ranks
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt.checkpoint.load import exchange as _exchange


def _every_exchange(rank: int, path: str) -> None:
    mesh = init_device_mesh(DEVICE, (2, 2))
    hybrid = [Replicate(), Shard(0)]
    full = full_tensors(1)
    for name, writer in (("ours", h.FileSystemWriter), ("stock", dcp.FileSystemWriter)):
        save_state(full, mesh, hybrid, f"{path}/{name}", writer)
        for mode in ("off", "shared", "network", "auto"):
            for dtype in (
                torch.float32,
                torch.bfloat16,
            ):  # straight into the targets, and through memory that is converted
                state = blank_state(mesh, hybrid, dtype)
                h.load(state, checkpoint_id=f"{path}/{name}", exchange=mode)  # type: ignore[arg-type]
                check_state(state, full, dtype)
    # A rank whose plain tensors differ from the others' still shares the sharded ones.
    state = blank_state(mesh, hybrid)
    if rank == 1:
        del state["plain"]
    h.load(state, checkpoint_id=f"{path}/ours", exchange="shared")
    check_state(state | {"plain": torch.full((400, 1000), 0.5)}, full)


def test_every_way_of_exchange_gives_the_same(tmp_path: Path) -> None:
    run_ranks(_every_exchange, 4, str(tmp_path))


def _staged_of_several_files(rank: int, path: str) -> None:
    """Small tensors of one size, in the files of several ranks, whose bytes pass through memory.
    The ranks of another shard have opened those files in another order."""
    mesh = init_device_mesh(DEVICE, (2, 2))
    plain = {f"small {i}": torch.full((50,), float(i)) for i in range(8)}
    plain["large"] = torch.arange(400_000.0)
    w = {"w": distribute_tensor(torch.ones(512, 256), mesh, [Replicate(), Shard(0)])}
    h.save(plain | w, checkpoint_id=path)
    for mode in ("shared", "network"):
        target = {k: torch.zeros(v.shape, dtype=torch.float64) for k, v in plain.items()}
        h.load(target | w, checkpoint_id=path, exchange=mode)  # type: ignore[arg-type]
        for name, value in plain.items():
            assert torch.equal(target[name], value.double()), name


def test_staged_tensors_of_several_files(tmp_path: Path) -> None:
    run_ranks(_staged_of_several_files, 4, str(tmp_path))


def _reshard(rank: int, path: str) -> None:
    two, flat = init_device_mesh(DEVICE, (2, 2)), init_device_mesh(DEVICE, (4,))
    full = full_tensors(2)
    meshes: list[tuple[Any, list[Any]]] = [
        (two, [Replicate(), Shard(0)]),
        (flat, [Shard(0)]),
        (flat, [Shard(1)]),
        (two, [Shard(1), Shard(0)]),
        (flat, [Replicate()]),
    ]
    for i, (mesh, placements) in enumerate(meshes[:4]):
        save_state(full, mesh, placements, f"{path}/{i}", h.FileSystemWriter)
        for to_mesh, to in meshes:
            state = blank_state(to_mesh, to)
            h.load(state, checkpoint_id=f"{path}/{i}")
            check_state(state, full)


def test_between_any_two_meshes(tmp_path: Path) -> None:
    run_ranks(_reshard, 4, str(tmp_path))
    # and onto one process, which takes part in no mesh
    full = full_tensors(2)
    state: dict[str, Any] = {
        "w": {k: torch.zeros_like(v) for k, v in full.items()},
        "nested": [{"lr": None}],
    }
    h.load(state, checkpoint_id=tmp_path / "3", no_dist=True)
    assert all(torch.equal(state["w"][k], v) for k, v in full.items())


def _storage_bytes() -> int:
    """What this process has read through system calls so far, sockets included."""
    return next(
        int(line.split()[1])
        for line in Path("/proc/self/io").read_text().splitlines()
        if line.startswith("rchar")
    )


def _read_bytes(rank: int, path: str, replicas: int) -> dict[str, int]:
    """Bytes that this rank reads from files in every mode, and with planners that are not the
    default one."""
    mesh = init_device_mesh(DEVICE, (replicas, dist.get_world_size() // replicas))
    full = {
        "w": torch.arange(8_000_000.0).reshape(-1, 1000),
        "v": torch.arange(4_000_000.0).reshape(-1, 1000),
    }
    dcp.save(sharded(full, mesh, [Replicate(), Shard(0)]), storage_writer=h.FileSystemWriter(path))
    from_files = 0
    run = _exchange._Network.run

    def counted(self: Any, plan: Any) -> None:
        nonlocal from_files
        run(self, plan)
        from_files += plan.bytes_read

    _exchange._Network.run = counted  # type: ignore[method-assign]
    counts: dict[str, int] = {}
    for name, mode, planner in (
        ("off", "off", None),
        ("shared", "shared", None),
        ("network", "network", None),
        ("subclass", "shared", OtherPlanner()),
        ("empty", "shared", _EmptyStateDictLoadPlanner()),
    ):
        state = sharded(
            {k: torch.zeros_like(v) for k, v in full.items()}, mesh, [Replicate(), Shard(0)]
        )
        if name == "empty":
            state = {}
        dist.barrier()
        before = _storage_bytes()
        h.load(state, checkpoint_id=path, exchange=mode, planner=planner)  # type: ignore[arg-type]
        counts[name] = from_files if mode == "network" else _storage_bytes() - before
        whole = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state.items()}
        assert all(torch.equal(whole[k], v) for k, v in full.items())
    return counts


@not_on_device("what the simulator reads would count too")
@pytest.mark.parametrize("replicas", [2, 4, 8])
def test_an_exchange_reads_every_byte_once(tmp_path: Path, replicas: int) -> None:
    state = 48_000_000
    counts = run_ranks(_read_bytes, 4 if replicas == 2 else replicas, str(tmp_path), replicas)
    read = {name: sum(count[name] for count in counts) / state for name in counts[0]}
    assert read.pop("off") > replicas - 0.1
    assert all(1 <= times < 1.02 for times in read.values()), read


class _Doubling(dcp.DefaultLoadPlanner):
    """Takes tensors in memory of its own, and puts twice their values in the state dict."""

    def transform_tensor(self, read_item: Any, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor)

    def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
        self.lookup_tensor(read_item.dest_index).copy_(2 * tensor)


class _Counter:
    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


class _Decrypting(h.FileSystemReader):
    asked = 0

    def read_data(self, plan: Any, planner: Any) -> Any:
        type(self).asked += 1
        return super().read_data(plan, planner)


def test_a_reader_of_ones_own_is_asked(tmp_path: Path) -> None:
    h.save({"w": torch.arange(5.0)}, checkpoint_id=tmp_path)
    state = {"w": torch.zeros(5)}
    h.load(state, storage_reader=_Decrypting(tmp_path))
    assert _Decrypting.asked == 1 and torch.equal(state["w"], torch.arange(5.0))


def test_planners_stateful_objects_and_readers(tmp_path: Path) -> None:
    counter = _Counter()
    counter.value = 5
    dcp.save(
        {"c": counter, "t": torch.arange(6.0), "x": {"y": 1}},
        storage_writer=h.FileSystemWriter(tmp_path),
        no_dist=True,
    )

    def check(state: dict[str, Any], **options: Any) -> None:
        h.load(state, no_dist=True, **options)
        assert state["c"].value == 5
        assert torch.equal(state["t"], torch.arange(6.0))
        assert state["x"] == {"y": 1}

    def blank() -> dict[str, Any]:
        return {"c": _Counter(), "t": torch.zeros(6), "x": {"y": None}}

    check(blank(), checkpoint_id=tmp_path)
    check(blank(), storage_reader=h.FileSystemReader(tmp_path))
    check(blank(), checkpoint_id=tmp_path, storage_reader=h.FileSystemReader("elsewhere"))
    check(blank(), storage_reader=dcp.FileSystemReader(tmp_path))
    planner = OtherPlanner()
    check(blank(), checkpoint_id=tmp_path, planner=planner)
    assert planner.committed == 1
    doubled = blank()
    h.load(doubled, checkpoint_id=tmp_path, planner=_Doubling(), no_dist=True)
    assert torch.equal(doubled["t"], torch.arange(6.0) * 2)
    rebuilt: dict[str, Any] = {}
    h.load(
        rebuilt,
        checkpoint_id=tmp_path,
        planner=_EmptyStateDictLoadPlanner(keys={"t", "x"}),
        no_dist=True,
    )
    assert (
        rebuilt.keys() == {"t", "x"}
        and torch.equal(rebuilt["t"], torch.arange(6.0))
        and rebuilt["x"] == {"y": 1}
    )
    check(
        blank() | {"new": torch.ones(2)},
        checkpoint_id=tmp_path,
        planner=dcp.DefaultLoadPlanner(allow_partial_load=True),
    )
    with pytest.raises(h.CheckpointError, match="new"):
        check(blank() | {"new": torch.ones(2)}, checkpoint_id=tmp_path)
    with pytest.raises(h.CheckpointError, match=r"Size mismatch.*\[6\].*\[5\].*t"):
        check(blank() | {"t": torch.ones(5)}, checkpoint_id=tmp_path)
    with pytest.raises(ValueError, match="exchange"):
        h.load({}, checkpoint_id=tmp_path, exchange="maybe")  # type: ignore[arg-type]


def _extra_memory(rank: int, path: str) -> dict[str, int]:
    """Memory that a load takes at its height, on top of what is resting, shared memory included;
    the state exists before."""
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(), 1))
    shapes = {"large": (9000, 1000), **{f"w{i}": (500, 1000 + i) for i in range(4)}}  # 44 MB a set
    # One set of tensors for the sharded ones, one for the others: each has an exchange of its own.
    sets = ("sharded", "plain")

    def make(value: float, dtype: torch.dtype) -> dict[str, Any]:
        whole = {k: torch.full(v, value, dtype=dtype) for k, v in shapes.items()}
        return {
            "sharded": {
                k: distribute_tensor(v, mesh, [Replicate(), Shard(0)]) for k, v in whole.items()
            },
            "plain": whole,
        }

    h.save(make(1, torch.float32), checkpoint_id=path)
    extra = {}
    for dtype in (
        torch.float32,
        torch.bfloat16,
    ):  # straight into the targets, and through memory that is converted
        targets = make(0, dtype)
        for mode in ("off", "shared", "network"):
            dist.barrier()
            load = functools.partial(h.load, targets, checkpoint_id=path, exchange=mode)  # type: ignore[arg-type]
            extra[f"{dtype} {mode}"] = memory_of(load)
            for each in (_local(t) for kind in sets for t in targets[kind].values()):
                assert (each == 1).all() and not each.zero_().any()
    return extra


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@cpu_only("it is the host's memory, of which simulated devices take theirs")
@pytest.mark.parametrize("ranks", [4, 16])
def test_memory_on_top_of_the_state_is_bounded(tmp_path: Path, ranks: int) -> None:
    extra = run_ranks(_extra_memory, ranks, str(tmp_path))
    assert all(size < 64 << 20 for each in extra for size in each.values()), extra


def _onto_cuda(rank: int, path: str) -> None:
    mesh, host = (init_device_mesh(device, (2, 2)) for device in ("cuda", "cpu"))
    full = full_tensors(4) | {
        "large": torch.randn(9000, 1000)
    }  # more than a batch on its way to the device
    placements = [Replicate(), Shard(0)]
    for writer in (h.FileSystemWriter, dcp.FileSystemWriter):
        where = f"{path}/{writer.__module__}"
        dcp.save(sharded(full, host, placements), storage_writer=writer(where))
        for mode in ("off", "shared", "network"):
            for dtype in (torch.float32, torch.bfloat16):
                blank = {
                    k: torch.zeros_like(v, dtype=dtype, device="cuda") for k, v in full.items()
                }
                state = sharded(blank, mesh, placements)
                h.load(state, checkpoint_id=where, exchange=mode)  # type: ignore[arg-type]
                for name, tensor in state.items():
                    whole = training.full(tensor).cpu()
                    assert torch.equal(whole, full[name].to(dtype)), (name, mode, dtype)


@pytest.mark.gpu
def test_cuda_targets(tmp_path: Path) -> None:
    """Gloo with CUDA tensors: NCCL refuses several ranks on one GPU."""
    run_ranks(_onto_cuda, 4, str(tmp_path), backend="cpu:gloo,cuda:gloo")
