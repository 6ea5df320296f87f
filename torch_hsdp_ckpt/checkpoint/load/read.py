"""Read: every tensor of the state dict is filled, from storage or by a rank that has read the same
bytes."""

import dataclasses

from ...errors import CheckpointError
from ..storage.tensor_reads import PlannedReads, StateUpdate, run_reads, written_in_part
from .exchange import Exchange, ExchangeMode, make_exchange
from .plan import Planned
from .ranks import LoadRanks


@dataclasses.dataclass(frozen=True)
class Read:
    """``update`` is what is left to do."""

    ranks: LoadRanks
    update: StateUpdate


def read(planned: Planned, mode: ExchangeMode) -> Read:
    """Called by all ranks; raises on all, whichever failed. The errors say that tensors may have
    been written in part."""
    data = planned.data
    _read_together(planned, data.sharded, planned.sharded_digests, mode)
    # All ranks have agreed before the second exchange begins: it may have other members, who would
    # wait there for a rank that failed in the first one. The first one's memory is given back.
    _read_together(planned, data.unsharded, planned.unsharded_digests, mode)
    return Read(planned.opened.ranks, data.update)


@dataclasses.dataclass(frozen=True)
class _Failure:
    error: BaseException
    is_peers: bool  # the error says no more than that another rank has failed


def _read_together(
    planned: Planned, reads: PlannedReads, digests: list[bytes], mode: ExchangeMode
) -> None:
    """Reads one set of tensors, with all ranks of the same digest; then all say how it went."""
    failure = _run(planned, reads, digests, mode)
    agreement = planned.opened.ranks.agreement
    try:
        if failure is None:
            told = agreement.exchange("read")
        elif failure.is_peers:
            # The peer knows more of it, and has the word, unless it stays silent.
            told = agreement.exchange("read", _PEER_FAILED)
        else:
            told = agreement.exchange("read", error=failure.error)
        if _PEER_FAILED in told:
            cause = None if failure is None else failure.error
            raise CheckpointError("step 'read' failed: a rank stopped answering") from cause
    except (CheckpointError, OSError) as error:
        raise written_in_part(error) from error


_PEER_FAILED = b"peer"


def _run(
    planned: Planned, reads: PlannedReads, digests: list[bytes], mode: ExchangeMode
) -> _Failure | None:
    opened = planned.opened
    exchange: Exchange | None = None
    try:
        exchange = make_exchange(opened.ranks, mode, digests, reads.size, opened.reader.path)
        run_reads(reads, exchange.run)
    except BaseException as error:  # Ctrl-C too: the peers wait for what this rank reads
        if exchange is None:
            return _Failure(error, is_peers=False)
        exchange.abort()
        return _Failure(error, isinstance(error, Exception) and exchange.peer_failed)
    return None
