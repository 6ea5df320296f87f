"""What the storage writer and reader refuse, and what a refused save leaves."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import torch_hsdp_ckpt as h


class _Refuses(dcp.DefaultSavePlanner):
    def resolve_data(self, write_item: Any) -> Any:
        if write_item.index.fqn == "z":
            raise ValueError("no such data")
        return super().resolve_data(write_item)


def test_a_half_written_file_goes_while_the_error_is_kept(tmp_path: Path) -> None:
    state = {"a": torch.randn(1 << 20), "z": torch.ones(3)}
    with pytest.raises(CheckpointException, match="no such data") as kept:
        dcp.save(
            state, storage_writer=h.FileSystemWriter(tmp_path), planner=_Refuses(), no_dist=True
        )
    assert os.listdir(tmp_path) == []
    assert kept.value.failures


@pytest.mark.parametrize("save", ["save", "lazy", "copy", "dcp"])
def test_a_tensor_without_values_is_an_error_that_names_it(tmp_path: Path, save: str) -> None:
    state = {"here": torch.ones(3), "there": torch.empty(3, device="meta")}
    with pytest.raises(
        (h.CheckpointError, CheckpointException), match="there is on the meta device"
    ):
        if save == "save":
            h.save(state, checkpoint_id=tmp_path, no_dist=True)
        elif save == "dcp":
            dcp.save(state, storage_writer=h.FileSystemWriter(tmp_path), no_dist=True)
        else:
            h.async_save(state, checkpoint_id=tmp_path, no_dist=True, snapshot=save).result()
    assert not (tmp_path / ".metadata").exists()


def test_freed_memory_is_an_error_that_names_the_tensor(tmp_path: Path) -> None:
    freed = torch.ones(1000)
    dcp.save({"freed": freed}, storage_writer=h.FileSystemWriter(tmp_path), no_dist=True)
    before = sorted(os.listdir(tmp_path))
    freed.untyped_storage().resize_(0)
    with pytest.raises(CheckpointException, match=r"freed: shape .1000. needs 4000 bytes"):
        dcp.save({"freed": freed}, storage_writer=h.FileSystemWriter(tmp_path), no_dist=True)
    assert sorted(os.listdir(tmp_path)) == before
    with pytest.raises(CheckpointException, match=r"freed: shape .1000. needs 4000 bytes"):
        dcp.load({"freed": freed}, storage_reader=h.FileSystemReader(tmp_path), no_dist=True)
