"""What the tests of failing saves share: faults at one call of the file system, and what a save
must leave as it was."""

import errno
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from device import DEVICE
from ranks import run_ranks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt import _C

Call = tuple[
    str, str
]  # the operating system's call, and what it is about: "claim", "data", "metadata" or "directory"
Scenario = tuple[int, int]  # the rank of a pair that is killed, and the number of the call
OLD = torch.arange(50000.0)
_ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.EACCES)
_PAIRS = 8  # scenarios at a time: each is two ranks of its own


def about(path: str) -> str:
    name = os.path.basename(path)
    if name.endswith(".tmp"):
        return "claim"
    return (
        "data"
        if name.endswith(".distcp")
        else "metadata"
        if name.endswith(".metadata")
        else "directory"
    )


def at_call(number: int, act: Callable[[str], int]) -> Callable[[], bool]:
    """From now on this process's file system calls are counted, and ``act`` is asked, with the
    call's path, what number ``number`` shall do: 0, a negative errno, or a number of bytes. Returns
    whether it was reached."""
    calls: list[str] = []

    def fault(op: str, path: str) -> int:
        calls.append(path)
        return act(path) if len(calls) == number + 1 else 0

    _C._inject_fault(fault)
    return lambda: len(calls) > number


def errors_for(calls: Sequence[Call]) -> list[int]:
    """What each of a save's calls is refused with, in turn. Of the first directory that is synced,
    the one above the checkpoint's, EIO: other errors say that it is one that holds no entry of
    ours."""
    errors = [_ERRORS[number % len(_ERRORS)] for number in range(len(calls))]
    errors[calls.index(("fsync", "directory"))] = errno.EIO
    return errors


def is_about_older_files(calls: Sequence[Call], number: int) -> bool:
    """Whether a call of a save, up to the rename, is about what others have left there: the look
    for it behind the claim, and the reading of the older metadata. Where such a call is refused the
    save goes on with a warning, and leaves the older files."""
    if ("close", "claim") not in calls:
        return False  # not the coordinator's calls
    claimed = calls.index(("close", "claim")) + 2  # and has seen that no later claim is there
    return claimed <= number < calls.index(("open", "data")) or calls[number][1] == "metadata"


def no_fault() -> None:
    _C._inject_fault(None)


def calls_of(work: Callable[[], Any]) -> list[Call]:
    """The file system calls that ``work`` makes, in their order."""
    calls: list[Call] = []
    _C._inject_fault(lambda op, path: calls.append((op, about(path))) or 0)  # type: ignore[func-returns-value]
    work()
    no_fault()
    return calls


def over_an_older_one(
    path: str, save: Callable[[Any], Any]
) -> tuple[dict[str, Any], dict[str, Any], list[list[Call]]]:
    """Two ranks: an older checkpoint in ``path``, what is saved over it, and the calls that either
    rank's ``save`` makes."""
    mesh = pair_mesh()
    old, new = sharded(OLD, mesh), sharded(OLD + 1, mesh)
    h.save(old, checkpoint_id=path)
    calls: list[Any] = [None, None]
    dist.all_gather_object(calls, calls_of(lambda: save(old)))
    return old, new, calls


def about_to_be_killed(rank: int, scenarios: Sequence[Scenario]) -> tuple[str, Any]:
    """For pairs of ranks, a scenario each: the name of its directory and the pair's process group.
    From now on the call of the rank that the scenario names kills it."""
    pair, role = divmod(rank, 2)
    group = dist.new_group([2 * pair, 2 * pair + 1], use_local_synchronization=True)
    who, call = scenarios[pair]
    dist.barrier()  # no rank of another pair waits for one that dies
    if role == who:
        at_call(call, lambda path: os.kill(os.getpid(), signal.SIGKILL) or 0)  # type: ignore[func-returns-value]
    return f"{who}-{call}", group


def kill_at_every_call(
    root: Path, calls: Sequence[Sequence[Call]], save: Callable[[int, str, Any], None]
) -> list[Scenario]:
    """Runs ``save(rank, root, scenarios)`` over a copy of ``root``/old for each call of either
    rank. Returns all scenarios."""
    scenarios = [(who, call) for who in (0, 1) for call in range(len(calls[who]))]
    for who, call in scenarios:
        shutil.copytree(root / "old", root / f"{who}-{call}")
    for first in range(0, len(scenarios), _PAIRS):
        batch = scenarios[first : first + _PAIRS]
        died = tuple(2 * pair + who for pair, (who, _) in enumerate(batch))
        run_ranks(save, 2 * len(batch), str(root), batch, allow_death=died)
    return scenarios


def pair_mesh() -> DeviceMesh:
    return init_device_mesh(DEVICE, (1, 2), mesh_dim_names=("replicate", "shard"))


def sharded(tensor: torch.Tensor, mesh: DeviceMesh) -> dict[str, Any]:
    return {"w": distribute_tensor(tensor, mesh, [Replicate(), Shard(0)])}


def loaded(path: str | Path, size: int = 50000, name: str = "w") -> torch.Tensor:
    like = {name: torch.zeros(size)}
    h.load(like, checkpoint_id=path, no_dist=True)
    return like[name]


def process_is_as_it_was(path: str | None = None) -> Callable[[], bool]:
    """Whether no descriptor and no thread is new (those of earlier tests may go meanwhile), and the
    directory, if one is given, is the same."""

    def now() -> tuple[set[str], set[str], set[str]]:
        files = set() if path is None else set(os.listdir(path))
        return set(os.listdir("/proc/self/fd")), set(os.listdir("/proc/self/task")), files

    before = now()

    def unchanged() -> bool:
        descriptors, threads, files = now()
        return descriptors <= before[0] and threads <= before[1] and files == before[2]

    return unchanged
