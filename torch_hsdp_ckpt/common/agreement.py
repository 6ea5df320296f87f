"""What the ranks of a save or a load tell each other: small exchanges in which one rank's failure
becomes every rank's error.

They run on a Gloo group of their own. Never on the training group: a save in the background and the
training loop would then use one group from two threads, which hangs or mixes up their messages."""

import logging
import pickle
import struct
import threading
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist

from ..errors import CheckpointError, CorruptCheckpointError

_logger = logging.getLogger(__name__)
# One message of an exchange: whether this rank failed, the payload's length, and a payload that is
# as short as a digest.
_SLOT = struct.Struct("<?Q119s")
_INLINE = 119
_MESSAGE_LIMIT = 4000  # characters of one rank's error that travel
_NAMED_RANKS = 8  # failed ranks whose messages are repeated in the error


class NestedCallError(RuntimeError):
    """Of a call within a call, by a signal handler: it says nothing of the peers that the outer one
    talks to."""


class _Failure(NamedTuple):
    """A rank's exception as plain data: the exception itself may hold tensors, or be of a class
    that peers do not have."""

    rank: int
    kind: str  # "os", "corrupt", "checkpoint" or the name of any other class
    message: str
    errno: int = 0
    filename: str = ""


class Agreement:
    """The ranks of one process group, talking over a private Gloo group. Every method is called by
    all of them, in one order.

    A rank that failed passes its exception in, and every rank raises: ``OSError`` (errno and
    filename kept), ``CorruptCheckpointError`` or ``CheckpointError``, naming the rank. A rank that
    died or does not answer is an error after the process group's timeout, never a hang. After that,
    or when the private group broke, the object is of no more use; :func:`agreement_of` then makes
    another one.

    Not thread-safe: two threads use two purposes (see :func:`agreement_of`), else ranks could pair
    up different calls."""

    def __init__(self, group: Any, rank: int, size: int, purpose: str) -> None:
        self.rank, self.size, self.purpose = rank, size, purpose
        self.broken = False
        self._group = group

    @property
    def is_coordinator(self) -> bool:
        """Rank 0 of the process group plans for all, commits, and speaks first, as in DCP."""
        return self.rank == 0

    def exchange(
        self, step: str, payload: bytes = b"", error: BaseException | None = None
    ) -> list[bytes]:
        """Every rank's payload, in rank order: one all-gather of 128 bytes a rank, a second one if
        a payload exceeds 119 bytes.

        ``step`` names what is being done ("plan", "write"), for messages. With an ``error`` on any
        rank all ranks raise."""
        if self.size == 1:
            if error is not None:
                raise error
            return [payload]
        failure = None if error is None else pickle.dumps(_describe(self.rank, error))
        sent = payload if failure is None else failure
        slots = self._all_gather(
            step, _SLOT.pack(failure is not None, len(sent), sent if len(sent) <= _INLINE else b"")
        )
        heads = [_SLOT.unpack(slot) for slot in slots]
        payloads = [inline[:length] for _, length, inline in heads]
        longest = max(length for _, length, _ in heads)
        if longest > _INLINE:
            padded = self._all_gather(step, sent.ljust(longest, b"\0"))
            payloads = [whole[:length] for whole, (_, length, _) in zip(padded, heads, strict=True)]
        failures = [
            _Failure(*pickle.loads(p))
            for p, (failed, _, _) in zip(payloads, heads, strict=True)
            if failed
        ]
        if failures:
            _raise(step, failures, error)
        return payloads

    def run(self, step: str, work: Callable[[], bytes]) -> list[bytes]:
        """Runs ``work`` on every rank, then exchanges what it returned, or what it raised."""
        payload, error = b"", None
        try:
            payload = work()
        except BaseException as caught:
            error = caught
        return self.exchange(step, payload, error)

    def verdict(self, step: str, work: Callable[[], bytes]) -> bytes:
        """Runs ``work`` on the coordinator alone; every rank gets what it returned, or raises as
        the coordinator does.

        A rank to which the verdict does not come does not know the outcome, and its error says so.
        """
        payload, error = b"", None
        if self.is_coordinator:
            try:
                payload = work()
            except BaseException as caught:
                error = caught
        if self.size == 1:
            if error is not None:
                raise error
            return payload
        sent = payload if error is None else pickle.dumps(_describe(self.rank, error))
        slot = self._broadcast(
            step, _SLOT.pack(error is not None, len(sent), sent if len(sent) <= _INLINE else b"")
        )
        failed, length, inline = _SLOT.unpack(slot)
        whole = (
            inline[:length]
            if length <= _INLINE
            else self._broadcast(step, sent if self.is_coordinator else bytes(length))
        )
        if failed:
            _raise(step, [_Failure(*pickle.loads(whole))], error)
        return whole

    def start_min(self, value: int) -> Callable[[], int]:
        """Starts an all-reduce and returns a function that waits for the ranks' least ``value`` (63
        bits)."""
        if self.size == 1:
            return lambda: value
        if self.broken:
            raise CheckpointError(
                f"{self.purpose}: rank {self.rank} has lost its peers in an earlier step"
            )
        buffer = torch.tensor([value], device="cpu")
        options = dist.AllreduceOptions()
        options.reduceOp = cast(
            dist.ReduceOp, dist.ReduceOp.MIN
        )  # torch 2.11's hints have two classes
        work = self._group.allreduce([buffer], options)

        def result() -> int:
            self._wait("min", lambda: work)
            return int(buffer)

        return result

    def gather(self, step: str, payload: bytes) -> list[bytes]:
        """Every rank's payload, in rank order, on the coordinator; nothing on the others. For what
        only it has to know."""
        if self.size == 1:
            return [payload]
        lengths = [
            struct.unpack("<Q", each)[0]
            for each in self._all_gather(step, struct.pack("<Q", len(payload)))
        ]
        padded = torch.frombuffer(
            bytearray(payload.ljust(max(1, *lengths), b"\0")), dtype=torch.uint8
        )
        out = [torch.empty_like(padded) for _ in range(self.size)] if self.is_coordinator else []
        options = dist.GatherOptions()
        options.rootRank = 0
        self._wait(step, lambda: self._group.gather([out] if out else [], [padded], options))
        return [row.numpy().tobytes()[:length] for row, length in zip(out, lengths, strict=False)]

    def scatter(self, step: str, payloads: list[bytes]) -> bytes:
        """This rank's one of the coordinator's payloads; the other ranks pass an empty list."""
        if self.size == 1:
            return payloads[0]
        longest = max(map(len, payloads)) if self.is_coordinator else 0
        length = max(
            1,
            *(
                struct.unpack("<Q", each)[0]
                for each in self._all_gather(step, struct.pack("<Q", longest))
            ),
        )
        out = torch.empty(length + 8, dtype=torch.uint8, device="cpu")
        sent = [
            torch.frombuffer(
                bytearray(struct.pack("<Q", len(each)) + each.ljust(length, b"\0")),
                dtype=torch.uint8,
            )
            for each in payloads
        ]
        options = dist.ScatterOptions()
        options.rootRank = 0
        self._wait(step, lambda: self._group.scatter([out], [sent] if sent else [], options))
        received = out.numpy().tobytes()
        return received[8 : 8 + struct.unpack("<Q", received[:8])[0]]

    def _all_gather(self, step: str, data: bytes) -> list[bytes]:
        out = torch.empty(self.size, len(data), dtype=torch.uint8, device="cpu")
        sent = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self._wait(step, lambda: self._group.allgather([list(out.unbind())], [sent]))
        return [row.numpy().tobytes() for row in out]

    def _broadcast(self, step: str, data: bytes) -> bytes:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._wait(step, lambda: self._group.broadcast([buffer], options))
        return buffer.numpy().tobytes()

    def _wait(self, step: str, start: Callable[[], Any]) -> None:
        if self.broken:
            raise CheckpointError(
                f"{self.purpose}, step {step!r}: rank {self.rank} has lost its peers in an earlier "
                "step"
            )
        try:
            start().wait()  # without the GIL
        except NestedCallError:
            raise
        except RuntimeError as error:
            # The peers that wait for this rank see the connection close, and do not have to wait
            # for their own timeout.
            self.broken, self._group = True, None
            raise CheckpointError(
                f"{self.purpose}, step {step!r}: rank {self.rank} gets no answer from at least one "
                "of the other "
                f"{self.size - 1} ranks (it died, was stopped, or took longer than the process "
                f"group's timeout): {error}"
            ) from error


def _describe(rank: int, error: BaseException) -> _Failure:
    if isinstance(error, OSError) and error.errno is not None:
        return _Failure(
            rank, "os", str(error.strerror)[:_MESSAGE_LIMIT], error.errno, str(error.filename or "")
        )
    message = str(error)[:_MESSAGE_LIMIT]
    if isinstance(error, CorruptCheckpointError):
        return _Failure(rank, "corrupt", message)
    if isinstance(error, CheckpointError):
        return _Failure(rank, "checkpoint", message)
    return _Failure(rank, type(error).__name__, message)


def _raise(step: str, failures: list[_Failure], own: BaseException | None) -> None:
    """Raises the first failed rank's error with what the others say behind it; this rank's own
    exception is the cause."""
    if own is not None and not isinstance(own, Exception):
        raise own  # Ctrl-C and exits go on as they are; the peers have been told
    first = failures[0]
    texts = [f"rank {failure.rank}: {_text(failure)}" for failure in failures[:_NAMED_RANKS]]
    if len(failures) > _NAMED_RANKS:
        texts.append(f"and {len(failures) - _NAMED_RANKS} more ranks")
    if first.kind == "os":
        also = "".join(f"; {text}" for text in texts[1:])
        raise OSError(
            first.errno,
            f"{first.message} (rank {first.rank}, step {step!r}){also}",
            first.filename or None,
        ) from own
    kind = CorruptCheckpointError if first.kind == "corrupt" else CheckpointError
    raise kind(f"step {step!r} failed: " + "; ".join(texts)) from own


def _text(failure: _Failure) -> str:
    if failure.kind == "os":
        return f"[Errno {failure.errno}] {failure.message}" + (
            f": {failure.filename!r}" if failure.filename else ""
        )
    return (
        failure.message
        if failure.kind in ("corrupt", "checkpoint")
        else f"{failure.kind}: {failure.message}"
    )


_lock = threading.Lock()
# By process group and purpose, with how many were made before it. They go with their process group:
# after destroy_process_group its name may come again, with another store behind it.
_made: "weakref.WeakKeyDictionary[Any, dict[str, tuple[Agreement, int]]]" = (
    weakref.WeakKeyDictionary()
)


def agreement_of(process_group: Any, purpose: str, no_dist: bool = False) -> Agreement:
    """The agreement of a process group for one purpose ("save", "load"); made at the first call, by
    all its ranks, and kept.

    ``process_group``: None for the default one. Without torch.distributed, or with ``no_dist``,
    this process alone. Call it on the thread that calls collectives; what it returns may then be
    used on another one. Two threads that may talk at the same time need two purposes. Raises
    CheckpointError for a rank outside the group, or where a peer does not come."""
    if no_dist or not dist.is_available() or not dist.is_initialized():
        return Agreement(None, 0, 1, purpose)
    parent: Any = dist.group.WORLD if process_group is None else process_group
    rank, size = dist.get_rank(parent), dist.get_world_size(parent)
    if rank < 0:
        raise CheckpointError(
            f"{purpose}: global rank {dist.get_rank()} is not in the process group it was called "
            "with"
        )
    if size == 1:
        return Agreement(None, 0, 1, purpose)
    with _lock:
        kept, generation = _made.setdefault(parent, {}).get(purpose, (None, -1))
        if kept is not None and not kept.broken:
            return kept
        generation += 1
    # Not dist.new_group: it counts its calls to name the groups, and ranks outside a sub-group
    # would count otherwise.
    store = dist.PrefixStore(
        f"torch_hsdp_ckpt/{parent.group_name}/{purpose}/{generation}",
        dist.distributed_c10d._get_default_store(),
    )
    try:
        group = dist.ProcessGroupGloo(store, rank, size, _timeout(parent))
    except RuntimeError as error:
        raise CheckpointError(
            f"{purpose}: rank {rank} of {size} waits in vain for its peers: {error}"
        ) from error
    agreement = Agreement(group, rank, size, purpose)
    with _lock:
        _made[parent][purpose] = (agreement, generation)
    _logger.debug(
        "%s: a Gloo group of its own for the %d ranks of group %s", purpose, size, parent.group_name
    )
    return agreement


def _timeout(group: Any) -> timedelta:
    """The process group's own timeout, whichever backend has it."""
    for device in ("cpu", "cuda"):
        try:
            timeout: timedelta = group._get_backend(torch.device(device)).options._timeout
        except (RuntimeError, AttributeError):
            continue
        return timeout
    return dist.default_pg_timeout
