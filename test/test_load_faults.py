"""Loads that go wrong on one rank, ranks that die in them, and directories that are saved over
meanwhile."""

import errno
import itertools
import os
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
from load_states import OtherPlanner, blank_state, full_tensors, save_state
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt import _C
from torch_hsdp_ckpt.checkpoint.load import load as _load
from torch_hsdp_ckpt.checkpoint.load import plan as _plan


class _MakesItself:
    """An object that only trust loads."""

    def __reduce__(self) -> Any:
        return _MakesItself, ()


class _Raises:
    def __init__(self, rank: int) -> None:
        self.rank = rank

    def state_dict(self) -> dict[str, Any]:
        if self.rank == 1:
            raise ArithmeticError("no state")
        return {"x": torch.ones(2)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def _at_read(number: int, act: Callable[[], int]) -> None:
    """From now on ``act`` is asked what this process's read ``number`` of tensors shall do in each
    load: see _inject_fault."""
    read = _load.read
    _C._inject_fault(None)  # files that are opened from now on can be asked

    def reading(*arguments: Any) -> Any:
        calls = itertools.count(1)
        _C._inject_fault(lambda op, path: act() if op == "pread" and next(calls) == number else 0)
        try:
            return read(*arguments)
        finally:
            _C._inject_fault(None)

    _load.read = reading


def _rank_fails(rank: int, path: str) -> None:
    """Damage that only one rank meets, or that only one replica reads, is every rank's error, in
    every mode."""
    mesh, hybrid = init_device_mesh(DEVICE, (2, 2)), [Replicate(), Shard(0)]
    full = full_tensors(3)
    # In the second case the ranks of one shard fail before those of the other one know, and before
    # the plain tensors' turn.
    for damaged, name in (("plain", "plain"), ("w.even", r"w\.even")):
        save_state(full, mesh, hybrid, path, h.FileSystemWriter)
        if rank == 0:
            storage = dcp.FileSystemReader(path).read_metadata().storage_data
            place = next(place for index, place in storage.items() if index.fqn == damaged)
            with open(f"{path}/{place.relative_path}", "r+b") as file:
                file.seek(place.offset + place.length // 2)
                byte = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte[0] ^ 1]))
        dist.barrier()
        for mode in ("off", "shared", "network"):
            with pytest.raises(
                h.CorruptCheckpointError, match=rf"rank \d.*distcp: {name}.*written in part"
            ):
                h.load(blank_state(mesh, hybrid), checkpoint_id=path, exchange=mode)  # type: ignore[arg-type]
    state = blank_state(mesh, hybrid)
    if rank == 2:
        state["w"]["more"] = torch.zeros(3)
    with pytest.raises(
        h.CheckpointError, match=r"rank 2.*Missing key in checkpoint state_dict: w\.more"
    ):
        h.load(state, checkpoint_id=path)
    with pytest.raises(FileNotFoundError):
        h.load(state, checkpoint_id=f"{path}/none")
    if rank == 0:
        os.mkdir(f"{path}/fifo")
        os.mkfifo(f"{path}/fifo/.metadata")
    dist.barrier()
    with pytest.raises(h.CheckpointError, match=r"rank 0.*fifo/\.metadata: not a regular file"):
        h.load(state, checkpoint_id=f"{path}/fifo")
    # An object that only one rank asks for is refused before any rank's tensors are written.
    ones = {"w": torch.ones(6000, 1000), "path": _MakesItself()}
    h.save(ones, checkpoint_id=f"{path}/object", trust_objects=True)
    for mode in ("off", "shared", "network"):
        state = {"w": torch.zeros(6000, 1000)} | ({"path": None} if rank == 1 else {})
        with pytest.raises(
            h.CheckpointError, match=r"(?s)rank 1.*distcp: path.*trust_objects"
        ) as refused:
            h.load(state, checkpoint_id=f"{path}/object", exchange=mode)  # type: ignore[arg-type]
        assert not state["w"].any() and "in part" not in str(refused.value)
    # What the operating system refuses while tensors are read: the same error, and more of it.
    _at_read(2, lambda: -errno.EIO)
    for mode in ("off", "shared", "network"):
        with pytest.raises(OSError, match="written in part") as error:
            h.load({"w": torch.zeros(6000, 1000)}, checkpoint_id=f"{path}/object", exchange=mode)  # type: ignore[arg-type]
        assert error.value.errno == errno.EIO and str(error.value.filename).endswith(".distcp"), (
            mode
        )
    raising = {"it": _Raises(rank)}
    for call in (h.load, h.save):
        with pytest.raises(h.CheckpointError, match="rank 1: ArithmeticError: no state"):
            call(raising, checkpoint_id=path)


def test_a_ranks_failure_is_every_ranks(tmp_path: Path) -> None:
    run_ranks(_rank_fails, 4, str(tmp_path))


DEATHS = [  # how replicas share, where one is killed, and which: the coordinator or the other
    ("off", "plan", 0),
    ("off", "read", 1),
    ("shared", "plan", 1),
    ("shared", "read", 0),
    ("network", "plan", 0),
    ("network", "read", 1),
]


def _dies(rank: int, path: str) -> str | None:
    """Pairs of ranks, of which one is killed while it plans, or when it has read its first piece,
    of three or more of 2 MiB."""
    pair, role = divmod(rank, 2)
    mode, point, who = DEATHS[pair]
    group = dist.new_group([2 * pair, 2 * pair + 1], use_local_synchronization=True)
    state = {"w": torch.zeros(3000, 1000), "step": None}
    h.load(state, checkpoint_id=path, process_group=group, exchange=mode)  # type: ignore[arg-type]
    dist.barrier()  # no rank of another pair waits for one that dies

    def killed(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    if role == who and point == "plan":
        _plan.plan_natively = killed
    elif role == who:
        _at_read(2, killed)
    with pytest.raises(h.CheckpointError, match="gets no answer") as error:
        h.load(state, checkpoint_id=path, process_group=group, exchange=mode)  # type: ignore[arg-type]
    assert ("written in part" in str(error.value)) == (point == "read")
    state["w"].zero_()
    h.load(
        state, checkpoint_id=path, no_dist=True
    )  # what is left of the failed load is in nobody's way
    assert (state["w"] == 1).all()
    return mode


def test_a_rank_that_dies_is_the_others_error(tmp_path: Path) -> None:
    """And at once: the process group's timeout, half an hour, is longer than this test's."""
    h.save({"w": torch.ones(3000, 1000), "step": 1}, checkpoint_id=tmp_path, no_dist=True)
    died = tuple(2 * pair + who for pair, (_, _, who) in enumerate(DEATHS))
    ended = run_ranks(_dies, 2 * len(DEATHS), str(tmp_path), allow_death=died)
    assert [ended[rank] is None for rank in range(len(ended))] == [
        rank in died for rank in range(len(ended))
    ]


class _Replaced(h.FileSystemReader):
    """Behind the first read of .metadata a newer save commits and removes the files of the one that
    was read."""

    done = False

    def read_metadata_file(self, rank: int | None = None) -> bytes:
        file = super().read_metadata_file(rank)
        if not _Replaced.done:
            _Replaced.done = True
            for data in Path(self.path).glob("__*.distcp"):
                data.unlink()
            for newer in (Path(self.path) / "2").iterdir():
                os.rename(newer, Path(self.path) / newer.name)
        return file


def _saved_over(rank: int, path: str) -> None:
    """A save goes through while this load has read .metadata and opened nothing yet."""
    mesh = init_device_mesh(DEVICE, (2,))

    first = {"w": distribute_tensor(torch.ones(600, 100), mesh, [Shard(0)])}
    dcp.save(first, storage_writer=h.FileSystemWriter(path))
    second = {"w": distribute_tensor(torch.full((600, 100), 2.0), mesh, [Shard(0)])}
    dcp.save(second, storage_writer=h.FileSystemWriter(f"{path}/2"))
    reader = (_Replaced if rank == 0 else h.FileSystemReader)(path)
    dist.barrier()
    state = {"w": distribute_tensor(torch.zeros(600, 100), mesh, [Shard(0)])}
    h.load(state, storage_reader=reader)
    assert torch.equal(state["w"].full_tensor(), torch.full((600, 100), 2.0))
    if rank == 0:
        for data in Path(path).glob("__*.distcp"):
            data.unlink()
    dist.barrier()
    with pytest.raises(
        FileNotFoundError, match="distcp"
    ):  # nobody has saved since: the files are just not there
        h.load(state, checkpoint_id=path)


def test_a_directory_that_is_saved_over_gives_one_generation(tmp_path: Path) -> None:
    run_ranks(_saved_over, 2, str(tmp_path))


def _many_saves(rank: int, path: str) -> list[int]:
    """Ranks 0 and 1 save over one directory again and again, while ranks 2 and 3 load from it: what
    these have seen."""
    mesh = init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("task", "shard"))["shard"]
    group = mesh.get_group()

    def state(value: float) -> dict[str, Any]:
        tensors = {f"t{i}": torch.full((100 + 37 * i, 300), value) for i in range(8)}
        return {k: distribute_tensor(v, mesh, [Shard(0)]) for k, v in tensors.items()} | {
            "generation": int(value)
        }

    done = Path(path) / "done"
    if rank < 2:
        h.save(state(1), checkpoint_id=f"{path}/c", process_group=group)
    dist.barrier()
    seen = []
    for number in range(2, 400):
        if rank < 2:
            h.save(state(number), checkpoint_id=f"{path}/c", process_group=group)
            stop = [done.exists()]
            dist.broadcast_object_list(stop, group_src=0, group=group)
            if stop[0]:
                break
            time.sleep(0.05)
            continue
        loaded = state(0)
        planner = OtherPlanner() if number % 2 else None
        h.load(loaded, checkpoint_id=f"{path}/c", process_group=group, planner=planner)
        seen.append(loaded["generation"])
        for name, value in loaded.items():
            assert name == "generation" or (value.to_local() == seen[-1]).all(), (name, seen[-1])
        if len(seen) == 12:
            break
    if rank == 2:
        done.touch()
    return seen


def test_loads_while_others_save_over_the_directory(tmp_path: Path) -> None:
    _, _, seen, other = run_ranks(_many_saves, 4, str(tmp_path))
    assert len(seen) == 12 and seen == other  # no two ranks read different generations
    assert seen == sorted(seen) and len(set(seen)) > 2


def _arguments_of_one_rank(rank: int, path: str) -> None:
    h.save({"w": torch.ones(2)}, checkpoint_id=path)
    wrong: dict[str, Any] = {
        "checkpoint_id": ("s3://bucket/c", None),
        "allow": (5, ["Phase"]),
        "state_dict": (None,),
    }
    for name, values in wrong.items():
        for value in values:
            arguments: dict[str, Any] = {"state_dict": {"w": torch.zeros(2)}, "checkpoint_id": path}
            if rank == 1:
                arguments[name] = value
            expected = (h.CheckpointError, TypeError, ValueError) if rank else h.CheckpointError
            with pytest.raises(expected, match="" if rank else "rank 1"):
                h.load(**arguments)
    state = {"w": torch.zeros(2)}
    h.load(state, checkpoint_id=path)
    assert state["w"].all()


def test_arguments_that_one_rank_alone_can_not_load_with(tmp_path: Path) -> None:
    """The others do not wait for it."""
    run_ranks(_arguments_of_one_rank, 2, str(tmp_path), timeout=30.0)
