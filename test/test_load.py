"""``load``: DCP's signature on our engine, in every way of exchange, onto every mesh, and what goes
wrong on one rank."""

import errno
import functools
import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import memory_of, run_ranks
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt import _C
from torch_hsdp_ckpt.checkpoint.load import exchange as _exchange
from torch_hsdp_ckpt.checkpoint.load import load as _load
from torch_hsdp_ckpt.checkpoint.load import plan as _plan

ROWS = {"even": 512, "uneven": 301, "few": 3, "one": 1}


def _full(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(rows, 1024, generator=g) for name, rows in ROWS.items()}


def _sharded(full: dict[str, torch.Tensor], mesh: Any, placements: list[Any]) -> dict[str, Any]:
    return {k: distribute_tensor(v, mesh, placements) for k, v in full.items()}


def _blank(mesh: Any, placements: list[Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    state: dict[str, Any] = _sharded(
        {k: torch.zeros(v, 1024, dtype=dtype) for k, v in ROWS.items()}, mesh, placements
    )
    return {
        "w": state,
        "step": torch.tensor(0),
        "plain": torch.zeros(400, 1000),
        "nested": [{"lr": None}],
    }


def _check(
    state: dict[str, Any], full: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32
) -> None:
    for name, tensor in state["w"].items():
        assert isinstance(tensor, DTensor)
        assert torch.equal(tensor.full_tensor(), full[name].to(dtype)), name
    assert state["step"] == 7
    assert torch.equal(state["plain"], torch.full((400, 1000), 0.5))
    assert state["nested"] == [{"lr": 0.1}]


def _save(
    full: dict[str, torch.Tensor], mesh: Any, placements: list[Any], path: str, writer: Any
) -> None:
    state = {"w": _sharded(full, mesh, placements), "step": torch.tensor(7)}
    dcp.save(
        state | {"plain": torch.full((400, 1000), 0.5), "nested": [{"lr": 0.1}]},
        storage_writer=writer(path),
    )


def _every_exchange(rank: int, path: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    hybrid = [Replicate(), Shard(0)]
    full = _full(1)
    for name, writer in (("ours", h.FileSystemWriter), ("stock", dcp.FileSystemWriter)):
        _save(full, mesh, hybrid, f"{path}/{name}", writer)
        for mode in ("off", "shared", "network", "auto"):
            for dtype in (
                torch.float32,
                torch.bfloat16,
            ):  # straight into the targets, and through memory that is converted
                state = _blank(mesh, hybrid, dtype)
                h.load(state, checkpoint_id=f"{path}/{name}", exchange=mode)  # type: ignore[arg-type]
                _check(state, full, dtype)
    # A rank whose plain tensors differ from the others' still shares the sharded ones.
    state = _blank(mesh, hybrid)
    if rank == 1:
        del state["plain"]
    h.load(state, checkpoint_id=f"{path}/ours", exchange="shared")
    _check(state | {"plain": torch.full((400, 1000), 0.5)}, full)


def test_every_way_of_exchange_gives_the_same(tmp_path: Path) -> None:
    run_ranks(_every_exchange, 4, str(tmp_path))


def _reshard(rank: int, path: str) -> None:
    two, flat = init_device_mesh("cpu", (2, 2)), init_device_mesh("cpu", (4,))
    full = _full(2)
    meshes: list[tuple[Any, list[Any]]] = [
        (two, [Replicate(), Shard(0)]),
        (flat, [Shard(0)]),
        (flat, [Shard(1)]),
        (two, [Shard(1), Shard(0)]),
        (flat, [Replicate()]),
    ]
    for i, (mesh, placements) in enumerate(meshes[:4]):
        _save(full, mesh, placements, f"{path}/{i}", h.FileSystemWriter)
        for to_mesh, to in meshes:
            state = _blank(to_mesh, to)
            h.load(state, checkpoint_id=f"{path}/{i}")
            _check(state, full)


def test_between_any_two_meshes(tmp_path: Path) -> None:
    run_ranks(_reshard, 4, str(tmp_path))
    # and onto one process, which takes part in no mesh
    full = _full(2)
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
    mesh = init_device_mesh("cpu", (replicas, dist.get_world_size() // replicas))
    full = {
        "w": torch.arange(8_000_000.0).reshape(-1, 1000),
        "v": torch.arange(4_000_000.0).reshape(-1, 1000),
    }
    dcp.save(_sharded(full, mesh, [Replicate(), Shard(0)]), storage_writer=h.FileSystemWriter(path))
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
        ("subclass", "shared", _Other()),
        ("empty", "shared", _EmptyStateDictLoadPlanner()),
    ):
        state = _sharded(
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


@pytest.mark.parametrize("replicas", [2, 4, 8])
def test_an_exchange_reads_every_byte_once(tmp_path: Path, replicas: int) -> None:
    state = 48_000_000
    counts = run_ranks(_read_bytes, 4 if replicas == 2 else replicas, str(tmp_path), replicas)
    read = {name: sum(count[name] for count in counts) / state for name in counts[0]}
    assert read.pop("off") > replicas - 0.1
    assert all(1 <= times < 1.02 for times in read.values()), read


class _Raises:
    def __init__(self, rank: int) -> None:
        self.rank = rank

    def state_dict(self) -> dict[str, Any]:
        if self.rank == 1:
            raise ArithmeticError("no state")
        return {"x": torch.ones(2)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def _at_read(number: int, act: Callable[[], int]) -> None:
    """From now on ``act`` is asked what this process's read ``number`` of tensors shall do in each
    load: see _inject_fault."""
    read = _load.read
    _C._inject_fault(None)  # files that are opened from now on can be asked

    def reading(*arguments: Any) -> Any:
        calls = itertools.count(1)
        _C._inject_fault(lambda op, path: act() if op == "pread" and next(calls) == number else 0)
        try:
            return read(*arguments)
        finally:
            _C._inject_fault(None)

    _load.read = reading


def _rank_fails(rank: int, path: str) -> None:
    """Damage that only one rank meets, or that only one replica reads, is every rank's error, in
    every mode."""
    mesh = init_device_mesh("cpu", (2, 2))
    full = _full(3)
    # In the second case the ranks of one shard fail before those of the other one know, and before
    # the plain tensors' turn.
    for damaged, name in (("plain", "plain"), ("w.even", r"w\.even")):
        _save(full, mesh, [Replicate(), Shard(0)], path, h.FileSystemWriter)
        if rank == 0:
            storage = dcp.FileSystemReader(path).read_metadata().storage_data
            place = next(place for index, place in storage.items() if index.fqn == damaged)
            with open(f"{path}/{place.relative_path}", "r+b") as file:
                file.seek(place.offset + place.length // 2)
                byte = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte[0] ^ 1]))
        dist.barrier()
        for mode in ("off", "shared", "network"):
            with pytest.raises(
                h.CorruptCheckpointError, match=rf"rank \d.*distcp: {name}.*written in part"
            ):
                h.load(_blank(mesh, [Replicate(), Shard(0)]), checkpoint_id=path, exchange=mode)  # type: ignore[arg-type]
    state = _blank(mesh, [Replicate(), Shard(0)])
    if rank == 2:
        state["w"]["more"] = torch.zeros(3)
    with pytest.raises(
        h.CheckpointError, match=r"rank 2.*Missing key in checkpoint state_dict: w\.more"
    ):
        h.load(state, checkpoint_id=path)
    with pytest.raises(FileNotFoundError):
        h.load(state, checkpoint_id=f"{path}/none")
    if rank == 0:
        os.mkdir(f"{path}/fifo")
        os.mkfifo(f"{path}/fifo/.metadata")
    dist.barrier()
    with pytest.raises(h.CheckpointError, match=r"rank 0.*fifo/\.metadata: not a regular file"):
        h.load(state, checkpoint_id=f"{path}/fifo")
    # An object that only one rank asks for is refused before any rank's tensors are written.
    ones = {"w": torch.ones(6000, 1000), "path": Path("/")}
    h.save(ones, checkpoint_id=f"{path}/object")
    for mode in ("off", "shared", "network"):
        state = {"w": torch.zeros(6000, 1000)} | ({"path": None} if rank == 1 else {})
        with pytest.raises(
            h.CheckpointError, match=r"(?s)rank 1.*distcp: path.*trust_objects"
        ) as refused:
            h.load(state, checkpoint_id=f"{path}/object", exchange=mode)  # type: ignore[arg-type]
        assert not state["w"].any() and "in part" not in str(refused.value)
    # What the operating system refuses while tensors are read: the same error, and more of it.
    _at_read(2, lambda: -errno.EIO)
    for mode in ("off", "shared", "network"):
        with pytest.raises(OSError, match="written in part") as error:
            h.load({"w": torch.zeros(6000, 1000)}, checkpoint_id=f"{path}/object", exchange=mode)  # type: ignore[arg-type]
        assert error.value.errno == errno.EIO and str(error.value.filename).endswith(".distcp"), (
            mode
        )
    raising = {"it": _Raises(rank)}
    for call in (h.load, h.save):
        with pytest.raises(h.CheckpointError, match="rank 1: ArithmeticError: no state"):
            call(raising, checkpoint_id=path)


def test_a_ranks_failure_is_every_ranks(tmp_path: Path) -> None:
    run_ranks(_rank_fails, 4, str(tmp_path))


DEATHS = [  # how replicas share, where one is killed, and which: the coordinator or the other
    ("off", "plan", 0),
    ("off", "read", 1),
    ("shared", "plan", 1),
    ("shared", "read", 0),
    ("network", "plan", 0),
    ("network", "read", 1),
]


def _dies(rank: int, path: str) -> str | None:
    """Pairs of ranks, of which one is killed while it plans, or when it has read its first piece,
    of three or more of 2 MiB."""
    pair, role = divmod(rank, 2)
    mode, point, who = DEATHS[pair]
    group = dist.new_group([2 * pair, 2 * pair + 1], use_local_synchronization=True)
    state = {"w": torch.zeros(3000, 1000), "step": None}
    h.load(state, checkpoint_id=path, process_group=group, exchange=mode)  # type: ignore[arg-type]
    dist.barrier()  # no rank of another pair waits for one that dies

    def killed(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    if role == who and point == "plan":
        _plan.plan_natively = killed
    elif role == who:
        _at_read(2, killed)
    with pytest.raises(h.CheckpointError, match="gets no answer") as error:
        h.load(state, checkpoint_id=path, process_group=group, exchange=mode)  # type: ignore[arg-type]
    assert ("written in part" in str(error.value)) == (point == "read")
    state["w"].zero_()
    h.load(
        state, checkpoint_id=path, no_dist=True
    )  # what is left of the failed load is in nobody's way
    assert (state["w"] == 1).all()
    return mode


def test_a_rank_that_dies_is_the_others_error(tmp_path: Path) -> None:
    """And at once: the process group's timeout, half an hour, is longer than this test's."""
    h.save({"w": torch.ones(3000, 1000), "step": 1}, checkpoint_id=tmp_path, no_dist=True)
    died = tuple(2 * pair + who for pair, (_, _, who) in enumerate(DEATHS))
    ended = run_ranks(_dies, 2 * len(DEATHS), str(tmp_path), allow_death=died)
    assert [ended[rank] is None for rank in range(len(ended))] == [
        rank in died for rank in range(len(ended))
    ]


class _Other(dcp.DefaultLoadPlanner):
    """Not the default planner, as far as one can tell."""

    committed = 0

    def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
        self.committed += 1


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
    planner = _Other()
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


class _Replaced(h.FileSystemReader):
    """Behind the first read of .metadata a newer save commits and removes the files of the one that
    was read."""

    done = False

    def read_metadata_file(self, rank: int | None = None) -> bytes:
        file = super().read_metadata_file(rank)
        if not _Replaced.done:
            _Replaced.done = True
            for data in Path(self.path).glob("__*.distcp"):
                data.unlink()
            for newer in (Path(self.path) / "2").iterdir():
                os.rename(newer, Path(self.path) / newer.name)
        return file


def _saved_over(rank: int, path: str) -> None:
    """A save goes through while this load has read .metadata and opened nothing yet."""
    mesh = init_device_mesh("cpu", (2,))

    first = {"w": distribute_tensor(torch.ones(600, 100), mesh, [Shard(0)])}
    dcp.save(first, storage_writer=h.FileSystemWriter(path))
    second = {"w": distribute_tensor(torch.full((600, 100), 2.0), mesh, [Shard(0)])}
    dcp.save(second, storage_writer=h.FileSystemWriter(f"{path}/2"))
    reader = (_Replaced if rank == 0 else h.FileSystemReader)(path)
    dist.barrier()
    state = {"w": distribute_tensor(torch.zeros(600, 100), mesh, [Shard(0)])}
    h.load(state, storage_reader=reader)
    assert torch.equal(state["w"].full_tensor(), torch.full((600, 100), 2.0))
    if rank == 0:
        for data in Path(path).glob("__*.distcp"):
            data.unlink()
    dist.barrier()
    with pytest.raises(
        FileNotFoundError, match="distcp"
    ):  # nobody has saved since: the files are just not there
        h.load(state, checkpoint_id=path)


def test_a_directory_that_is_saved_over_gives_one_generation(tmp_path: Path) -> None:
    run_ranks(_saved_over, 2, str(tmp_path))


def _many_saves(rank: int, path: str) -> list[int]:
    """Ranks 0 and 1 save over one directory again and again, while ranks 2 and 3 load from it: what
    these have seen."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("task", "shard"))["shard"]
    group = mesh.get_group()

    def state(value: float) -> dict[str, Any]:
        tensors = {f"t{i}": torch.full((100 + 37 * i, 300), value) for i in range(8)}
        return {k: distribute_tensor(v, mesh, [Shard(0)]) for k, v in tensors.items()} | {
            "generation": int(value)
        }

    done = Path(path) / "done"
    if rank < 2:
        h.save(state(1), checkpoint_id=f"{path}/c", process_group=group)
    dist.barrier()
    seen = []
    for number in range(2, 400):
        if rank < 2:
            h.save(state(number), checkpoint_id=f"{path}/c", process_group=group)
            stop = [done.exists()]
            dist.broadcast_object_list(stop, group_src=0, group=group)
            if stop[0]:
                break
            time.sleep(0.05)
            continue
        loaded = state(0)
        planner = _Other() if number % 2 else None
        h.load(loaded, checkpoint_id=f"{path}/c", process_group=group, planner=planner)
        seen.append(loaded["generation"])
        for name, value in loaded.items():
            assert name == "generation" or (value.to_local() == seen[-1]).all(), (name, seen[-1])
        if len(seen) == 12:
            break
    if rank == 2:
        done.touch()
    return seen


def test_loads_while_others_save_over_the_directory(tmp_path: Path) -> None:
    _, _, seen, other = run_ranks(_many_saves, 4, str(tmp_path))
    assert len(seen) == 12 and seen == other  # no two ranks read different generations
    assert seen == sorted(seen) and len(set(seen)) > 2


def _extra_memory(rank: int, path: str) -> dict[str, int]:
    """Memory that a load takes at its height, on top of what is resting, shared memory included;
    the state exists before."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1))
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


@pytest.mark.parametrize("ranks", [4, 16])
def test_memory_on_top_of_the_state_is_bounded(tmp_path: Path, ranks: int) -> None:
    extra = run_ranks(_extra_memory, ranks, str(tmp_path))
    assert all(size < 64 << 20 for each in extra for size in each.values()), extra


def _onto_cuda(rank: int, path: str) -> None:
    mesh, host = (init_device_mesh(device, (2, 2)) for device in ("cuda", "cpu"))
    full = _full(4) | {
        "large": torch.randn(9000, 1000)
    }  # more than a batch on its way to the device
    placements = [Replicate(), Shard(0)]
    for writer in (h.FileSystemWriter, dcp.FileSystemWriter):
        where = f"{path}/{writer.__module__}"
        dcp.save(_sharded(full, host, placements), storage_writer=writer(where))
        for mode in ("off", "shared", "network"):
            for dtype in (torch.float32, torch.bfloat16):
                blank = {
                    k: torch.zeros_like(v, dtype=dtype, device="cuda") for k, v in full.items()
                }
                state = _sharded(blank, mesh, placements)
                h.load(state, checkpoint_id=where, exchange=mode)  # type: ignore[arg-type]
                for name, tensor in state.items():
                    assert torch.equal(tensor.full_tensor().cpu(), full[name].to(dtype)), (
                        name,
                        mode,
                        dtype,
                    )


@pytest.mark.gpu
def test_cuda_targets(tmp_path: Path) -> None:
    """Gloo with CUDA tensors: NCCL refuses several ranks on one GPU."""
    run_ranks(_onto_cuda, 4, str(tmp_path), backend="cpu:gloo,cuda:gloo")
