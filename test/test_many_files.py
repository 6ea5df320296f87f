"""More data files than a process may open at a time."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from ranks import run_ranks

import torch_hsdp_ckpt as h

_FILES = 300
_LIMIT = 128


@contextmanager
def _limited(files: int) -> Iterator[None]:
    """The process may have so many descriptors more than it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + files, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _state() -> dict[str, Any]:
    return {f"t{i:03}": torch.full((5,), float(i)) for i in range(_FILES)} | {"o": {"n": 7}}


def _loads(path: Path | str) -> None:
    for load in (
        lambda state: h.load(state, checkpoint_id=path),
        lambda state: dcp.load(state, storage_reader=h.FileSystemReader(path)),
    ):
        state = {k: torch.zeros(5) for k in _state() if k != "o"} | {"o": {"n": 0}}
        load(state)
        assert state["o"]["n"] == 7
        assert all(torch.equal(state[k], v) for k, v in _state().items() if k != "o")


def test_more_files_than_descriptors(tmp_path: Path) -> None:
    h.save(
        _state(),
        storage_writer=h.FileSystemWriter(tmp_path / "ours", single_file_per_rank=False),
    )
    dcp.save(
        _state(),
        storage_writer=dcp.FileSystemWriter(tmp_path / "stock", single_file_per_rank=False),
        no_dist=True,
    )
    before = len(os.listdir("/proc/self/fd"))
    for limit in (_LIMIT, 24):
        with _limited(limit):
            for name in ("ours", "stock"):
                _loads(tmp_path / name)
                assert h.verify(tmp_path / name).ok
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    run_ranks(_load_on_ranks, 2, str(tmp_path))


def _load_on_ranks(rank: int, path: str) -> None:
    torch.distributed.barrier()
    _loads(f"{path}/ours")  # the groups are made
    with _limited(40):
        _loads(f"{path}/ours")
