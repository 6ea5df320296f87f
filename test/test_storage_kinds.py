"""Kinds of values and ways of saving that are rare: each works in all directions in which stock
torch's own storage works."""

import errno
import io
import logging
import os
import tempfile
import threading
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from device import DEVICE, cpu_only
from ranks import run_ranks
from torch.distributed._shard.sharded_tensor import ShardedTensor, init_from_local_shards
from torch.distributed._shard.sharded_tensor.shard import Shard
from torch.distributed.checkpoint._extension import ExtensionRegistry, StreamTransformExtension
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import Shard as ShardOn
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt.checkpoint.save import through_dcp

WRITERS: dict[str, Any] = {"ours": h.FileSystemWriter, "stock": dcp.FileSystemWriter}
READERS: dict[str, Any] = {"ours": h.FileSystemReader, "stock": dcp.FileSystemReader}
PAIRS = [("ours", "ours"), ("ours", "stock"), ("stock", "ours")]


def _sharded_tensor(rank: int, full: torch.Tensor) -> ShardedTensor:
    """Rank r holds rows r, r + 4, ... as shards of one row each: several shards a rank, not in
    order."""
    rows = range(rank, full.shape[0], dist.get_world_size())
    width = full.shape[1]
    shards = [Shard.from_tensor_and_offsets(full[r : r + 1].clone(), [r, 0], rank) for r in rows]
    return init_from_local_shards(shards, full.shape[0], width)


def _local_shards(rank: int, full: torch.Tensor) -> DTensor:
    """As torchrec's tables come: a DTensor whose local part is a list of shards, here columns; two
    ranks have none."""
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    columns = {0: (0, 1), 1: (2,)}.get(rank, ())
    local = LocalShardsWrapper(
        [full[:, c : c + 1].clone() for c in columns], [(0, c) for c in columns]
    )
    return DTensor.from_local(
        local, mesh, [ShardOn(1)], run_check=False, shape=full.shape, stride=full.stride()
    )


def _sharded_tensors(rank: int, root: str) -> None:
    full = torch.arange(10 * 3, dtype=torch.float32).reshape(10, 3)
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    for writer, reader in PAIRS:
        path = f"{root}/{writer}"
        dcp.save(
            {"w": _sharded_tensor(rank, full), "t": _local_shards(rank, full)},
            storage_writer=WRITERS[writer](path),
        )
        if (writer, reader) == (
            "ours",
            "stock",
        ):  # and by `save`, which gathers such tensors' plans
            h.save(
                {"w": _sharded_tensor(rank, full), "t": _local_shards(rank, full)},
                checkpoint_id=path,
            )
        like, parts = (
            _sharded_tensor(rank, torch.zeros_like(full)),
            _local_shards(rank, torch.zeros_like(full)),
        )
        load = h.load if (writer, reader) == ("ours", "ours") else dcp.load
        load({"w": like, "t": parts}, storage_reader=READERS[reader](path))
        for shard in like.local_shards():
            row = shard.metadata.shard_offsets[0]
            assert torch.equal(shard.tensor, full[row : row + 1]), (writer, reader, row)
        expected_parts = _local_shards(rank, full)._local_tensor.local_shards()
        for part, expected in zip(parts._local_tensor.local_shards(), expected_parts, strict=True):
            assert torch.equal(part, expected), (writer, reader)
        # Into another kind, placed in another way.
        for name in ("w", "t"):
            columns = distribute_tensor(torch.zeros_like(full), mesh, [ShardOn(1)])
            dcp.load({name: columns}, storage_reader=READERS[reader](path))
            assert torch.equal(columns.full_tensor(), full), (writer, reader, name)


def test_sharded_tensors(tmp_path: Path) -> None:
    run_ranks(_sharded_tensors, 4, str(tmp_path))


def _quantized() -> dict[str, torch.Tensor]:
    values = torch.linspace(-1, 1, 12).reshape(3, 4)
    scales, zeros = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 1, 2])
    return {
        "per tensor": torch.quantize_per_tensor(values, 0.05, 3, torch.qint8),
        "per channel": torch.quantize_per_channel(values, scales, zeros, 0, torch.quint8),
    }


@cpu_only("torch copies no quantized tensors to the simulated device")
@pytest.mark.filterwarnings("ignore")  # torch warns that its quantized tensors go away
@pytest.mark.parametrize("writer, reader", [("stock", "stock"), *PAIRS])
def test_quantized_tensors(tmp_path: Path, writer: str, reader: str) -> None:
    state = _quantized()
    dcp.save(dict(state), storage_writer=WRITERS[writer](tmp_path), no_dist=True)
    if (writer, reader) == ("ours", "stock"):
        h.save(dict(state), checkpoint_id=tmp_path, no_dist=True)
    like = {
        key: torch.quantize_per_tensor(torch.zeros(3, 4), 0.05, 3, torch.qint8)
        if key == "per tensor"
        else torch.quantize_per_channel(
            torch.zeros(3, 4),
            value.q_per_channel_scales(),
            value.q_per_channel_zero_points(),
            0,
            torch.quint8,
        )
        for key, value in state.items()
    }
    dcp.load(like, storage_reader=READERS[reader](tmp_path), no_dist=True)
    for key, value in state.items():
        assert torch.equal(like[key].int_repr(), value.int_repr()), key
        assert torch.equal(like[key].dequantize(), value.dequantize()), key


class _Deflate(StreamTransformExtension):
    """A compression of the user's own, as DCP's experimental extensions let one plug it in."""

    @staticmethod
    def registry_name() -> str:
        return "stream.deflate"

    @staticmethod
    def from_descriptor(version: str) -> "_Deflate":
        return _Deflate()

    def get_descriptor(self) -> str:
        return "stream.deflate/1"

    def transform_to(self, output: IO[bytes]) -> IO[bytes]:
        class Writer(io.RawIOBase):
            compressor = zlib.compressobj()

            def writable(self) -> bool:
                return True

            def write(self, data: Any) -> int:
                output.write(self.compressor.compress(bytes(data)))
                return len(data)

            def flush(self) -> None:
                output.write(self.compressor.flush(zlib.Z_SYNC_FLUSH))

        return Writer()  # type: ignore[return-value]

    def transform_from(self, input: IO[bytes]) -> IO[bytes]:
        return io.BytesIO(zlib.decompressobj().decompress(input.read()))


def _registry() -> ExtensionRegistry:
    registry = ExtensionRegistry()
    registry.register(_Deflate)
    return registry


@pytest.fixture
def says_that_dcp_plans(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], bool]:
    """Whether ``save`` has said so: once a process for each reason, here once a test."""
    monkeypatch.setattr(through_dcp, "_said", set())
    caplog.set_level(logging.INFO, logger="torch_hsdp_ckpt")
    says = (
        "DCP plans this save: the storage writer is a FileSystemWriter or writes through torch's "
        "own code"
    )
    return lambda: says in caplog.text


SAVES = [
    ("dcp", "stock", "stock"),
    *(("dcp", *pair) for pair in PAIRS),
    ("ours", "ours", "ours"),
    ("ours", "ours", "stock"),
]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("by, writer, reader", SAVES)
def test_extensions_go_through_torchs_own_code(
    tmp_path: Path, by: str, writer: str, reader: str, says_that_dcp_plans: Callable[[], bool]
) -> None:
    state = {"w": torch.zeros(1 << 18), "v": torch.arange(10.0), "words": ["some", "words"]}
    save = h.save if by == "ours" else dcp.save
    save(
        dict(state),
        storage_writer=WRITERS[writer](tmp_path, _extensions=[_Deflate()]),
        no_dist=True,
    )
    assert says_that_dcp_plans() == (by == "ours")
    assert sum(file.stat().st_size for file in tmp_path.glob("*.distcp")) < 100_000, (
        "it was compressed"
    )
    like: dict[str, Any] = {"w": torch.ones(1 << 18), "v": torch.zeros(10), "words": None}
    read = READERS[reader](tmp_path, _extension_registry=_registry())
    dcp.load(like, storage_reader=read, no_dist=True)
    assert torch.equal(like["w"], state["w"])
    assert torch.equal(like["v"], state["v"])
    assert like["words"] == state["words"]
    if reader == "ours":
        with pytest.raises(CheckpointException, match=r"stream\.deflate"):
            dcp.load(like, storage_reader=h.FileSystemReader(tmp_path), no_dist=True)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("by", ["dcp", "ours"])
def test_safetensors_go_through_torchs_own_code(
    tmp_path: Path, by: str, says_that_dcp_plans: Callable[[], bool]
) -> None:
    from safetensors.torch import load_file

    writer = h.FileSystemWriter(tmp_path, serialization_format=SerializationFormat.SAFETENSORS)
    save = h.save if by == "ours" else dcp.save
    save({"w": torch.arange(6.0)}, storage_writer=writer, no_dist=True)
    assert says_that_dcp_plans() == (by == "ours")
    (file,) = tmp_path.glob("*.distcp")
    assert torch.equal(load_file(file)["w"], torch.arange(6.0))


class _Failing(_Deflate):
    """Fails in torch's second thread, while its first one waits for that."""

    failed = threading.Event()

    def transform_to(self, output: IO[bytes]) -> IO[bytes]:
        if threading.current_thread() is not threading.main_thread():
            self.failed.set()
            raise OSError(errno.ENOSPC, "disk full")
        assert self.failed.wait(60)
        return super().transform_to(output)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_a_thread_of_torchs_raises_fails_the_save(tmp_path: Path) -> None:
    """Torch's own code goes on without the tensors of that thread: the checkpoint would be
    committed without them."""
    writer = h.FileSystemWriter(tmp_path, _extensions=[_Deflate()], thread_count=2)
    dcp.save({"w": torch.arange(10.0), "v": torch.arange(9.0)}, storage_writer=writer, no_dist=True)
    before = sorted(os.listdir(tmp_path))
    writer = h.FileSystemWriter(tmp_path, _extensions=[_Failing()], thread_count=2)
    with pytest.raises(
        CheckpointException, match=r"torch's own code has not written [vw], and 0 more of 2"
    ):
        dcp.save({"w": torch.zeros(10), "v": torch.zeros(9)}, storage_writer=writer, no_dist=True)
    assert sorted(os.listdir(tmp_path)) == before
    like = {"w": torch.zeros(10), "v": torch.zeros(9)}
    dcp.load(
        like,
        storage_reader=h.FileSystemReader(tmp_path, _extension_registry=_registry()),
        no_dist=True,
    )
    assert torch.equal(like["w"], torch.arange(10.0))
    assert torch.equal(like["v"], torch.arange(9.0))


def _without_collectives(rank: int, root: str, kinds: Sequence[tuple[str, str]]) -> None:
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    for writer, reader in kinds:
        path = f"{root}/{writer}-{reader}"
        for value in (1.0, 2.0):  # the second saves over the first, each rank its own
            full = torch.arange(12.0).reshape(6, 2) * value
            state = {
                "w": distribute_tensor(full, mesh, [ShardOn(0)]),
                "rank": torch.tensor(rank),
                "note": f"rank {rank}",
            }
            dcp.save(dict(state), storage_writer=WRITERS[writer](path), use_collectives=False)
        like: dict[str, Any] = {
            "w": distribute_tensor(torch.zeros(6, 2), mesh, [ShardOn(0)]),
            "rank": torch.tensor(-1),
            "note": "",
        }
        dcp.load(like, storage_reader=READERS[reader](path))
        assert torch.equal(like["w"].to_local(), state["w"].to_local()), (writer, reader)
        assert like["rank"].item() == rank
        assert like["note"] == f"rank {rank}"
        dist.barrier()
        if writer == "ours":
            files = [name for name in os.listdir(path) if name.endswith(".distcp")]
            assert len(files) == dist.get_world_size(), f"the older save's files are gone: {files}"


def test_without_collectives(tmp_path: Path) -> None:
    run_ranks(_without_collectives, 2, str(tmp_path), [("stock", "stock"), *PAIRS])


def _as_nobody(rank: int, path: str) -> list[int]:
    """The ranks whose errors this rank's save names."""
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    state = {"w": distribute_tensor(torch.ones(6), mesh, [ShardOn(0)])}
    h.save(state, checkpoint_id=f"{path}-warm")
    if os.geteuid() == 0:  # root may write anywhere
        dcp.save(
            state, storage_writer=h.FileSystemWriter(f"{path}-warm")
        )  # imports what only root may read
        dcp.load(state, storage_reader=h.FileSystemReader(f"{path}-warm"))
        os.seteuid(65534)
    with pytest.raises(CheckpointException) as caught:
        dcp.save(state, storage_writer=h.FileSystemWriter(path))
    refused = caught.value.failures
    for error, _ in refused.values():
        assert isinstance(error, PermissionError)
        assert str(error.filename).startswith(path)
    with pytest.raises(PermissionError, match="rank 0") as ours:
        h.save(state, checkpoint_id=path)
    assert ours.value.errno == errno.EACCES
    assert str(ours.value.filename).startswith(path)
    like = {"w": distribute_tensor(torch.zeros(6), mesh, [ShardOn(0)])}
    dcp.load(like, storage_reader=h.FileSystemReader(path))
    assert torch.equal(like["w"].full_tensor(), torch.arange(6.0)), (
        "the checkpoint that was there loads"
    )
    return sorted(refused)


@cpu_only("another user has no part in the simulated device")
def test_a_directory_that_is_not_ours_to_write() -> None:
    with tempfile.TemporaryDirectory() as scratch:  # pytest keeps its own for the owner alone
        os.chmod(scratch, 0o755)
        target = Path(scratch) / "checkpoint"
        dcp.save({"w": torch.arange(6.0)}, storage_writer=h.FileSystemWriter(target), no_dist=True)
        target.chmod(0o555)
        before = sorted(os.listdir(target))
        # The coordinator claims the directory before anybody writes: its error is the one there is,
        # and both ranks raise it.
        assert run_ranks(_as_nobody, 2, str(target)) == [[0], [0]]
        assert sorted(os.listdir(target)) == before


@cpu_only("a simulated device has 8 GiB")
def test_a_record_beyond_4_gib(tmp_path: Path) -> None:
    """The zip format's 32-bit fields overflow there. The source is memory that nobody has touched,
    but for its ends."""
    size = (1 << 32) + 5
    needed = 2 * size + (4 << 30)  # the target, and stock torch's copy of the record
    free = (
        int(
            next(line for line in open("/proc/meminfo") if line.startswith("MemAvailable")).split()[
                1
            ]
        )
        << 10
    )
    if free < needed or os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize < size + (
        1 << 30
    ):
        pytest.skip(f"needs {needed >> 30} GiB of memory and {size >> 30} GiB of disk")
    source = torch.zeros(size, dtype=torch.uint8)
    source[0], source[-1] = 3, 7
    dcp.save(
        {"big": source, "after": torch.arange(3.0)},
        storage_writer=h.FileSystemWriter(tmp_path),
        no_dist=True,
    )
    for reader in READERS.values():
        like = {"big": torch.zeros(size, dtype=torch.uint8), "after": torch.zeros(3)}
        like["big"][1 << 20] = 1
        dcp.load(like, storage_reader=reader(tmp_path), no_dist=True)
        ends = [int(like["big"][at]) for at in (0, 1, 1 << 20, -2, -1)]
        assert ends == [3, 0, 0, 0, 7]
        assert int(like["big"].count_nonzero()) == 2
        assert torch.equal(like["after"], torch.arange(3.0))
        del like
