"""Ranks that need the same bytes read each of them once, and hand them on: through shared memory on
one host, over Gloo between hosts. Which way, and with whom, all ranks know from one exchange of
digests and host names."""

import collections
import contextlib
import functools
import logging
import os
import socket
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from ... import _C
from ...common.agreement import Agreement, group_timeout
from ...common.tensors import scratch
from ...errors import CheckpointError
from ..storage.tensor_reads import read_threads

_logger = logging.getLogger(__name__)
Mode = Literal["auto", "shared", "network", "off"]
MODES = ("auto", "shared", "network", "off")
# Below this a load is over before an exchange has begun.
_WORTHWHILE_BYTES = 1 << 20


@functools.lru_cache(maxsize=1)
def host_identity() -> bytes:
    """Equal for processes that can share memory: host name, this boot of it, and the namespace of
    its process ids."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "/".join(parts).encode()[-100:]


_Key = tuple[str | int, ...]  # a purpose and the members
_subgroups: "weakref.WeakKeyDictionary[Agreement, dict[_Key, Agreement]]" = (
    weakref.WeakKeyDictionary()
)
_tokens: "weakref.WeakKeyDictionary[Agreement, bytes]" = weakref.WeakKeyDictionary()
_counts: "collections.Counter[tuple[bytes, _Key]]" = collections.Counter()


def name_load(agreement: Agreement) -> None:
    """Gives the agreement a name that none had before, for its subgroups' stores. Called by all
    ranks, before subgroup()."""
    if agreement not in _tokens:
        _tokens[agreement] = agreement.verdict("name", lambda: os.urandom(8))


def subgroup(
    agreement: Agreement, members: Sequence[int], timeout_of: Any, purpose: str = ""
) -> Agreement:
    """An agreement of some of the ranks, made by these alone at its first use and kept.
    ``timeout_of``: the process group.

    Without a ``purpose`` all ranks together have the agreement itself; with one they have a group
    of their own."""
    key: _Key = (purpose, *members)
    if len(members) == agreement.size and not purpose:
        return agreement
    if len(members) == 1:
        return Agreement(None, 0, 1, agreement.purpose)
    kept = _subgroups.setdefault(agreement, {})
    if key in kept and not kept[key].broken:
        return kept[key]
    token = _tokens[agreement]
    _counts[token, key] += 1
    prefix = f"torch_hsdp_ckpt/{token.hex()}/{'-'.join(map(str, key))}/{_counts[token, key]}"
    store = dist.PrefixStore(prefix, dist.distributed_c10d._get_default_store())
    me = members.index(agreement.rank)
    try:
        group = dist.ProcessGroupGloo(
            store, me, len(members), group_timeout(timeout_of or dist.group.WORLD)
        )
    except RuntimeError as error:
        raise CheckpointError(
            f"load: rank {agreement.rank} waits in vain for ranks {list(members)}: {error}"
        ) from error
    kept[key] = Agreement(group, me, len(members), agreement.purpose)
    return kept[key]


class Exchange:
    """Runs the plans of one load in a set of ranks that have the same ones. ``peer_failed``: the
    error that run() raised is another rank's, which knows more of it."""

    peer_failed = False

    def run(self, plan: _C.ReadPlan) -> None:
        plan.read_all(read_threads())

    def abort(self) -> None:
        """After an error in this rank: the peers' run() raises instead of waiting."""


class _Shared(Exchange):
    def __init__(self, exchange: _C.SharedExchange, timeout: float) -> None:
        self._exchange, self._timeout = exchange, timeout

    def run(self, plan: _C.ReadPlan) -> None:
        try:
            self._exchange.run(plan, read_threads(), self._timeout)
        finally:
            self.peer_failed = self._exchange.peer_failed

    def abort(self) -> None:
        self._exchange.abort()


class _Network(Exchange):
    """Rounds of one piece a rank: while the pieces of one round are on their way, the next ones are
    read.

    Sends and receives, from and to buffers of its own: torch's all-gather by Gloo takes as much
    memory again, in each of its threads, for the time of a round and, as the allocator has it, for
    longer."""

    def __init__(self, group: Agreement) -> None:
        self._agreement = group
        self._sent = scratch(2 * _C.ReadPlan.BUFFER_BYTES).view(2, -1)
        self._received = scratch(group.size * _C.ReadPlan.BUFFER_BYTES).view(group.size, -1)

    def run(self, plan: _C.ReadPlan) -> None:
        me, ranks = self._agreement.rank, self._agreement.size
        shares = [(plan.pieces * r // ranks, plan.pieces * (r + 1) // ranks) for r in range(ranks)]
        rounds = max(last - first for first, last in shares)
        failure: Exception | None = None

        def has(rank: int, round_: int) -> bool:
            return shares[rank][0] + round_ < shares[rank][1]

        def fill(round_: int) -> None:
            nonlocal failure
            if not has(me, round_) or failure is not None:
                return
            try:
                plan.fill(shares[me][0] + round_, self._sent[round_ % 2].data_ptr())
            except (
                Exception
            ) as error:  # the peers' rounds go on; they learn of it when all ranks vote
                failure = error

        others = [(me + step) % ranks for step in range(1, ranks)]
        works: list[tuple[int, Any]] = []  # the peer that is received from, or -1
        group = work = None
        fill(0)
        try:
            for round_ in range(rounds):
                group = self._group()
                works.extend(
                    (r, group.recv([self._received[r]], r, 0)) for r in others if has(r, round_)
                )
                if has(me, round_):
                    works.extend((-1, group.send([self._sent[round_ % 2]], r, 0)) for r in others)
                fill(round_ + 1)
                for rank, work in works:
                    work.wait()
                    if rank >= 0:
                        plan.deliver(shares[rank][0] + round_, self._received[rank].data_ptr())
                works.clear()
        except RuntimeError as error:
            if isinstance(error, CheckpointError):
                raise
            self.peer_failed = True
            raise CheckpointError(f"a rank of the exchange is gone: {error}") from error
        finally:
            group = work = None
            # they hold the connections, and this frame would hold them as long as its error is kept
            if works:
                works.clear()
                self.abort()
        if failure is not None:
            raise failure
        plan.finish()

    def _group(self) -> Any:
        if self._agreement._group is None:
            self.peer_failed = True
            raise CheckpointError("another rank of the exchange has failed")
        return self._agreement._group

    def abort(self) -> None:
        # The connections close, which the peers see.
        self._agreement.broken, self._agreement._group = True, None


def make_exchange(
    agreement: Agreement,
    process_group: Any,
    mode: Mode,
    hosts: Sequence[bytes],
    digests: Sequence[bytes],
    size: int,
    directory: str | os.PathLike[str],
) -> Exchange:
    """The exchange for plans of ``size`` bytes and the digest ``digests[agreement.rank]``: with all
    ranks of the same digest, at most ``SharedExchange.MAX_MEMBERS`` in a set.

    "auto": shared memory where all of a set are on one host, Gloo otherwise; none if the checkpoint
    lies in memory anyway. Every rank of a set comes to the same answer."""
    me = agreement.rank
    members = [rank for rank, digest in enumerate(digests) if digest == digests[me]]
    if (
        mode == "off"
        or size < _WORTHWHILE_BYTES
        or (mode == "auto" and _C.is_in_memory(os.fspath(directory)))
    ):
        return Exchange()
    if mode == "shared":
        members = [rank for rank in members if hosts[rank] == hosts[me]]
    limit = _C.SharedExchange.MAX_MEMBERS
    start = members.index(me) // limit * limit
    members = members[start : start + limit]
    if len(members) == 1:
        return Exchange()
    group = subgroup(agreement, members, process_group)
    if mode != "network" and len({hosts[rank] for rank in members}) == 1:
        shared = _join(group, group_timeout(process_group or dist.group.WORLD).total_seconds())
        if shared is not None:
            return shared
        if mode == "shared":
            raise CheckpointError(
                "exchange='shared': the ranks of this host can't share memory; use 'network' or "
                "'off'"
            )
        _logger.warning("ranks %s can't share memory; they exchange over Gloo", members)
    # Not the group that votes and hands out metadata: after an error it is closed.
    return _Network(subgroup(agreement, members, process_group, "data"))


def _join(group: Agreement, timeout: float) -> Exchange | None:
    """Shared memory of the group's ranks; None, in all of them, where one can't have it."""
    exchange: _C.SharedExchange | None = None

    def attempt(make: Callable[[], _C.SharedExchange]) -> _C.SharedExchange | None:
        try:
            return make()
        except OSError as error:
            _logger.warning("no memory shared with other ranks: %s", error)
            return None

    def create() -> bytes:
        nonlocal exchange
        exchange = attempt(lambda: _C.SharedExchange.create(group.size))
        return b"" if exchange is None else exchange.path.encode()

    path = group.verdict("share memory", create).decode()
    if path and not group.is_coordinator:
        exchange = attempt(lambda: _C.SharedExchange.join(path, group.rank, group.size))
    joined = group.exchange("share memory", b"" if exchange is None else b"joined")
    return _Shared(exchange, timeout) if exchange is not None and all(joined) else None
