"""The storage writer and reader under stock ``dcp.save`` and ``dcp.load``: interoperation, damage,
and saves that fail."""

import copy
import os
import pickle
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from device import DEVICE
from ranks import run_ranks
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt import _C

WRITERS = {"ours": h.FileSystemWriter, "stock": dcp.FileSystemWriter}
READERS = {"ours": h.FileSystemReader, "stock": dcp.FileSystemReader}
PAIRS = [("ours", "ours"), ("ours", "stock"), ("stock", "ours")]


def _state(seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    return {
        "large": torch.randn(1500, 1024, generator=g),
        "transposed": torch.randn(50, 60, generator=g).t(),
        "slice": torch.arange(1000)[10:20],
        "expanded": torch.randn(1, 3, generator=g).expand(4, 3),
        "conjugated": torch.randn(4, dtype=torch.complex64, generator=g).conj(),
        "scalar": torch.tensor(float(seed)),
        "empty": torch.empty(0, 3),
        "nested": {
            "list": [1, torch.full((2,), seed), {"x": "text"}],
            "bytes": b"abc",
            "none": None,
            "float": 0.5 + seed,
        },
    }


def _like(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, dict):
        return {k: _like(v) for k, v in value.items()}
    return [_like(v) for v in value] if isinstance(value, list) else None


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    return all(map(_equal, a, b)) if isinstance(a, list) else bool(a == b)


def _save(
    state: dict[str, Any],
    path: Path,
    writer: Callable[..., Any] = h.FileSystemWriter,
    **options: Any,
) -> None:
    dcp.save(state, storage_writer=writer(path, **options), no_dist=True)


def _load(
    like: dict[str, Any], path: Path, reader: Callable[..., Any] = h.FileSystemReader
) -> dict[str, Any]:
    dcp.load(like, storage_reader=reader(path), no_dist=True)
    return like


@pytest.mark.parametrize("writer, reader", PAIRS)
def test_plain_values_and_tensors_of_all_forms(tmp_path: Path, writer: str, reader: str) -> None:
    state = _state(3)
    _save(state, tmp_path, WRITERS[writer])
    assert _equal(_load(_like(state), tmp_path, READERS[reader]), state)


@pytest.mark.parametrize("writer, reader", PAIRS)
def test_every_dtype(tmp_path: Path, writer: str, reader: str) -> None:
    state = {}
    for name in _C.record_dtypes():
        if dtype := getattr(torch, name, None):
            raw = torch.arange(64 * dtype.itemsize, dtype=torch.uint8) % (
                2 if name == "bool" else 120
            )
            state[name] = raw.view(dtype).reshape(8, -1)
    assert len(state) >= 22
    _save(state, tmp_path, WRITERS[writer])
    loaded = _load({k: torch.empty_like(v) for k, v in state.items()}, tmp_path, READERS[reader])
    for name, tensor in state.items():
        assert torch.equal(loaded[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_one_file_a_tensor_threads_and_view_bytes(tmp_path: Path) -> None:
    state = {"view": torch.zeros(1 << 20)[:10], "other": torch.ones(5)}
    _save(state, tmp_path, single_file_per_rank=False, thread_count=3, sync_files=False)
    files = list(tmp_path.glob("*.distcp"))
    assert len(files) == 2
    assert all(file.stat().st_size < 2000 for file in files)
    assert _equal(_load(_like(state), tmp_path), state)


def test_writer_and_reader_copy_and_pickle(tmp_path: Path) -> None:
    state = _state()
    for clone in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        dcp.save(state, storage_writer=clone(h.FileSystemWriter(tmp_path)), no_dist=True)
        like = _like(state)
        dcp.load(like, storage_reader=clone(h.FileSystemReader(tmp_path)), no_dist=True)
        assert _equal(like, state)


def test_saving_again_replaces_and_removes(tmp_path: Path) -> None:
    _save(_state(1), tmp_path, dcp.FileSystemWriter)
    for seed in (2, 3):
        _save(_state(seed), tmp_path)
        assert _equal(_load(_like(_state()), tmp_path), _state(seed))
        assert len(os.listdir(tmp_path)) == 2
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(CheckpointException, match="overwrite=False"):
        _save(_state(4), tmp_path, overwrite=False)
    assert sorted(os.listdir(tmp_path)) == before


def test_names_of_tensors_are_no_names_of_files(tmp_path: Path) -> None:
    """Only what the older metadata names as a record's file goes with it."""
    dcp.save({"__7_0.distcp": torch.ones(2)}, checkpoint_id=tmp_path, no_dist=True)
    (tmp_path / "__7_0.distcp").write_text("somebody's")
    h.save({"a": torch.ones(2)}, checkpoint_id=tmp_path, no_dist=True)
    files = {path.name for path in tmp_path.iterdir()}
    assert "__7_0.distcp" in files and "__0_0.distcp" not in files, files


@pytest.mark.parametrize("value", [torch.ones(2), 3])
@pytest.mark.parametrize("save", [h.save, h.async_save])
def test_a_name_without_utf8_is_refused_by_name(
    tmp_path: Path, save: Callable[..., Any], value: Any
) -> None:
    path = tmp_path / "checkpoint"
    with pytest.raises(h.CheckpointError, match=r"'\\udc80': a name that has no UTF-8"):
        saved = save({"\udc80": value}, checkpoint_id=path, no_dist=True)
        saved.result(60)
    assert not path.exists() or not list(path.iterdir())


def test_a_directory_that_nobody_may_write_to_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DCP asks for a directory above that may be written to, and finds no storage writer without
    one."""
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    _C._inject_fault(lambda op, path: -13 if op == "mkdir" else 0)
    try:
        with pytest.raises(PermissionError) as error:
            h.save({"a": torch.ones(2)}, checkpoint_id=str(tmp_path / "checkpoint"), no_dist=True)
    finally:
        _C._inject_fault(None)
    assert error.value.filename == str(tmp_path / "checkpoint")


class _OwnPath(type(Path())):  # type: ignore[misc]
    pass


@pytest.mark.parametrize(
    "save",
    [h.save, lambda state, **where: dcp.save(state, storage_writer=h.FileSystemWriter(**where))],
)
def test_a_directory_of_any_class_that_names_one(tmp_path: Path, save: Callable[..., Any]) -> None:
    where = {"checkpoint_id" if save is h.save else "path": _OwnPath(tmp_path / "checkpoint")}
    save({"a": torch.ones(2)}, **where)
    meta = dcp.FileSystemReader(tmp_path / "checkpoint").read_metadata()
    assert meta.storage_meta is not None
    assert type(meta.storage_meta.checkpoint_id) is type(Path())


def test_damage_anywhere_is_noticed(tmp_path: Path) -> None:
    state = _state()
    _save(state, tmp_path)
    (data,) = tmp_path.glob("*.distcp")
    stored = h.FileSystemReader(tmp_path).read_metadata().storage_data
    infos = [
        info for index, info in stored.items() if index.fqn != "empty"
    ]  # DCP's planner reads nothing of that one
    whole = data.read_bytes()
    places = [info.offset + at for info in infos for at in (0, info.length // 2, info.length - 1)]
    for at in [*places, len(whole) - 100, len(whole) - 1]:
        data.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(CheckpointException, match="CorruptCheckpointError"):
            _load(_like(state), tmp_path)
    data.write_bytes(whole)
    metadata = tmp_path / ".metadata"
    raw = metadata.read_bytes()
    metadata.write_bytes(raw[:200] + bytes([raw[200] ^ 1]) + raw[201:])
    with pytest.raises(h.CorruptCheckpointError):
        h.FileSystemReader(tmp_path).read_metadata()


def test_a_full_disk_keeps_the_older_checkpoint(tmp_path: Path) -> None:
    import resource

    _save(_state(1), tmp_path)
    before = sorted(os.listdir(tmp_path))
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(CheckpointException, match="distcp"):
            _save(_state(2), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert sorted(os.listdir(tmp_path)) == before
    assert _equal(_load(_like(_state()), tmp_path), _state(1))


def _sharded(rank: int, path: str, writer: str, reader: str) -> None:
    mesh = init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("replicate", "shard"))
    flat = init_device_mesh(DEVICE, (4,))
    full = {f"w{n}": torch.arange(n * 3, dtype=torch.float32).reshape(n, 3) for n in (1, 2, 5, 8)}
    state: dict[str, Any] = {
        k: distribute_tensor(v, mesh, [Replicate(), Shard(0)]) for k, v in full.items()
    }
    state["columns"] = distribute_tensor(full["w5"], flat, [Shard(1)])
    state["step"] = torch.tensor(7)
    dcp.save(state, storage_writer=WRITERS[writer](path))
    for placements, over in (
        [[Shard(0)], flat],
        [[Shard(1)], flat],
        [[Replicate()], flat],
        [[Replicate(), Shard(0)], mesh],
    ):
        like: dict[str, Any] = {
            k: distribute_tensor(torch.zeros_like(v), over, placements) for k, v in full.items()
        }
        like["columns"] = distribute_tensor(torch.zeros_like(full["w5"]), over, placements)
        dcp.load(like, storage_reader=READERS[reader](path))
        for key, tensor in like.items():
            assert isinstance(tensor, DTensor)
            assert torch.equal(tensor.full_tensor(), full["w5" if key == "columns" else key]), (
                key,
                placements,
            )


@pytest.mark.parametrize("writer, reader", PAIRS)
def test_dtensors_are_resharded(tmp_path: Path, writer: str, reader: str) -> None:
    run_ranks(_sharded, 4, str(tmp_path), writer, reader)


def _async(rank: int, path: str) -> None:
    state = {"w": torch.full((100,), 3.0), "n": 4}
    future = dcp.async_save(state, storage_writer=h.FileSystemWriter(path))
    state["w"].zero_()  # the save has its own copy by now
    future.result()
    like = {"w": torch.zeros(100), "n": None}
    dcp.load(like, storage_reader=h.FileSystemReader(path))
    assert like["n"] == 4
    assert torch.equal(like["w"], torch.full((100,), 3.0))


def test_async_save_in_a_thread(tmp_path: Path) -> None:
    run_ranks(_async, 2, str(tmp_path))


class _Fails(h.FileSystemWriter):
    """Fails or dies on one rank where ``when`` says: before its data, after it, or on the
    coordinator at the commit."""

    when = ""

    def write_data(self, plan: Any, planner: Any) -> Any:
        self._at("before")
        result = super().write_data(plan, planner)
        self._at("after")
        return result

    def finish(self, metadata: Any, results: Any) -> None:
        self._at("commit")
        super().finish(metadata, results)

    def _at(self, point: str) -> None:
        action, rank, when = self.when.split()
        if when == point and dist.get_rank() == int(rank):
            if action == "raise":
                raise OSError(5, "disk on fire")
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)


def _failing(rank: int, path: str, when: str) -> None:
    mesh = init_device_mesh(DEVICE, (2,))
    old = {"w": distribute_tensor(torch.arange(5000.0), mesh, [Shard(0)])}
    dcp.save(old, storage_writer=h.FileSystemWriter(path))
    writer = _Fails(path)
    writer.when = when
    new = {"w": distribute_tensor(torch.arange(5000.0) + 1, mesh, [Shard(0)])}
    # A peer that raises is DCP's to report, one that died is Gloo's.
    with pytest.raises(CheckpointException if when.startswith("raise") else RuntimeError):
        dcp.save(new, storage_writer=writer)


@pytest.mark.parametrize("action", ["raise", "kill"])
@pytest.mark.parametrize("where", ["0 before", "1 before", "0 after", "1 after", "0 commit"])
def test_a_rank_that_fails_or_dies_leaves_the_older_checkpoint(
    tmp_path: Path, action: str, where: str
) -> None:
    died = (int(where[0]),) if action == "kill" else ()
    run_ranks(_failing, 2, str(tmp_path), f"{action} {where}", allow_death=died)
    assert torch.equal(_load({"w": torch.zeros(5000)}, tmp_path)["w"], torch.arange(5000.0))
    _save({"w": torch.ones(3)}, tmp_path)
    assert len(os.listdir(tmp_path)) == 2, "what the dead save left is gone"
