"""Whose a record is: what files say, and what is found out when they lie elsewhere."""

import dataclasses
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import run_ranks
from torch.distributed.checkpoint.api import CheckpointException
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
        metadata.storage_data[places[other][0]] = places[one][1]
        (tmp_path / ".metadata").write_bytes(encode_metadata(metadata)[:-24])
        problems = h.verify(tmp_path).problems
        assert {problem.record for problem in problems} == {one, other}


_STOCK_ROWS = 8


def _save_by_stock(rank: int, path: str) -> None:
    """What the two ranks hold lies in the same places of their files, so that no size says which
    is whose."""
    mesh = mesh_of((2,))
    whole = [torch.arange(_STOCK_ROWS * 4.0).view(_STOCK_ROWS, 4) + 100 * i for i in range(2)]
    state = {f"w{i}": distribute_tensor(each, mesh, [Shard(0)]) for i, each in enumerate(whole)}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(path))


def _loads_of_stock(path: Path) -> list[dict[str, Any]]:
    """What each way to load gives; nothing for those that refuse, with an error that is ours."""
    loaded = []
    for by_dcp in (False, True):
        target = {f"w{i}": torch.zeros(_STOCK_ROWS, 4) for i in range(2)}
        try:
            if by_dcp:
                dcp.load(target, storage_reader=h.FileSystemReader(path), no_dist=True)
            else:
                h.load(target, checkpoint_id=path, no_dist=True)
        except CheckpointException:
            continue
        loaded.append(target)
    return loaded


def test_flips_in_stocks_metadata_load_right_values_or_none(tmp_path: Path) -> None:
    """It has no checksum. A name of a file that becomes the other rank's, or a place in it that
    becomes another record's, gives two records the same bytes."""
    run_ranks(_save_by_stock, 2, str(tmp_path))
    metadata = tmp_path / ".metadata"
    whole = metadata.read_bytes()
    right = _loads_of_stock(tmp_path)
    assert len(right) == 2
    chosen = random.Random(3)
    ranks = [whole.index(name) + 2 for name in (b"__0_0.distcp", b"__1_0.distcp")]
    places = [(at, 0) for at in ranks]  # one rank's number becomes the other's
    places += [(chosen.randrange(len(whole)), chosen.randrange(8)) for _ in range(300)]
    refused = []
    for at, bit in places:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << bit
        metadata.write_bytes(damaged)
        loaded = _loads_of_stock(tmp_path)
        for target in loaded:
            for name, tensor in target.items():
                assert torch.equal(tensor, right[0][name]), (at, bit, name)
        refused.append(len(loaded) == 0)
        if at in ranks:
            assert not h.verify(tmp_path).ok
    assert all(refused[:2]) and not all(refused)


def test_two_records_in_one_place_are_found_out(tmp_path: Path) -> None:
    state = {name: torch.full((9,), float(i)) for i, name in enumerate("abc")}
    for side in (h, dcp):
        path = tmp_path / side.__name__
        side.save(state, checkpoint_id=path, no_dist=True)
        metadata = read_metadata(path / ".metadata")
        places = {index.fqn: (index, it) for index, it in metadata.storage_data.items()}
        (index, place), (_, other) = places["b"], places["c"]
        # The same bytes, and some of them.
        for changed in (other, dataclasses.replace(place, offset=other.offset - 1)):
            metadata.storage_data[index] = changed
            (path / ".metadata").write_bytes(encode_metadata(metadata))
            for name in ("a", "b"):  # whichever is read
                with pytest.raises(h.CorruptCheckpointError, match="in the same place"):
                    h.load({name: torch.zeros(9)}, checkpoint_id=path, no_dist=True)
            assert any("in the same place" in it.message for it in h.verify(path).problems)


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
