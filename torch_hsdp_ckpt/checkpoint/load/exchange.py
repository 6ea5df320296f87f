"""Ranks that need the same bytes read each of them once, and hand them on: through shared memory on
one host, over Gloo between hosts. Which way, and with whom, all ranks know from one exchange of
digests and host names."""

import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor

from ... import _C
from ...common.agreement import Agreement
from ...common.tensors import scratch
from ...errors import CheckpointError
from ..storage.directory import encoded
from ..storage.tensor_reads import read_alone, read_threads
from .ranks import LoadRanks

_logger = logging.getLogger(__name__)
ExchangeMode = Literal["auto", "shared", "network", "off"]
MODES = ("auto", "shared", "network", "off")
# Below this a load is over before an exchange has begun.
_WORTHWHILE_BYTES = 1 << 20


class Exchange:
    """Runs the plans of one load in a set of ranks that have the same ones; this class, in one rank
    alone. ``peer_failed``: the error that run() raised is another rank's, which knows more of
    it."""

    peer_failed = False

    def run(self, plan: _C.ReadPlan) -> None:
        read_alone(plan)

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
    """Rounds of one extent a rank: while the extents of one round are on their way, the next ones
    are read.

    Sends and receives, from and to buffers of its own: torch's all-gather by Gloo takes as much
    memory again, in each of its threads, for the time of a round and, as the allocator has it, for
    longer."""

    def __init__(self, group: Agreement) -> None:
        self._agreement = group
        self._sent = _buffers(2)  # one on its way, while the other one is filled
        self._received = _buffers(group.size)

    def run(self, plan: _C.ReadPlan) -> None:
        rounds = _Rounds(plan, self._agreement.rank, self._agreement.size)
        transfers = _Transfers()
        failure = self._try_fill(rounds, 0)
        try:
            for number in range(rounds.count):
                self._start(transfers, rounds, number)
                if failure is None:
                    failure = self._try_fill(rounds, number + 1)
                transfers.finish(functools.partial(self._deliver, rounds, number))
        except CheckpointError:
            raise
        except RuntimeError as error:
            self.peer_failed = True
            raise CheckpointError(f"a rank of the exchange is gone: {error}") from error
        finally:
            if transfers.clear():
                self.abort()
        if failure is not None:
            raise failure
        plan.finish()

    def _try_fill(self, rounds: "_Rounds", number: int) -> Exception | None:
        """Reads this rank's extent of a round. The peers' rounds go on after an error: they learn
        of it when all ranks vote."""
        extent = rounds.extent(rounds.rank, number)
        if extent is None:
            return None
        try:
            rounds.plan.fill(extent, self._sent[number % 2].data_ptr())
        except Exception as error:
            return error
        return None

    def _start(self, transfers: "_Transfers", rounds: "_Rounds", number: int) -> None:
        for peer in rounds.peers:
            if rounds.extent(peer, number) is not None:
                transfers.receive(self._group, peer, self._received[peer])
        if rounds.extent(rounds.rank, number) is not None:
            for peer in rounds.peers:
                transfers.send(self._group, peer, self._sent[number % 2])

    def _deliver(self, rounds: "_Rounds", number: int, peer: int) -> None:
        extent = rounds.extent(peer, number)
        assert extent is not None
        rounds.plan.deliver(extent, self._received[peer].data_ptr())

    def _group(self) -> Any:
        if self._agreement._group is None:
            self.peer_failed = True
            raise CheckpointError("another rank of the exchange has failed")
        return self._agreement._group

    def abort(self) -> None:
        # The connections close, which the peers see.
        self._agreement.broken, self._agreement._group = True, None


def _buffers(count: int) -> Tensor:
    """Memory for extents, a row each."""
    return scratch(count * _C.ReadPlan.BUFFER_BYTES).view(count, -1)


class _Rounds:
    """Who reads which extent of a plan in which round: each rank a share of neighbours in the
    files, one a round."""

    def __init__(self, plan: _C.ReadPlan, rank: int, size: int) -> None:
        self.plan, self.rank = plan, rank
        self.peers = [(rank + step) % size for step in range(1, size)]
        bounds = [plan.extents * r // size for r in range(size + 1)]
        self._shares = [range(bounds[r], bounds[r + 1]) for r in range(size)]
        self.count = max(len(share) for share in self._shares)

    def extent(self, rank: int, number: int) -> int | None:
        """None where the rank has read all of its share in earlier rounds."""
        share = self._shares[rank]
        return share[number] if number < len(share) else None


class _Transfers:
    """The messages of one round. They hold the connections: nothing else keeps a reference to one
    or to its group, as the frames of an error do for as long as the error is kept."""

    def __init__(self) -> None:
        self._receives: list[_Receive] = []
        self._sends: list[Any] = []

    def receive(self, group: Callable[[], Any], peer: int, buffer: Tensor) -> None:
        self._receives.append(_Receive(peer, group().recv([buffer], peer, 0)))

    def send(self, group: Callable[[], Any], peer: int, buffer: Tensor) -> None:
        self._sends.append(group().send([buffer], peer, 0))

    def finish(self, deliver: Callable[[int], None]) -> None:
        """Waits for all of them; ``deliver`` is called with each peer whose buffer is filled."""
        while self._receives:
            self._receives[0].work.wait()
            deliver(self._receives.pop(0).peer)
        while self._sends:
            self._sends[0].wait()
            self._sends.pop(0)

    def clear(self) -> bool:
        """Whether there were any."""
        pending = bool(self._receives or self._sends)
        self._receives.clear()
        self._sends.clear()
        return pending


class _Receive(NamedTuple):
    peer: int
    work: Any


def make_exchange(
    ranks: LoadRanks,
    mode: ExchangeMode,
    digests: Sequence[bytes],
    size: int,
    directory: str | os.PathLike[str],
) -> Exchange:
    """The exchange for plans of ``size`` bytes and this rank's one of ``digests``: with all ranks
    of the same digest, at most ``SharedExchange.MAX_MEMBERS`` in a set.

    "auto": shared memory where all of a set are on one host, Gloo otherwise; none if the checkpoint
    lies in memory anyway. Every rank of a set comes to the same answer."""
    if mode == "off" or size < _WORTHWHILE_BYTES:
        return Exchange()
    if mode == "auto" and _C.is_in_memory(encoded(directory)):
        return Exchange()
    members = _members(ranks, mode, digests)
    if len(members) == 1:
        return Exchange()
    group = ranks.subgroup(members)
    hosts = {ranks.hosts[rank] for rank in members}
    if mode != "network" and len(hosts) == 1:
        shared = _share_memory(group, ranks.timeout)
        if shared is not None:
            return shared
        if mode == "shared":
            raise CheckpointError(
                "exchange='shared': the ranks of this host can't share memory; use 'network' or "
                "'off'"
            )
        _logger.warning("ranks %s can't share memory; they exchange over Gloo", members)
    # Not the group that votes and hands out metadata: after an error it is closed.
    return _Network(ranks.subgroup(members, "data"))


def _members(ranks: LoadRanks, mode: ExchangeMode, digests: Sequence[bytes]) -> list[int]:
    """The ranks that this one exchanges with, itself among them."""
    own_rank = ranks.agreement.rank
    members = [rank for rank, digest in enumerate(digests) if digest == digests[own_rank]]
    if mode == "shared":
        on_this_host = set(ranks.on_this_host())
        members = [rank for rank in members if rank in on_this_host]
    limit = _C.SharedExchange.MAX_MEMBERS
    number_of_set = members.index(own_rank) // limit
    start = number_of_set * limit
    return members[start : start + limit]


def _share_memory(group: Agreement, timeout: float) -> Exchange | None:
    """Shared memory of the group's ranks; None, in all of them, where one can't have it."""
    exchange: _C.SharedExchange | None = None

    def create() -> bytes:
        nonlocal exchange
        exchange = _or_none(lambda: _C.SharedExchange.create(group.size))
        return b"" if exchange is None else exchange.path.encode()

    path = group.verdict("share memory", create).decode()
    if path and not group.is_coordinator:
        exchange = _or_none(lambda: _C.SharedExchange.join(path, group.rank, group.size))
    joined = group.exchange("share memory", b"" if exchange is None else b"joined")
    if exchange is None or not all(joined):
        return None
    return _Shared(exchange, timeout)


def _or_none(make: Callable[[], _C.SharedExchange]) -> _C.SharedExchange | None:
    try:
        return make()
    except OSError as error:
        _logger.warning("no memory shared with other ranks: %s", error)
        return None
