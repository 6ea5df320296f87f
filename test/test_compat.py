"""Everything that reads a checkpoint in stock torch, on files of ours; and what stock torch has
written, on our reader."""

import runpy
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from device import DEVICE
from ranks import run_ranks
from torch.distributed.checkpoint import format_utils
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import (
    _load_state_dict,
    _load_state_dict_from_keys,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._pytree import tree_flatten_with_path, tree_map

import torch_hsdp_ckpt as h


def _state() -> dict[str, Any]:
    return {
        "model": {"w": torch.arange(300_000.0).reshape(300, 1000), "b": torch.arange(7)},
        "step": 3,
    }


def _equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a["step"] == b["step"] and all(
        torch.equal(a["model"][k], b["model"][k]) for k in ("w", "b")
    )


def test_format_utils_on_our_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = _state()
    dcp.save(state, storage_writer=h.FileSystemWriter(tmp_path / "c"), no_dist=True)
    format_utils.dcp_to_torch_save(tmp_path / "c", tmp_path / "one.pt")
    assert _equal(torch.load(tmp_path / "one.pt", weights_only=True), state)
    format_utils.torch_save_to_dcp(tmp_path / "one.pt", tmp_path / "d")  # stock's, read by us
    loaded: dict[str, Any] = {
        "model": {"w": torch.zeros(300, 1000), "b": torch.zeros(7, dtype=torch.int64)},
        "step": None,
    }
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
    _load_state_dict(
        rebuilt,
        h.FileSystemReader(tmp_path / "c"),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    assert _equal(rebuilt, state)


STOCK = sorted((Path(__file__).parent / "data" / "stock").glob("stock_*.tar.xz"))


def test_checkpoints_of_every_stock_torch_are_there() -> None:
    """Each is what that torch itself wrote: see data/stock/make.py."""
    versions = [tuple(map(int, path.name.split("_")[1].split(".")[:2])) for path in STOCK]
    assert sorted(versions) == [(2, minor) for minor in range(3, 16)]


@pytest.mark.parametrize(
    "archive", STOCK, ids=lambda path: path.name.split("_")[1].removesuffix(".tar.xz")
)
def test_what_every_stock_torch_wrote_is_read(tmp_path: Path, archive: Path) -> None:
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path)  # our own file
    expected: dict[str, Any] = runpy.run_path(str(archive.parent / "make.py"))["values"]()
    for kind in ("alone", "zip", "legacy"):
        want = dict(expected)
        if kind != "alone":
            rows = {"even": 6, "odd": 5, "one": 1}
            want["sharded"] = {
                name: torch.arange(count * 4.0).reshape(count, 4) for name, count in rows.items()
            }
        for load in (
            lambda s, path=tmp_path / kind: h.load(s, checkpoint_id=path, no_dist=True),
            lambda s, path=tmp_path / kind: dcp.load(
                s, storage_reader=h.FileSystemReader(path), no_dist=True
            ),
        ):
            state = tree_map(
                lambda v: torch.zeros_like(v) if isinstance(v, torch.Tensor) else None, want
            )
            load(state)
            for (path, value), (_, loaded) in zip(
                *(tree_flatten_with_path(tree)[0] for tree in (want, state)), strict=True
            ):
                same = (
                    torch.equal(loaded, value)
                    if isinstance(value, torch.Tensor)
                    else loaded == value
                )
                assert same, (kind, path, loaded)
        report = h.verify(tmp_path / kind)
        assert report.ok, report.problems
        assert bool(report.unchecked) == (kind == "legacy"), (
            report.unchecked
        )  # that format has no checksum


def _torch_save_file(rank: int, path: str) -> None:
    """A file by torch.save, made of a checkpoint of ours, which one rank reads and broadcasts,
    under both loads. Into plain tensors: torch's reader has no others on the ranks that do not
    read."""
    mesh = init_device_mesh(DEVICE, (2,))
    full = {"w": torch.arange(5000.0).reshape(50, 100), "v": torch.arange(7.0)}
    h.save(
        {k: distribute_tensor(v, mesh, [Shard(0)]) for k, v in full.items()},
        checkpoint_id=f"{path}/c",
    )
    if rank == 0:
        format_utils.dcp_to_torch_save(f"{path}/c", f"{path}/one.pt")
    dist.barrier()
    for load in (dcp.load, h.load):
        state = {k: torch.zeros_like(v) for k, v in full.items()}
        reader = format_utils.BroadcastingTorchSaveReader(f"{path}/one.pt")
        load(state, storage_reader=reader, planner=format_utils.DynamicMetaLoadPlanner())  # type: ignore[operator]
        assert all(torch.equal(state[k], v) for k, v in full.items())


def test_broadcasting_reader_of_torch_save_files(tmp_path: Path) -> None:
    run_ranks(_torch_save_file, 2, str(tmp_path))
