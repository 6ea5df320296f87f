"""Whose a record is: what files say, and what is found out when they lie elsewhere."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import run_ranks
from torch.distributed.tensor import Shard, distribute_tensor
from training import mesh_of

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt.checkpoint.storage.metadata import encode_metadata, read_metadata

_ROWS = 1024


def _save(rank: int, path: str) -> None:
    mesh = mesh_of((2,))
    whole = torch.arange(_ROWS * 64.0).view(_ROWS, 64)
    state = {"w": distribute_tensor(whole, mesh, [Shard(0)])}
    h.save(state, checkpoint_id=f"{path}/ours")
    dcp.save(state, storage_writer=h.FileSystemWriter(f"{path}/under dcp"))
    h.async_save(state, checkpoint_id=f"{path}/async").result(60)
    ragged = {f"of rank {rank}": torch.ones(1), "w": state["w"]}  # what DCP plans is in it
    h.save(ragged, checkpoint_id=f"{path}/gathered")


def _exchange(first: Path, second: Path) -> None:
    between = first.with_name("between")
    first.rename(between)
    second.rename(first)
    between.rename(second)


def _refused(path: Path, target: dict[str, Any]) -> None:
    report = h.verify(path)
    assert not report.ok
    assert any("another tensor, chunk or object" in it.message for it in report.problems)
    for load in (
        lambda: h.load(target, checkpoint_id=path),
        lambda: dcp.load(target, storage_reader=h.FileSystemReader(path), no_dist=True),
    ):
        with pytest.raises(BaseException, match="another tensor, chunk or object"):
            load()


def test_data_files_that_change_places(tmp_path: Path) -> None:
    run_ranks(_save, 2, str(tmp_path))
    for name in ("ours", "under dcp", "async", "gathered"):
        path = tmp_path / name
        target = {"w": torch.zeros(_ROWS, 64)}
        h.load(target, checkpoint_id=path)
        assert torch.equal(target["w"], torch.arange(_ROWS * 64.0).view(_ROWS, 64)), name
        assert h.verify(path).ok
        _exchange(*path.glob("*.distcp"))
        _refused(path, {"w": torch.zeros(_ROWS, 64)})


def _state() -> dict[str, Any]:
    return {"a": torch.zeros(9), "b": torch.ones(9), "x": {"o": {1}}, "y": {"o": {2}}}


def _files(path: Path) -> None:
    writer = h.FileSystemWriter(path, single_file_per_rank=False)
    h.save(_state(), storage_writer=writer)


def test_files_of_one_record_each_and_of_objects(tmp_path: Path) -> None:
    for one, other in (("a", "b"), ("x.o", "y.o")):
        path = tmp_path / one
        _files(path)
        files = {
            index.fqn: it.relative_path
            for index, it in read_metadata(path / ".metadata").storage_data.items()
        }
        _exchange(path / files[one], path / files[other])
        _refused(path, _state())


def test_metadata_that_names_another_record(tmp_path: Path) -> None:
    """Also where its own checksum is right, as when a tool has written it."""
    changes: dict[str, Callable[[Any], Any]] = {}
    path = tmp_path / "c"
    h.save(_state(), checkpoint_id=path)
    metadata = read_metadata(path / ".metadata")
    places = {index.fqn: (index, it) for index, it in metadata.storage_data.items()}
    for one, other in itertools.permutations(("a", "b"), 2):
        index, _ = places[one]
        metadata.storage_data[index] = places[other][1]
        changes[one] = metadata.storage_data[index]
    (path / ".metadata").write_bytes(encode_metadata(metadata))
    _refused(path, _state())
    assert len(changes) == 2


def test_stocks_files_are_checked_by_dtype_and_shape(tmp_path: Path) -> None:
    """All that they say, and by ``verify``: two records alike can change places."""
    state = {"a": torch.zeros(9), "b": torch.ones(8), "c": torch.ones(9, dtype=torch.int32)}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    original = read_metadata(tmp_path / ".metadata")
    places = {index.fqn: (index, it) for index, it in original.storage_data.items()}
    for one, other in itertools.permutations(places, 2):
        metadata = dataclasses.replace(original, storage_data=dict(original.storage_data))
        metadata.storage_data[places[one][0]] = places[other][1]
        (tmp_path / ".metadata").write_bytes(encode_metadata(metadata)[:-24])
        problems = h.verify(tmp_path).problems
        assert [problem.record for problem in problems] == [one]


def test_files_of_the_first_index_have_no_owners() -> None:
    path = Path(__file__).parent / "data" / "index_version_1"
    state: dict[str, Any] = {
        "weight": torch.zeros(3, 4),
        "half": torch.zeros(5, dtype=torch.bfloat16),
        "step": 0,
    }
    h.load(state, checkpoint_id=path)
    torch.testing.assert_close(state["weight"], torch.arange(12.0).view(3, 4))
    torch.testing.assert_close(state["half"], torch.full((5,), 1.5, dtype=torch.bfloat16))
    assert state["step"] == 7
    assert not h.verify(path).problems
