"""Checkpoints that nobody has to trust: flipped bits, foreign files, ways out, code in pickles."""

import dataclasses
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from small_checkpoints import blank_state, flipped, load_small, save_small, small_state
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt.checkpoint.storage.metadata import encode_metadata, read_metadata


def _notices(path: Path) -> bool:
    """Whether a load refuses the checkpoint: with one of our errors, and with nothing else."""
    try:
        load_small(path)
    except h.CheckpointError:
        return True
    return False


def test_a_flipped_bit_is_one_of_our_errors(tmp_path: Path) -> None:
    """Places of every kind, as a user meets them; test/cpp/flipped_bits_test.cpp flips a bit of
    every byte."""
    path = save_small(tmp_path)
    (data,) = path.glob("*.distcp")
    metadata = path / ".metadata"
    assert not _notices(path)
    chosen = random.Random(1)
    places = [(metadata, chosen.randrange(metadata.stat().st_size)) for _ in range(25)]
    for index, info in read_metadata(metadata).storage_data.items():
        if index.fqn != "empty":  # of which a load reads nothing; verify does
            places += [(data, info.offset + chosen.randrange(info.length)) for _ in range(5)]
            places += [(data, info.offset + at) for at in (0, info.length // 2, info.length - 1)]
    places += [(data, data.stat().st_size - 1 - chosen.randrange(300)) for _ in range(25)]
    for file, at in places:
        with flipped(file, at, chosen.randrange(8)):
            assert not h.verify(path).ok and _notices(path), (file.name, at)
    assert len(places) > 100
    assert h.verify(path).ok and not _notices(path), "all is as it was"


def test_truncated_missing_and_swapped_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save_small(tmp_path / "a")
    other = save_small(tmp_path / "b", state=small_state(2.5))
    stock = save_small(tmp_path / "stock", dcp.FileSystemWriter)
    (data,), (foreign,), (stock_data,) = (p.glob("*.distcp") for p in (path, other, stock))
    whole = data.read_bytes()
    for size in (0, 1, 63, 64, 1000, len(whole) // 2, len(whole) - 1):
        data.write_bytes(whole[:size])
        with pytest.raises(h.CorruptCheckpointError, match=data.name):
            load_small(path)
        assert any(p.file == data.name for p in h.verify(path).problems)
    for others in (
        foreign.read_bytes(),
        stock_data.read_bytes(),
        b"PK\3\4" + bytes(1000),
        whole + b"x",
    ):
        data.write_bytes(others)
        with pytest.raises(h.CorruptCheckpointError, match=data.name):
            load_small(path)
        assert not h.verify(path).ok
    data.unlink()
    with pytest.raises(FileNotFoundError, match=rf"the file of \S+ and 6 more.*{data.name}"):
        load_small(path)
    with pytest.raises(CheckpointException, match=r"the file of \S+ and 6 more"):
        dcp.load(blank_state(), storage_reader=h.FileSystemReader(path), no_dist=True)
    assert not h.verify(path).ok
    data.mkdir()
    with pytest.raises(OSError, match=data.name):
        load_small(path)
    data.rmdir()
    os.mkfifo(data)  # a reader of it would wait for ever
    with pytest.raises(OSError, match=data.name):
        load_small(path)
    metadata = path / ".metadata"
    for make in (os.mkfifo, os.mkdir):  # the same of .metadata, under every way to read it
        metadata.unlink()
        make(metadata)
        with pytest.raises(h.CheckpointError, match=r"\.metadata: not a regular file"):
            load_small(path)
        with pytest.raises(CheckpointException) as raised:
            dcp.load(blank_state(), storage_reader=h.FileSystemReader(path), no_dist=True)
        assert ".metadata: not a regular file" in f"{raised.value}{caplog.text}"
        caplog.clear()
        assert any(p.file == ".metadata" for p in h.verify(path).problems)
    # Stock files: the zip's own checksums.
    raw = stock_data.read_bytes()
    place = next(
        i
        for index, i in read_metadata(stock / ".metadata").storage_data.items()
        if index.fqn == "large"
    )
    stock_data.write_bytes(
        raw[: place.offset + 100_000] + b"\0\1\2" + raw[place.offset + 100_003 :]
    )
    with pytest.raises(h.CorruptCheckpointError, match="large"):
        load_small(stock)
    stock_data.write_bytes(raw[: len(raw) // 2])
    assert _notices(stock)
    assert not h.verify(stock).ok


def test_nothing_outside_the_directory_is_read(tmp_path: Path) -> None:
    path = save_small(tmp_path / "a")
    (data,) = path.glob("*.distcp")
    outside = tmp_path / data.name
    os.rename(data, outside)
    data.symlink_to(outside)
    with pytest.raises(h.CheckpointError, match="link that leads out"):
        load_small(path)
    assert not h.verify(path).ok
    data.unlink()
    (path / "inner").mkdir()
    os.rename(outside, path / "inner" / data.name)
    data.symlink_to(Path("inner") / data.name)  # inside: as good as the file
    assert torch.equal(load_small(path)["large"], small_state()["large"])
    os.rename(path / "inner" / data.name, outside)
    metadata = read_metadata(path / ".metadata")
    for name in (f"../{data.name}", str(outside), f"x/../../{data.name}", ".", ""):
        for info in metadata.storage_data.values():
            info.relative_path = name
        (path / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(h.CorruptCheckpointError, match="inside the checkpoint's directory"):
            load_small(path)
    (tmp_path / "elsewhere").write_bytes(b"secret")
    (path / ".metadata").unlink()
    (path / ".metadata").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(h.CheckpointError, match="link that leads out"):
        load_small(path)


def _chunk(offset: int, size: int) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size([offset, 0]), torch.Size([size, 512]))


@pytest.mark.parametrize(
    "chunks, expected",
    [
        ([], "cover"),
        ([_chunk(0, 519)], "cover"),
        ([_chunk(0, 520), _chunk(519, 1)], "overlap"),
        ([_chunk(1, 519), _chunk(1, 1)], "record"),
    ],
)
@pytest.mark.parametrize("api", ["load", "dcp"])
def test_chunks_that_overlap_or_are_missing(
    tmp_path: Path, chunks: list[Any], expected: str, api: str
) -> None:
    path = save_small(tmp_path)
    metadata = read_metadata(path / ".metadata")
    metadata.state_dict_metadata["large"].chunks = chunks  # type: ignore[union-attr]
    index, info = next((i, v) for i, v in metadata.storage_data.items() if i.fqn == "large")
    if expected == "overlap":
        elsewhere = dataclasses.replace(info, offset=info.offset + (1 << 30))
        metadata.storage_data[type(index)("large", torch.Size([519, 0]))] = elsewhere
    (path / ".metadata").write_bytes(encode_metadata(metadata))
    if api == "load":
        with pytest.raises(h.CorruptCheckpointError, match=f"large.*{expected}"):
            load_small(path)
    else:
        with pytest.raises(CheckpointException, match=f"large.*{expected}"):
            dcp.load(blank_state(), storage_reader=h.FileSystemReader(path), no_dist=True)
    assert any(p.record == "large" for p in h.verify(path).problems)


@pytest.mark.parametrize("writer", [h.FileSystemWriter, dcp.FileSystemWriter])
def test_records_of_other_sizes_than_metadata_says(
    tmp_path: Path, writer: Callable[..., Any]
) -> None:
    path = save_small(tmp_path, writer)
    (data,) = path.glob("*.distcp")
    for name, size in (
        ("large", (521, 512)),
        ("large", (520, 513)),
        ("small", (36,)),
        ("half", (2, 2, 1)),
    ):
        metadata = read_metadata(path / ".metadata")
        metadata.state_dict_metadata[name].size = torch.Size(size)  # type: ignore[union-attr]
        chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), torch.Size(size))
        metadata.state_dict_metadata[name].chunks = [chunk]  # type: ignore[union-attr]
        index = next(i for i in metadata.storage_data if i.fqn == name)
        metadata.storage_data[type(index)(name, chunk.offsets)] = metadata.storage_data.pop(index)
        (tmp_path / "other").mkdir(exist_ok=True)
        shutil.copy2(data, tmp_path / "other")
        (tmp_path / "other" / ".metadata").write_bytes(encode_metadata(metadata))
        state = blank_state() | {name: torch.zeros(size, dtype=blank_state()[name].dtype)}
        with pytest.raises(h.CorruptCheckpointError, match=rf"{data.name}: {name}.*expected"):
            h.load(state, checkpoint_id=tmp_path / "other", no_dist=True)
        with pytest.raises(CheckpointException, match=rf"{data.name}: {name}.*expected"):
            dcp.load(state, storage_reader=h.FileSystemReader(tmp_path / "other"), no_dist=True)
        assert {p.record for p in h.verify(tmp_path / "other").problems} == {name}


def test_targets_that_can_not_be_written_are_named_before_any_is(tmp_path: Path) -> None:
    path = save_small(tmp_path)
    for name, target, why in (
        ("small", torch.zeros(5, 1).expand(5, 7), "expanded"),
        ("half", torch.zeros(3).to_sparse(), "of layout"),
    ):
        state = blank_state() | {name: target}
        with pytest.raises(h.CheckpointError, match=rf"distcp: {name}: the target is {why}"):
            h.load(state, checkpoint_id=path, no_dist=True)
        assert not state["large"].any()


class Code:
    """A pickle that makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


class Value:
    """A harmless class that is not plain data."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Value)

    __hash__ = None  # type: ignore[assignment]


class Planner(dcp.DefaultLoadPlanner):
    """Not the default one, which is planned for natively."""


@pytest.mark.parametrize("writer", [h.FileSystemWriter, dcp.FileSystemWriter])
def test_no_code_in_a_checkpoint_runs(
    tmp_path: Path, writer: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    ran = tmp_path / "ran"
    dcp.save(
        {"evil": Code(str(ran)), "t": torch.ones(3)},
        storage_writer=writer(tmp_path / "c"),
        no_dist=True,
    )

    def blank() -> dict[str, Any]:
        return {"evil": None, "t": torch.zeros(3)}

    untouched = blank()
    with pytest.raises(h.CheckpointError, match=r"(?s)distcp: evil.*trust_objects"):
        h.load(untouched, checkpoint_id=tmp_path / "c", no_dist=True)
    with pytest.raises(h.CheckpointError, match=r"(?s)distcp: evil.*trust_objects"):
        h.load(untouched, checkpoint_id=tmp_path / "c", no_dist=True, planner=Planner())
    with pytest.raises(CheckpointException, match="trust_objects"):
        h.load(blank(), storage_reader=dcp.FileSystemReader(tmp_path / "c"), no_dist=True)
    with pytest.raises(CheckpointException, match="trust_objects"):
        dcp.load(untouched, storage_reader=h.FileSystemReader(tmp_path / "c"), no_dist=True)
    assert (
        not untouched["t"].any() and untouched["evil"] is None
    )  # objects are looked at before a tensor is written
    assert not ran.exists()
    dcp.save(
        {"evil": Value(), "t": torch.ones(3)}, storage_writer=writer(tmp_path / "d"), no_dist=True
    )
    state = blank()
    h.load(state, checkpoint_id=tmp_path / "d", no_dist=True, trust_objects=True)
    assert state["evil"] == Value()
    # .metadata itself
    (tmp_path / "c" / ".metadata").write_bytes(pickle.dumps(Code(str(ran))))
    for load in (
        lambda: h.load(blank(), checkpoint_id=tmp_path / "c", no_dist=True),
        lambda: dcp.load(blank(), storage_reader=h.FileSystemReader(tmp_path / "c"), no_dist=True),
    ):
        caplog.clear()
        with pytest.raises((h.CheckpointError, CheckpointException)) as raised:
            load()
        assert "posix.mkdir" in f"{raised.value}{caplog.text}"
    assert not ran.exists()


def test_a_damaged_metadata_file_says_so_under_stock_load(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Up to torch 2.11 dcp.load drops a reader's errors and raises "metadata is None": the reader's
    log has the reason."""
    path = save_small(tmp_path)
    with flipped(path / ".metadata", 300, 3), pytest.raises(CheckpointException) as raised:
        dcp.load(blank_state(), storage_reader=h.FileSystemReader(path), no_dist=True)
    assert "checksum of the metadata" in f"{raised.value}{caplog.text}"


_LIMITED = """
import resource, sys, torch, torch_hsdp_ckpt as h
limit = resource.getrlimit(resource.RLIMIT_AS)[1]
used = int(next(l for l in open("/proc/self/status") if l.startswith("VmSize")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), limit))
try:
    h.load({"w": torch.zeros(4)}, checkpoint_id=sys.argv[1], no_dist=True)
except h.CorruptCheckpointError as error:
    print("refused:", error)
"""


def test_sizes_that_the_files_do_not_explain_allocate_nothing(tmp_path: Path) -> None:
    path = save_small(tmp_path, state={"w": torch.ones(4), "o": "x"})
    metadata = read_metadata(path / ".metadata")
    for info in metadata.storage_data.values():
        info.length = 1 << 45
    (path / ".metadata").write_bytes(encode_metadata(metadata))
    out = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(path)], capture_output=True, text=True, timeout=120
    )
    assert "refused:" in out.stdout, out.stderr


@pytest.mark.parametrize("writer", [h.FileSystemWriter, dcp.FileSystemWriter])
def test_tensors_made_of_metadata_are_no_larger_than_the_files(
    tmp_path: Path, writer: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Under planners that make the state dict from `.metadata`, as torch's tools do. Nothing may
    have been allocated."""
    large = 1 << 40  # elements

    def huge(metadata: Any, name: str = "w") -> None:
        metadata.state_dict_metadata[name].size = torch.Size([large])
        metadata.state_dict_metadata[name].chunks[0].sizes = torch.Size([large])

    def huge_with_its_length(metadata: Any) -> None:
        huge(metadata)
        next(info for index, info in metadata.storage_data.items() if index.fqn == "w").length = (
            4 * large + 1000
        )

    def many(metadata: Any) -> None:
        for index, info in list(metadata.storage_data.items()):
            for i in range(1000 if index.fqn == "w" else 0):
                metadata.storage_data[type(index)(f"more{i}", index.offset)] = info
                metadata.state_dict_metadata[f"more{i}"] = metadata.state_dict_metadata["w"]

    longer = "distcp: .*a file of"
    cases = (
        (huge, "metadata: w: expected records of"),
        (huge_with_its_length, longer),
        (many, "metadata: w: .*w at .* and more0 at .* in the same place"),
    )
    for number, (change, expected) in enumerate(cases):
        path = save_small(tmp_path / str(number), writer, {"w": torch.ones(3000), "o": {"x": 1}})
        loaded: dict[str, Any] = {}
        h.load(loaded, checkpoint_id=path, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
        assert torch.equal(loaded["w"], torch.ones(3000)) and loaded["o"] == {"x": 1}
        metadata = read_metadata(path / ".metadata")
        change(metadata)
        (path / ".metadata").write_bytes(encode_metadata(metadata))
        with pytest.raises(h.CorruptCheckpointError, match=expected):
            h.load({}, checkpoint_id=path, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
        caplog.clear()
        reader = h.FileSystemReader(path)
        with pytest.raises(CheckpointException) as raised:
            _load_state_dict({}, reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
        assert re.search(expected, f"{raised.value}{caplog.text}"), (raised.value, caplog.text)
        assert "allocat" not in f"{raised.value}{caplog.text}"
