"""Process groups that are made for models and go with them.

Only the ranks of such a group take part in making it, and nothing that torch counts moves: its
``new_group`` names groups by the number of calls so far, which differs between ranks as soon as
some of them have made a group among themselves, and the next group that they all make then hangs.
"""

import contextlib
import hashlib
import weakref
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .. import _C
from ..common.agreement import group_timeout
from ..common.devices import device_types
from ..common.meeting import meet_at

_c10d: Any = dist.distributed_c10d


class GroupRequest(NamedTuple):
    """What a group is to be. All of its ranks ask for the same, in the same order.

    ``scope``: what tells groups of the same ranks apart. ``ranks``: in the default group, in the
    order that they have in this one."""

    scope: str
    ranks: tuple[int, ...]
    timeout: timedelta

    def key(self) -> str:
        described = repr((self.scope, self.ranks, self.timeout.total_seconds()))
        return f"hsdp_ckpt/{hashlib.sha256(described.encode()).hexdigest()[:24]}"


class OwnGroup:
    """A Gloo group, which ends when nobody has this object any more: that is local. Whoever uses it
    finds it by ``name``, as ``destroy_process_group`` ends it too."""

    def __init__(self, name: str, store: Any, request: GroupRequest) -> None:
        self.name = name
        default = _c10d._get_default_group()
        _alive.setdefault(default, {})[name] = _new_gloo_group(name, store, request)
        ending: Any = weakref.finalize(self, _end, weakref.ref(default), name)
        ending.atexit = False


# The groups of every default group's life, by name; they end with it at the latest.
_alive: "weakref.WeakKeyDictionary[Any, dict[str, Any]]" = weakref.WeakKeyDictionary()


def meet(request: GroupRequest, kept: OwnGroup | None) -> OwnGroup:
    """``kept`` if every rank has passed the group of the same name, else a new one. Collective over
    the ranks: models may be gone on some of them, and still be there on others.

    Raises torch's RuntimeError if a rank does not come within the timeout."""
    size, key = len(request.ranks), request.key()
    rank = request.ranks.index(dist.get_rank())
    met, store = meet_at(key, rank, size, request.timeout)
    store.add(f"votes/{kept.name if kept is not None else ''}", 1)
    if store.add("arrived", 1) == size:
        all_kept = kept is not None and store.add(f"votes/{kept.name}", 0) == size
        store.set("verdict", "kept" if all_kept else "new")
    store.wait(["verdict"], request.timeout)
    if kept is not None and store.get("verdict") == b"kept":
        return kept
    return OwnGroup(f"{key}/{met}", store, request)


def _new_gloo_group(name: str, store: Any, request: GroupRequest) -> Any:
    rank, size = request.ranks.index(dist.get_rank()), len(request.ranks)
    gloo = dist.ProcessGroup.BackendType.GLOO
    group: Any = dist.ProcessGroup(store, rank, size)
    backend = dist.ProcessGroupGloo(store, rank, size, request.timeout)
    group._set_default_backend(gloo)
    for device in device_types():
        group._register_backend(torch.device(device), gloo, backend)
    group._set_group_name(name)
    group._set_group_desc("torch_hsdp_ckpt")
    _c10d._register_process_group(name, group)
    return group


def _end(default: "weakref.ref[Any]", name: str) -> None:
    world = default()
    if world is None:  # destroy_process_group has ended it
        return
    group = _alive.get(world, {}).pop(name, None)
    if group is None:
        return
    if world is _c10d.GroupMember.WORLD:  # if not, no name is registered
        _C.keep_if_pending(name)
        _c10d._unregister_process_group(name)
    del group


def group_of_all(like: dist.ProcessGroup, timeout: timedelta) -> str:
    """The name of another group of the ranks of ``like``, on its backend; every rank of the job has
    to ask for one of its own. It is made once and stays until ``destroy_process_group``: with NCCL
    ending a group is collective, and models do not go at the same time on all ranks."""
    ranks = dist.get_process_group_ranks(like)
    group = _named_group(f"hsdp_ckpt/reduce/{like.group_name}/{ranks}", ranks, like, timeout)
    return str(group.group_name)


def group_of_ranks(ranks: Sequence[int], like: dist.ProcessGroup) -> Any:
    """A group of ``ranks`` (in the default group), of which this one is one, with the backend of
    ``like``, for meshes and parts of a shard group. Collective over them; it is made once and stays
    until ``destroy_process_group``."""
    backend = str(dist.get_backend_config(like))
    name, timeout = f"hsdp_ckpt/ranks {list(ranks)}/{backend}", group_timeout(like)
    with _unbound_default_group() as device:
        is_on_device = device is not None and f"{device.type}:" in backend
        return _named_group(name, ranks, like, timeout, device if is_on_device else None)


def _named_group(
    name: str,
    ranks: Sequence[int],
    like: dist.ProcessGroup,
    timeout: timedelta,
    device: torch.device | None = None,
) -> Any:
    """A group that torch knows, by a name that follows from its ranks: ``new_group`` of torch 2.11
    takes one from how many groups a rank has, also where only its members meet."""
    world = _c10d._world
    for group, known in world.pg_names.items():
        if known == name:
            return group
    rank, size = ranks.index(dist.get_rank()), len(ranks)
    _, store = meet_at(name, rank, size, timeout)
    group, _ = _c10d._new_process_group_helper(
        size,
        rank,
        list(ranks),
        str(dist.get_backend_config(like)),
        store,
        name,
        timeout=timeout,
        device_id=device,
        group_desc="torch_hsdp_ckpt",
    )
    world.pg_group_ranks[group] = {rank: place for place, rank in enumerate(ranks)}
    return group


@contextlib.contextmanager
def _unbound_default_group() -> Iterator[torch.device | None]:
    """The device that the default group is bound to, which torch does not see meanwhile: from a
    bound group it splits others, and waits for all its ranks, where only the new one's come."""
    default = _c10d._get_default_group()
    device = default.bound_device_id
    default.bound_device_id = None
    try:
        yield device
    finally:
        default.bound_device_id = device
