"""What the wrappers of one outermost module share: the schedule of a step, and that all ranks have
wrapped the same."""

import hashlib
import json
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from .. import _C
from .callbacks import weak_callback
from .groups import ModelGroups, PeerGroup
from .unit import ShardedUnit

# The next root gets this channel: it is above all that any of its ranks has given to one. It is the
# process's: two models' collectives may meet in one group, and are told apart by their channels.
_next_channel = 0

_CHANNEL_AND_DIGEST = struct.Struct("<q32s")
_DESCRIPTION_LIMIT = 512  # bytes of a module's description that an error repeats


class _DifferentModules(RuntimeError):
    pass


@dataclass
class BackwardEnd:
    """What a user has said of the backwards to come, to the outermost module."""

    is_last: bool = True  # the next one ends with all of its gradients taken
    is_manual: bool = False  # it ends by finalize_backward, whatever ``is_last`` says
    is_open: bool = False  # there was one that waits for finalize_backward


@dataclass
class PendingReduction:
    """Of a finalize_backward whose handle nobody has waited for yet."""

    was_reset: bool = False


class Root:
    """``units``: of all wrappers, outermost first, each with its name. ``prefetch``: when backward
    starts the next unit's gather. ``backward_end``: the outermost module's. Collective over the
    mesh; raises RuntimeError on every rank if the ranks have wrapped different modules, or
    parameters are on the meta device."""

    def __init__(
        self,
        units: list[ShardedUnit],
        prefetch: _C.BackwardPrefetch,
        backward_end: BackwardEnd,
    ) -> None:
        self.units = units
        self.is_dissolved = False
        self.backward_end = backward_end
        self.pending_reduction: PendingReduction | None = None
        self._groups = ModelGroups()
        problem = _first_problem(units)
        peers, channel = _meet_peers(units, self._groups, problem)
        if problem is not None:
            raise problem
        schedule_peers = peers.for_schedule(channel) if peers is not None else None
        self.schedule = _C.Schedule(
            prefetch,
            dist.get_rank(),
            schedule_peers,
            weak_callback(self._after_backward),
        )
        for unit in units:
            groups = self._groups.reduce(unit.mesh)
            if groups is not None:
                unit.communication.set_reduce_groups(groups.shard, groups.replica)
            if schedule_peers is not None:
                unit.communication.join(schedule_peers)
            unit.bind(self.schedule)
        self.tell_backward_end()

    def tell_backward_end(self) -> None:
        """What a user has said of the next backwards holds from now on."""
        end = self.backward_end
        self.schedule.set_last_backward(end.is_last and not end.is_manual)

    @staticmethod
    def in_backward() -> bool:
        """Whether autograd is running: a forward now is a recomputation."""
        return torch._C._current_graph_task_id() != -1

    def hide_freed(self) -> None:
        """Shows the sharded parameters where full ones are shown that have no memory any more."""
        for unit in self.units:
            if unit.showing_full and not unit.core.is_unsharded:
                unit.show_sharded()

    def free_unheld_gradients(self) -> None:
        """Before a forward: gives back the memory of gradients that nobody has any more."""
        for unit in self.units:
            unit.free_unheld_gradients()

    def _after_backward(self) -> None:
        """Shows the parameters that have the gradients: the sharded ones, or full ones that the
        backward was to leave as they are."""
        self.backward_end.is_open = self.backward_end.is_manual
        for unit in self.units:
            core = unit.core
            if core.sync or core.reshard_after_backward or not core.is_unsharded:
                unit.show_sharded()

    def _show_sharded(self) -> None:
        for unit in self.units:
            unit.show_sharded()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Within the block forwards and backwards of other threads wait; it waits for them, not for
        this thread's own."""
        schedule = self.schedule  # not there any more if the root is dissolved within
        turn = schedule.take_turn()
        try:
            yield
        finally:
            if turn == _C.ReadTurn.TAKEN:
                schedule.end_read()

    @contextmanager
    def reading(self, whole: str = "") -> Iterator[None]:
        """Within the block the sharded parameters are in their slots, and forwards and backwards of
        other threads wait.

        Frees nothing: this rank's peers still have it, or another thread computes with it. Waits
        for such a forward or backward to end. Full parameters of this thread's own forward it puts
        back; others, of ``unshard()`` say, are not shown any more, as with torch's.

        ``whole``: what is going to be gathered within the block, on the groups that forwards and
        backwards use. RuntimeError then, at once, while one is under way in any thread of this
        rank. Its peers do not hear of that."""
        schedule = self.schedule
        turn = schedule.begin_read_if_quiet() if whole else schedule.begin_read()
        first = turn == _C.ReadTurn.TAKEN
        if turn == _C.ReadTurn.BUSY:
            raise RuntimeError(
                f"rank {dist.get_rank()}: the {whole} of module {self.units[0].core.name} was "
                "asked for while a forward or backward of it is under way. It is collective: ask "
                "on every rank between the same steps, in the thread that trains, or take the "
                "sharded one, which sends nothing"
            )
        runs = schedule.running_here()
        shown: list[ShardedUnit] = []
        try:
            if self.is_dissolved:
                raise RuntimeError(
                    f"rank {dist.get_rank()}: module {self.units[0].core.name} has become a part "
                    "of another outermost module while its state was waited for: ask again"
                )
            # If neither, this is in a wrapper's state_dict(), for one within.
            if first or runs:
                shown = [unit for unit in self.units if unit.showing_full and runs]
                self._show_sharded()
            yield
        finally:
            for unit in shown:
                unit.show_full()
            if first:
                schedule.end_read()

    def dissolve(self) -> None:
        """Lets the units go, to another root; nothing of them is in flight then. A graph of a
        forward before this has no backward any more, which says so.

        RuntimeError inside of this thread's own forward or backward, and where ``no_sync`` has left
        gradients that nobody has reduced."""
        self.reset()
        with self.turn():
            if self.schedule.owes():
                raise RuntimeError(
                    f"rank {dist.get_rank()}: module {self.units[0].core.name} keeps gradients "
                    "that no backward has reduced yet (no_sync): run one that does before a part "
                    "of it is used within another outermost module"
                )
            for unit in self.units:
                unit.schedule = None
            self.is_dissolved = True
            del self.schedule  # what a graph finds gone

    def check_not_running(self, what: str) -> None:
        """RuntimeError inside of this thread's own forward or backward."""
        if self.schedule.running_here():
            raise RuntimeError(
                f"rank {dist.get_rank()}: module {self.units[0].core.name} is in a forward or "
                f"backward of this thread: {what} has to come after it"
            )

    def reset(self) -> None:
        """Puts the sharded parameters into their slots; then nothing derived from them is in
        flight. Waits for other threads; raises RuntimeError inside of this thread's own forward or
        backward."""
        self.check_not_running(
            "what frees or changes its parameters (load_state_dict, zero_grad, clip_grad_norm_, "
            "to, summon_full_params)"
        )
        self.pending_reduction = None
        self.backward_end.is_open = False
        self.schedule.reset()
        with self.reading():
            pass


def _first_problem(units: list[ShardedUnit]) -> Exception | None:
    """Why this rank can't run its units as they are, if it can't."""
    try:
        for unit in units:
            unit.check_materialized()
            unit.take_replaced()
    except (ValueError, RuntimeError) as error:
        return error
    return None


def _meet_peers(
    units: list[ShardedUnit], groups: ModelGroups, problem: Exception | None
) -> tuple[PeerGroup | None, int]:
    """Waits for the other ranks of the mesh at its first forward; returns their group and a channel
    that none of them has used. RuntimeError on every rank if they have other units, or only some of
    them have a ``problem``."""
    global _next_channel
    channel = _next_channel
    try:
        peers = groups.peers([unit.mesh for unit in units])
        if peers is not None:
            channel = _check_same_units(peers, units, problem, channel)
    except _DifferentModules:
        raise
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {dist.get_rank()} is at the first forward of module {units[0].core.name}, and "
            f"the other ranks have not come there within the group's timeout: {error}"
        ) from error
    # Another thread may have made a root meanwhile.
    _next_channel = max(_next_channel, channel + 1)
    return peers, channel


def _check_same_units(
    peers: PeerGroup, units: list[ShardedUnit], problem: Exception | None, channel: int
) -> int:
    """All ranks have units of the same shapes, in the same order; RuntimeError on every rank with
    the first one that differs. Returns the largest of the ranks' ``channel``."""
    agreement = peers.agreement("wrapped modules")
    # A problem comes first: it is what differs, if not all ranks have it.
    signatures = [f"problem: {problem is not None}", *(unit.signature() for unit in units)]
    digest = hashlib.sha256(json.dumps(signatures).encode()).digest()
    answers = agreement.exchange("compare", _CHANNEL_AND_DIGEST.pack(channel, digest))
    channels, digests = zip(*map(_CHANNEL_AND_DIGEST.unpack, answers), strict=True)
    if set(digests) == {digest}:
        return int(max(channels))
    descriptions = [str(problem or "no problem"), *(unit.describe() for unit in units)]
    described = json.dumps([signatures, descriptions]).encode()
    everyones = [json.loads(answer) for answer in agreement.exchange("describe", described)]
    differing = "\n\t".join(_first_difference(peers.ranks, everyones))
    here = f"(this is rank {dist.get_rank()})"
    if len({theirs[0] for theirs, _ in everyones}) > 1:
        raise _DifferentModules(f"some ranks can't run their modules {here}:\n\t{differing}")
    raise _DifferentModules(
        f"ranks have wrapped different modules {here}. Wrap the same ones, with the same "
        f"arguments, on all ranks. The first that differs:\n\t{differing}"
    )


def _first_difference(
    ranks: Sequence[int], everyones: Sequence[tuple[list[str], list[str]]]
) -> list[str]:
    """One line a rank about the first unit that is not the same on all. ``everyones``: each rank's
    signatures and descriptions of its units."""
    for index in range(max(len(signatures) for signatures, _ in everyones)):
        if len({_at(signatures, index) for signatures, _ in everyones}) > 1:
            texts = [_description(descriptions, index) for _, descriptions in everyones]
            return [f"rank {rank}: {text}" for rank, text in zip(ranks, texts, strict=True)]
    return []


def _at(signatures: Sequence[str], index: int) -> str | None:
    return signatures[index] if index < len(signatures) else None


def _description(units: Sequence[str], index: int) -> str:
    text = units[index] if index < len(units) else "no further module"
    return text.encode()[:_DESCRIPTION_LIMIT].decode(errors="replace")
