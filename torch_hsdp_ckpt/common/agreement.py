"""How ranks answer "do all of us ...?": one rank's failure becomes every rank's error.

There are two transports and one rule: no rank goes on before all have said that they can.
:class:`Agreement` is for saves and loads, which exchange bytes on a Gloo group of their own. They
never use the training group: a save in the background and the training loop would then use one
group from two threads, which hangs or mixes up their messages. :func:`problems_of_all_ranks` and
:func:`is_same_on_all_ranks` are for wrapped modules, whose callers are in step anyway: they reduce
one number on the mesh's own groups."""

import dataclasses
import logging
import pickle
import struct
import threading
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..errors import CheckpointError
from .devices import device_types
from .meeting import meet_at
from .rank_failure import RankFailure, raise_alone, raise_failures

_T = TypeVar("_T")
_logger = logging.getLogger(__name__)
# One message of an exchange has whether this rank failed, the payload's length, and the payload if
# it is as short as a digest.
_SLOT = struct.Struct("<?Q119s")
_INLINE = 119
_LENGTH = struct.Struct("<Q")


class NestedCallError(RuntimeError):
    """A signal handler has called into a call that was under way. The error says nothing of the
    peers that the outer call talks to."""


@dataclasses.dataclass(frozen=True)
class _Answer:
    """What one rank says in a step: its payload, or, when it has ``failed``, the pickled
    :class:`RankFailure`."""

    failed: bool
    payload: bytes

    @staticmethod
    def of(rank: int, result: "_Result") -> "_Answer":
        if result.error is None:
            return _Answer(False, result.payload)
        return _Answer(True, pickle.dumps(tuple(RankFailure.of(rank, result.error))))

    def slot(self) -> bytes:
        """The first message, which holds a short payload whole."""
        inline = self.payload if len(self.payload) <= _INLINE else b""
        return _SLOT.pack(self.failed, len(self.payload), inline)

    def failure(self) -> RankFailure:
        return RankFailure(*pickle.loads(self.payload))


class _Slot(NamedTuple):
    """A peer's first message. ``inline`` is the payload, if it is short."""

    failed: bool
    length: int
    inline: bytes

    @staticmethod
    def of(packed: bytes) -> "_Slot":
        return _Slot(*_SLOT.unpack(packed))

    def answer(self, payload: bytes) -> _Answer:
        return _Answer(self.failed, payload[: self.length])


@dataclasses.dataclass(frozen=True)
class _Result:
    """What came of this rank's work: a payload, or the exception that it raised."""

    payload: bytes = b""
    error: BaseException | None = None

    @staticmethod
    def of(work: Callable[[], bytes]) -> "_Result":
        try:
            return _Result(work())
        except BaseException as caught:
            return _Result(error=caught)

    def get(self) -> bytes:
        if self.error is not None:
            raise_alone(self.error)
        return self.payload


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
        return self._exchange(step, _Result(payload, error))

    def _exchange(self, step: str, result: _Result) -> list[bytes]:
        if self.size == 1:
            return [result.get()]
        answers = self._all_gather_answers(step, _Answer.of(self.rank, result))
        failures = [answer.failure() for answer in answers if answer.failed]
        raise_failures(step, failures, result.error)
        return [answer.payload for answer in answers]

    def _all_gather_answers(self, step: str, sent: _Answer) -> list[_Answer]:
        slots = [_Slot.of(packed) for packed in self._all_gather(step, sent.slot())]
        payloads = [slot.inline for slot in slots]
        longest = max(slot.length for slot in slots)
        if longest > _INLINE:
            payloads = self._all_gather(step, sent.payload.ljust(longest, b"\0"))
        return [slot.answer(payload) for slot, payload in zip(slots, payloads, strict=True)]

    def run(self, step: str, work: Callable[[], bytes]) -> list[bytes]:
        """Runs ``work`` on every rank, then exchanges what it returned, or what it raised."""
        return self._exchange(step, _Result.of(work))

    def run_and_tell(
        self, step: str, work: Callable[[], _T], tell: Callable[[_T], bytes]
    ) -> tuple[_T, list[bytes]]:
        """Runs ``work`` on every rank; returns this rank's result, and what every rank tells of its
        own. If ``work`` or ``tell`` raises on any rank, all ranks raise."""
        results: list[_T] = []

        def run() -> bytes:
            results.append(work())
            return tell(results[0])

        told = self.run(step, run)
        return results[0], told

    def verdict(self, step: str, work: Callable[[], bytes]) -> bytes:
        """Runs ``work`` on the coordinator alone; every rank gets what it returned, or raises as
        the coordinator does.

        A rank to which the verdict does not come does not know the outcome, and its error says so.
        """
        result = _Result.of(work) if self.is_coordinator else _Result()
        if self.size == 1:
            return result.get()
        answer = self._broadcast_answer(step, _Answer.of(self.rank, result))
        if answer.failed:
            raise_failures(step, [answer.failure()], result.error)
        return answer.payload

    def _broadcast_answer(self, step: str, sent: _Answer) -> _Answer:
        slot = _Slot.of(self._broadcast(step, sent.slot()))
        if slot.length <= _INLINE:
            return slot.answer(slot.inline)
        buffer = sent.payload if self.is_coordinator else bytes(slot.length)
        return slot.answer(self._broadcast(step, buffer))

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
        # torch 2.11's hints have two classes of this name.
        options.reduceOp = cast(dist.ReduceOp, dist.ReduceOp.MIN)
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
        lengths = self._all_gather_lengths(step, len(payload))
        padded = _as_tensor(payload.ljust(max(1, *lengths), b"\0"))
        rows = [torch.empty_like(padded) for _ in range(self.size)] if self.is_coordinator else []
        options = dist.GatherOptions()
        options.rootRank = 0
        outputs = [rows] if rows else []
        self._wait(step, lambda: self._group.gather(outputs, [padded], options))
        return [row.numpy().tobytes()[:length] for row, length in zip(rows, lengths, strict=False)]

    def scatter(self, step: str, payloads: list[bytes]) -> bytes:
        """This rank's one of the coordinator's payloads; the other ranks pass an empty list."""
        if self.size == 1:
            return payloads[0]
        longest = max(map(len, payloads)) if self.is_coordinator else 0
        size = max(1, *self._all_gather_lengths(step, longest))
        received = torch.empty(_LENGTH.size + size, dtype=torch.uint8, device="cpu")
        rows = [_as_tensor(_with_length(payload, size)) for payload in payloads]
        options = dist.ScatterOptions()
        options.rootRank = 0
        inputs = [rows] if rows else []
        self._wait(step, lambda: self._group.scatter([received], inputs, options))
        return _without_length(received.numpy().tobytes())

    def _all_gather_lengths(self, step: str, length: int) -> list[int]:
        lengths = self._all_gather(step, _LENGTH.pack(length))
        return [_LENGTH.unpack(packed)[0] for packed in lengths]

    def _all_gather(self, step: str, data: bytes) -> list[bytes]:
        out = torch.empty(self.size, len(data), dtype=torch.uint8, device="cpu")
        sent = _as_tensor(data)
        self._wait(step, lambda: self._group.allgather([list(out.unbind())], [sent]))
        return [row.numpy().tobytes() for row in out]

    def _broadcast(self, step: str, data: bytes) -> bytes:
        buffer = _as_tensor(data)
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
            start().wait()  # this releases the GIL
        except NestedCallError:
            raise
        except RuntimeError as error:
            # The peers that wait for this rank see the connection close, and do not have to wait
            # for their own timeout.
            self.broken, self._group = True, None
            raise CheckpointError(
                f"{self.purpose}, step {step!r}: rank {self.rank} gets no answer from at least "
                f"one of the other {self.size - 1} ranks (it died, was stopped, or took longer "
                f"than the process group's timeout): {error}"
            ) from error


def _with_length(payload: bytes, size: int) -> bytes:
    """``payload`` behind its length, padded to ``size`` bytes."""
    return _LENGTH.pack(len(payload)) + payload.ljust(size, b"\0")


def _without_length(data: bytes) -> bytes:
    (length,) = _LENGTH.unpack_from(data)
    return data[_LENGTH.size : _LENGTH.size + length]


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


# A process has one set of process groups, and so one set of agreements, by group and purpose. They
# go with their process group: after destroy_process_group its name may come again, with another
# store behind it.
_made: "weakref.WeakKeyDictionary[Any, dict[str, Agreement]]" = weakref.WeakKeyDictionary()
_made_lock = threading.Lock()


def agreement_of(process_group: Any, purpose: str, no_dist: bool = False) -> Agreement:
    """The agreement of a process group for one purpose ("save", "load"); made at the first call, by
    all its ranks, and kept.

    ``process_group``: None for the default one. Without torch.distributed, or with ``no_dist``,
    this process alone. Call it on the thread that calls collectives; what it returns may then be
    used on another one. Two threads that may talk at the same time need two purposes. Raises
    CheckpointError for a rank outside the group, or where a peer does not come."""
    if no_dist or not dist.is_available() or not dist.is_initialized():
        return _alone(purpose)
    group: Any = dist.group.WORLD if process_group is None else process_group
    if dist.get_rank(group) < 0:
        raise CheckpointError(
            f"{purpose}: global rank {dist.get_rank()} is not in the process group it was called "
            "with"
        )
    if dist.get_world_size(group) == 1:
        return _alone(purpose)
    return _kept_or_new(group, purpose)


def _alone(purpose: str) -> Agreement:
    return Agreement(None, 0, 1, purpose)


def _kept_or_new(parent: Any, purpose: str) -> Agreement:
    with _made_lock:
        kept = _made.setdefault(parent, {}).get(purpose)
    if kept is not None and not kept.broken:
        return kept
    rank, size = dist.get_rank(parent), dist.get_world_size(parent)
    agreement = Agreement(_private_group(parent, purpose), rank, size, purpose)
    with _made_lock:
        _made[parent][purpose] = agreement
    _logger.debug(
        "%s: a Gloo group of its own for the %d ranks of group %s", purpose, size, parent.group_name
    )
    return agreement


def _private_group(parent: Any, purpose: str) -> dist.ProcessGroupGloo:
    # This is not dist.new_group, which counts its calls to name the groups: ranks outside a
    # sub-group would count otherwise.
    rank, size, timeout = dist.get_rank(parent), dist.get_world_size(parent), group_timeout(parent)
    try:
        _, store = meet_at(f"{parent.group_name}/{purpose}", rank, size, timeout)
        return dist.ProcessGroupGloo(store, rank, size, timeout)
    except RuntimeError as error:
        raise CheckpointError(
            f"{purpose}: rank {rank} of {size} gets no answer from its peers: {error}"
        ) from error


def group_timeout(group: Any, types: Sequence[str] | None = None) -> timedelta:
    """The process group's own timeout, that of the first of its backends for these types of device
    that has one (None: all that this process may have); torch's default where none says."""
    for device in device_types() if types is None else types:
        try:
            timeout: timedelta = group._get_backend(torch.device(device)).options._timeout
        except (RuntimeError, AttributeError):
            continue
        return timeout
    return dist.default_pg_timeout


def groups_of(mesh: DeviceMesh) -> list[dist.ProcessGroup]:
    """Groups whose reductions one after the other reach all ranks of ``mesh``: a single one, if
    these are all ranks that there are."""
    if mesh.size() == dist.get_world_size():
        return [dist.distributed_c10d._get_default_group()]
    return [mesh.get_group(dim) for dim in range(mesh.ndim)]


def problems_of_all_ranks(mesh: DeviceMesh, problems: Sequence[str]) -> list[str]:
    """The problems that any rank of ``mesh`` has found; empty if no rank has one. Collective over
    the mesh: what one rank finds wrong can so be raised by all, before anything has changed.

    It reduces one number in each dimension; texts travel only if there are any. This rank's come
    first, as they are; those that only others have follow, each with a rank that has it."""
    if _largest(mesh, [int(bool(problems))]) == [0]:
        return []
    by_rank = {dist.get_rank(): list(problems)}
    for group in groups_of(mesh):
        gathered: list[dict[int, list[str]] | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, by_rank, group=group)
        for part in gathered:
            by_rank.update(part or {})
    return _this_ranks_first(problems, by_rank)


def _this_ranks_first(problems: Sequence[str], by_rank: dict[int, list[str]]) -> list[str]:
    found = dict.fromkeys(problems)
    elsewhere: dict[str, int] = {}
    for rank in sorted(by_rank):
        for text in by_rank[rank]:
            if text not in found:
                elsewhere.setdefault(text, rank)
    return [*found, *(f"rank {rank}: {text}" for text, rank in elsewhere.items())]


def is_same_on_all_ranks(mesh: DeviceMesh, number: int) -> bool:
    """Whether all ranks of ``mesh`` have passed the same number, a digest say (63 bits).
    Collective over the mesh."""
    largest, negated_smallest = _largest(mesh, [number, -number])
    return largest == -negated_smallest


def _largest(mesh: DeviceMesh, numbers: Sequence[int]) -> list[int]:
    """The largest of all ranks' numbers, by position."""
    reduced = torch.tensor(numbers, dtype=torch.int64, device=mesh.device_type)
    for group in groups_of(mesh):
        dist.all_reduce(reduced, op=dist.ReduceOp.MAX, group=group)
    return [int(number) for number in reduced.tolist()]
