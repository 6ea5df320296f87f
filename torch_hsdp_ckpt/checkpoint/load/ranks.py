"""The ranks of one load: on which hosts they are, and the smaller groups that some of them form."""

import collections
import contextlib
import dataclasses
import functools
import os
import socket
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ...common.agreement import Agreement, agreement_of, group_timeout
from ...common.meeting import default_store
from ...errors import CheckpointError


@functools.lru_cache(maxsize=1)
def host_identity() -> bytes:
    """Equal for processes that can share memory: host name, this boot of it, and the namespace of
    its process ids."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8")
        parts.append(boot_id.strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "/".join(parts).encode()[-100:]


@dataclasses.dataclass(frozen=True)
class LoadRanks:
    """The ranks of one load and their hosts, by rank. ``process_group`` is the one that the load
    was called with; its timeout counts for all that the ranks wait for."""

    agreement: Agreement
    hosts: list[bytes]
    process_group: Any

    @property
    def timeout(self) -> float:
        """Seconds."""
        return group_timeout(self.process_group or dist.group.WORLD).total_seconds()

    def on_this_host(self) -> list[int]:
        here = self.hosts[self.agreement.rank]
        return [rank for rank, host in enumerate(self.hosts) if host == here]

    def subgroup(self, members: Sequence[int], purpose: str = "") -> Agreement:
        """An agreement of some of the ranks, made by these alone at its first use and kept.

        Without a ``purpose`` all ranks together have the load's own agreement; with one they have a
        group of their own."""
        agreement = self.agreement
        if len(members) == agreement.size and not purpose:
            return agreement
        if len(members) == 1:
            return Agreement(None, 0, 1, agreement.purpose)
        made = _subgroups[agreement]
        key: _Key = (purpose, *members)
        if key not in made.kept or made.kept[key].broken:
            store = dist.PrefixStore(made.new_prefix(key), default_store())
            made.kept[key] = self._connect(store, members)
        return made.kept[key]

    def _connect(self, store: Any, members: Sequence[int]) -> Agreement:
        rank = members.index(self.agreement.rank)
        timeout = group_timeout(self.process_group or dist.group.WORLD)
        try:
            group = dist.ProcessGroupGloo(store, rank, len(members), timeout)
        except RuntimeError as error:
            raise CheckpointError(
                f"load: rank {self.agreement.rank} timed out waiting for ranks {list(members)}: "
                f"{error}"
            ) from error
        return Agreement(group, rank, len(members), self.agreement.purpose)


def gather_ranks(process_group: Any, no_dist: bool, error: Exception | None) -> LoadRanks:
    """Called by all ranks of the load, first of all. ``error``: what this rank has failed with
    already; with one on any rank all ranks raise."""
    agreement = agreement_of(process_group, "load", no_dist)
    hosts = agreement.exchange("hosts", host_identity(), error)
    if agreement not in _subgroups:
        token = agreement.verdict("name", lambda: os.urandom(8))
        _subgroups[agreement] = _Subgroups(token)
    return LoadRanks(agreement, hosts, process_group)


_Key = tuple[str | int, ...]  # a purpose and the members


@dataclasses.dataclass
class _Subgroups:
    """The subgroups of one agreement. ``token`` is a name for it that none had before, for its
    subgroups' stores."""

    token: bytes
    kept: dict[_Key, Agreement] = dataclasses.field(default_factory=dict)
    counts: "collections.Counter[_Key]" = dataclasses.field(default_factory=collections.Counter)

    def new_prefix(self, key: _Key) -> str:
        self.counts[key] += 1
        return f"torch_hsdp_ckpt/{self.token.hex()}/{'-'.join(map(str, key))}/{self.counts[key]}"


# A process keeps its connections from load to load, as long as the agreement that they belong to.
_subgroups: "weakref.WeakKeyDictionary[Agreement, _Subgroups]" = weakref.WeakKeyDictionary()
