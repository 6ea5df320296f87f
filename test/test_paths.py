"""Where a checkpoint is: relative paths, addresses, and names that are not UTF-8."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt import _C


def _state() -> dict[str, torch.Tensor]:
    return {"w": torch.arange(3000.0)}


def _loads(path: str | Path, **options: object) -> bool:
    target = {"w": torch.zeros(3000)}
    h.load(target, checkpoint_id=path, **options)  # type: ignore[arg-type]
    return torch.equal(target["w"], _state()["w"])


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory ``here``, beside ``there``."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def test_relative_paths_are_those_of_the_call(places: Path) -> None:
    _C._inject_fault(lambda op, path: os.chdir(places / "there") or 0 if op == "open" else 0)
    try:
        future = h.async_save(_state(), checkpoint_id="saved")
        os.chdir(places / "there")
        future.result(60)
    finally:
        _C._inject_fault(None)
    assert not any((places / "there").iterdir())
    os.chdir(places / "here")
    assert _loads("saved")
    writer, reader = h.FileSystemWriter("written"), h.FileSystemReader("written")
    os.chdir(places / "there")
    dcp.save(_state(), storage_writer=writer, no_dist=True)
    target = {"w": torch.zeros(3000)}
    dcp.load(target, storage_reader=reader, no_dist=True)
    assert torch.equal(target["w"], _state()["w"])
    assert sorted(p.name for p in (places / "here").iterdir()) == ["saved", "written"]
    assert not any((places / "there").iterdir())


@pytest.mark.parametrize(
    "address",
    ["s3://bucket/c", "gs://b", "memory://run/c", "hf:/b", Path("s3://bucket/c"), "file://c/d"],
)
def test_addresses_are_refused_and_make_no_directory(places: Path, address: str | Path) -> None:
    calls = [
        lambda: h.save(_state(), checkpoint_id=address),
        lambda: h.async_save(_state(), checkpoint_id=address),
        lambda: h.load(_state(), checkpoint_id=address),
        lambda: h.FileSystemWriter(address),
        lambda: h.FileSystemReader(address),
        lambda: h.FileSystemWriter("c").reset(address),
        lambda: h.verify(address),
    ]
    for call in calls:
        with pytest.raises(
            h.CheckpointError,
            match=r"addresses of object stores|a file:// address needs an absolute path",
        ):
            call()
    assert not any((places / "here").iterdir())


def test_file_addresses_are_paths(tmp_path: Path) -> None:
    h.save(_state(), checkpoint_id=f"file://{tmp_path}/c")
    for address in (f"{tmp_path}/c", f"file://localhost{tmp_path}/c", f"file:{tmp_path}/c"):
        assert _loads(address)
        assert h.verify(address).ok
    with pytest.raises(h.CheckpointError, match="percent sign may be meant in two ways"):
        h.verify(f"file://{tmp_path}/a%20b")


def test_other_stores_go_by_their_own_writer_and_reader() -> None:
    pytest.importorskip("fsspec")
    h.save(_state(), storage_writer=FsspecWriter("memory://paths/c"))
    target = {"w": torch.zeros(3000)}
    h.load(target, storage_reader=FsspecReader("memory://paths/c"))
    assert torch.equal(target["w"], _state()["w"])


def test_directories_need_not_be_utf8(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"))
    for _ in range(2):  # the second one over the first
        h.save({**_state(), "n": {"step": 3}}, checkpoint_id=path)
    assert _loads(path)
    assert h.verify(path).ok
    h.async_save(_state(), checkpoint_id=path / "\udcff").result(60)
    dcp.save(_state(), storage_writer=h.FileSystemWriter(path / "d"), no_dist=True)
    target = {"w": torch.zeros(3000)}
    dcp.load(target, storage_reader=h.FileSystemReader(path / "d"), no_dist=True)
    assert torch.equal(target["w"], _state()["w"])
    (file,) = path.glob("*.distcp")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(h.CorruptCheckpointError, match="w"):
        _loads(path)
    file.unlink()
    with pytest.raises(FileNotFoundError) as caught:
        _loads(path)
    assert Path(caught.value.filename) == file
