"""What the wrappers of one outermost module share: the schedule, groups for its reductions only,
what ranks agree on."""

import dataclasses
import hashlib
from collections import UserList
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_leaves

from .. import _C
from .unit import ShardedUnit, _weak

# By the group whose ranks they have, or one of those that they span; an entry goes with its group.
_reduce_group_names: "WeakKeyDictionary[dist.ProcessGroup, str]" = WeakKeyDictionary()
_peer_group_names: "WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], str]]" = (
    WeakKeyDictionary()
)

_next_channel = 0  # of the next root: above all that any of its ranks has given to one

_TEXT_WORDS = 64  # of 8 bytes: what a rank says about a module that others don't have


class _DifferentModules(RuntimeError):
    pass


class Root:
    """``units``: of all wrappers, outermost first, each with its name. ``prefetch``: when backward
    starts the next unit's gather. Collective over the mesh; raises RuntimeError on every rank if
    the ranks have wrapped different modules."""

    def __init__(self, units: list[ShardedUnit], prefetch: _C.BackwardPrefetch) -> None:
        global _next_channel
        self.units = units
        channel = _next_channel
        try:
            peers = _peers(units[0].mesh)
            if peers is not None:
                channel = _check_same(peers, units)
        except _DifferentModules:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {dist.get_rank()} is at the first forward of module {units[0].core.name}, "
                "and the other ranks have not "
                f"come there within the group's timeout: {error}"
            ) from error
        _next_channel = max(
            _next_channel, channel + 1
        )  # another thread may have made a root meanwhile
        self.schedule = _C.Schedule(prefetch, dist.get_rank(), peers, _weak(self._end_backward))
        groups: dict[DeviceMesh, tuple[str, str | None] | None] = {}
        for unit in units:
            if unit.mesh not in groups:
                groups[unit.mesh] = _reduce_groups(unit.mesh)
            names = groups[unit.mesh]
            if names is not None:
                unit.collectives.set_reduce_groups(*names)
            unit.collectives.set_channel(channel)
            unit.bind(self.schedule)

    @staticmethod
    def in_backward() -> bool:
        """Whether autograd is running: a forward now is a recomputation."""
        return torch._C._current_graph_task_id() != -1

    def _end_backward(self) -> None:
        for unit in self.units:
            unit.show_sharded()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Within the block forwards and backwards of other threads wait; it waits for them, not for
        this thread's own."""
        turn = self.schedule.take_turn()
        try:
            yield
        finally:
            if turn == _C.ReadTurn.TAKEN:
                self.schedule.end_read()

    @contextmanager
    def reading(self, whole: str = "", put_back: bool = True) -> Iterator[None]:
        """Within the block the sharded parameters are in their slots, and forwards and backwards of
        other threads wait.

        Frees nothing: this rank's peers still have it, or another thread computes with it. Waits
        for such a forward or backward to end. Full parameters that it finds, of this thread's own
        forward or of ``unshard()``, it puts back, if ``put_back``.

        ``whole``: what is going to be gathered within the block, on the groups that forwards and
        backwards use. RuntimeError then, at once, while one is under way in any thread of this
        rank. Its peers do not hear of that."""
        schedule = self.schedule
        turn = schedule.begin_read_if_quiet() if whole else schedule.begin_read()
        first = turn == _C.ReadTurn.TAKEN
        if turn == _C.ReadTurn.BUSY:
            raise RuntimeError(
                f"rank {dist.get_rank()}: the {whole} of module {self.units[0].core.name} was "
                "asked for while a forward or "
                "backward of it is under way. It is collective: ask on every rank between the same "
                "steps, in the thread that "
                "trains, or take the sharded one, which sends nothing"
            )
        shown: list[ShardedUnit] = []
        try:
            if (
                first or self.schedule.running_here()
            ):  # else in a wrapper's state_dict(), for one within
                shown = [unit for unit in self.units if unit.showing_full]
                self._end_backward()
            yield
        finally:
            for unit in shown if put_back else ():
                unit.show_full()
            if first:
                self.schedule.end_read()

    def reset(self) -> None:
        """The sharded parameters are in their slots and nothing derived from them is in flight.
        Waits for other threads; raises RuntimeError inside of this thread's own forward or
        backward."""
        if self.schedule.running_here():
            raise RuntimeError(
                f"rank {dist.get_rank()}: module {self.units[0].core.name} is in a forward or "
                "backward of this thread: what "
                "frees or changes its parameters (load_state_dict, zero_grad, clip_grad_norm_, to, "
                "summon_full_params) has to "
                "come after it"
            )
        self.schedule.reset()
        with self.reading(put_back=False):
            pass


def _timeout(group: dist.ProcessGroup, device_type: str) -> timedelta | None:
    """What a group was made with; its backend's default where the backend doesn't say."""
    backend: Any = group._get_backend(torch.device(device_type))
    return getattr(getattr(backend, "options", None), "_timeout", None)


def _reduce_groups(mesh: DeviceMesh) -> tuple[str, str | None] | None:
    """Names of other groups with the ranks of ``mesh``'s, or None where the mesh's own must do.

    Ranks may find that a unit's gradients are complete at different moments of their backwards. In
    one group such a reduction would meet another rank's gather. Made once for each group of a mesh:
    they cost threads and sockets."""
    if mesh.device_type != "cpu" and mesh.size() != dist.get_world_size():
        # NCCL may split the default communicator for a new group, which every rank of the job would
        # have to join.
        return None
    names: list[str | None] = []
    for dim in (mesh.ndim - 1, 0) if mesh.ndim == 2 else (0,):
        group = mesh.get_group(dim)
        if dist.get_world_size(group) == 1:
            names.append(group.group_name)
            continue
        if group not in _reduce_group_names:
            new: Any = dist.new_group(
                dist.get_process_group_ranks(group),
                timeout=_timeout(group, mesh.device_type),
                backend=str(dist.get_backend_config(group)),
                use_local_synchronization=True,
                group_desc="hsdp_ckpt_reduce",
            )
            _reduce_group_names[group] = new.group_name
        names.append(_reduce_group_names[group])
    return str(names[0]), names[1] if mesh.ndim == 2 else None


def _peers(mesh: DeviceMesh) -> _C.Peers | None:
    """Over all ranks of ``mesh``, on a Gloo group of its own that is made once; None for one rank,
    and under torch's "fake" backend, where the other ranks do not exist."""
    ranks = sorted(int(rank) for rank in mesh.mesh.flatten())
    if len(ranks) == 1:
        return None
    group = mesh.get_group(mesh.ndim - 1)
    if dist.get_backend(group) == "fake":
        return None
    names = _peer_group_names.setdefault(group, {})
    if tuple(ranks) not in names:
        new: Any = dist.new_group(
            ranks,
            timeout=_timeout(group, mesh.device_type),
            backend="gloo",
            use_local_synchronization=True,
            group_desc="hsdp_ckpt_peers",
        )
        names[tuple(ranks)] = new.group_name
    return _C.Peers(names[tuple(ranks)], ranks)


def _words(data: bytes) -> list[int]:
    return [int.from_bytes(data[i : i + 8], "little", signed=True) for i in range(0, len(data), 8)]


def _check_same(peers: _C.Peers, units: list[ShardedUnit]) -> int:
    """All ranks have the same units, in the same order; RuntimeError on every rank with the first
    one that differs. Returns a channel that none of the ranks has used."""
    described = [unit.describe() for unit in units]
    digests = [hashlib.sha256(text.encode()).digest() for text in described]
    everyone = peers.exchange(
        [_next_channel, len(units), *_words(hashlib.sha256(b"".join(digests)).digest())]
    )
    if all(words[1:] == everyone[0][1:] for words in everyone):
        return max(words[0] for words in everyone)
    count = max(words[1] for words in everyone)
    short = [_words(digest)[0] for digest in digests] + [0] * (count - len(digests))
    by_rank = peers.exchange(short)
    first = next(i for i in range(count) if len({words[i] for words in by_rank}) > 1)
    own = described[first] if first < len(described) else "no further module"
    texts = peers.exchange(_words(own.encode()[: 8 * _TEXT_WORDS].ljust(8 * _TEXT_WORDS, b"\0")))
    lines = []
    for rank, words in zip(
        sorted(int(rank) for rank in units[0].mesh.mesh.flatten()), texts, strict=True
    ):
        text = (
            b"".join(word.to_bytes(8, "little", signed=True) for word in words)
            .rstrip(b"\0")
            .decode(errors="replace")
        )
        lines.append(f"rank {rank}: {text}")
    raise _DifferentModules(
        f"ranks have wrapped different modules (this is rank {dist.get_rank()}). Wrap the same "
        "ones, with the same arguments, "
        "on all ranks. The first that differs:\n\t" + "\n\t".join(lines)
    )


def flat_tensors(outputs: Any) -> list[torch.Tensor]:
    """The tensors in a module's result, whatever pytrees, dataclasses, mappings, lists and sets
    they are in."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    found: list[torch.Tensor] = []
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            for field in dataclasses.fields(leaf):
                found += flat_tensors(getattr(leaf, field.name))
        elif isinstance(leaf, Mapping):  # subclasses of dict are no pytrees
            found += flat_tensors(list(leaf.values()))
        elif isinstance(leaf, (list, tuple, Set, UserList)):
            found += flat_tensors(list(leaf))
    return found
