"""Everything that reads a checkpoint in stock torch, on files of ours; and what stock torch has written, on our reader."""

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import format_utils
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict, _load_state_dict_from_keys

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt._metadata import read_metadata


def _state() -> dict[str, Any]:
    return {"model": {"w": torch.arange(300_000.0).reshape(300, 1000), "b": torch.arange(7)}, "step": 3}


def _equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a["step"] == b["step"] and all(torch.equal(a["model"][k], b["model"][k]) for k in ("w", "b"))


def test_format_utils_on_our_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = _state()
    dcp.save(state, storage_writer=h.FileSystemWriter(tmp_path / "c"), no_dist=True)
    format_utils.dcp_to_torch_save(tmp_path / "c", tmp_path / "one.pt")
    assert _equal(torch.load(tmp_path / "one.pt", weights_only=True), state)
    format_utils.torch_save_to_dcp(tmp_path / "one.pt", tmp_path / "d")  # stock's, read by us
    loaded: dict[str, Any] = {"model": {"w": torch.zeros(300, 1000), "b": torch.zeros(7, dtype=torch.int64)}, "step": None}
    h.load(loaded, checkpoint_id=tmp_path / "d", no_dist=True)
    assert _equal(loaded, state)
    # With our reader in the same code.
    monkeypatch.setattr(format_utils, "FileSystemReader", h.FileSystemReader)
    format_utils.dcp_to_torch_save(tmp_path / "c", tmp_path / "two.pt")
    assert _equal(torch.load(tmp_path / "two.pt", weights_only=True), state)
    for reader in (h.FileSystemReader, dcp.FileSystemReader):
        some = _load_state_dict_from_keys({"model.w"}, storage_reader=reader(tmp_path / "c"))
        assert torch.equal(some["model"]["w"], state["model"]["w"])
        assert _equal(_load_state_dict_from_keys(storage_reader=reader(tmp_path / "c")), state)
    rebuilt: dict[str, Any] = {}
    _load_state_dict(rebuilt, h.FileSystemReader(tmp_path / "c"), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    assert _equal(rebuilt, state)


def _rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Every record of a stock checkpoint, changed, in one file; as if another torch had written it."""
    metadata = read_metadata(path / ".metadata")
    out = bytearray()
    for info in metadata.storage_data.values():
        record = change((path / info.relative_path).read_bytes()[info.offset : info.offset + info.length])
        info.relative_path, info.offset, info.length = "__0_9.distcp", len(out), len(record)
        out += record
    (path / "__0_9.distcp").write_bytes(out)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def _legacy(record: bytes) -> bytes:
    stream = io.BytesIO()
    value = torch.load(io.BytesIO(record), weights_only=True)
    torch.save(value, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def _old_zip(record: bytes) -> bytes:
    """As before torch 2.4: no .format_version, no .storage_alignment, no byteorder with a big alignment."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(record)) as source, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as target:
        for entry in source.infolist():
            if not entry.filename.rpartition("/")[2].startswith("."):
                target.writestr(entry.filename, source.read(entry))
    return out.getvalue()


@pytest.mark.parametrize("change", [_legacy, _old_zip])
def test_records_of_other_torches(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    state = _state()
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    _rewrite(tmp_path, change)
    for load in (
        lambda s: h.load(s, checkpoint_id=tmp_path, no_dist=True),
        lambda s: dcp.load(s, storage_reader=h.FileSystemReader(tmp_path), no_dist=True),
    ):
        loaded = {"model": {"w": torch.zeros(300, 1000), "b": torch.zeros(7, dtype=torch.int64)}, "step": None}
        load(loaded)
        assert _equal(loaded, state)
    report = h.verify(tmp_path)
    assert report.ok, report.problems
