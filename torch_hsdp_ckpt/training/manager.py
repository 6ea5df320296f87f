"""``CheckpointManager``: when to save, which checkpoints to keep, and which one to go on from."""

import functools
import json
import logging
import os
import struct
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

from .. import _C
from ..checkpoint.load.load import load
from ..checkpoint.save.async_save import (
    AsyncSave,
    async_save,
    await_save,
    wait_for_save_in_flight,
)
from ..checkpoint.save.save import save
from ..checkpoint.storage.directory import directory_of
from ..checkpoint.storage.writer import FileSystemWriter
from ..common.agreement import agreement_of
from ..errors import CheckpointError, CorruptCheckpointError
from . import run_directory as checkpoints
from .preemption import Preemption
from .run_owner import RunOwner

_logger = logging.getLogger(__name__)
State = dict[str, Any]
_PROCESS = struct.Struct("<IIqQ")  # of a _C.ProcessIdentity


class CheckpointManager:
    """The checkpoints of one training run, ``root/step-000120`` and so on. Every method but
    ``steps`` is called by all ranks.

    One job at a time saves into a root: from its first save until :meth:`close` it holds it. Which
    checkpoint is newer is said by the order of the saves, not by the step: after going back to an
    older one, what is saved then is the newest.

    Args:
        root: directory of the checkpoints, seen by all ranks; made by the first save. Only what a
            manager has saved there is ever deleted; everything else is left alone, and the log
            names once what is in the way.
        save_every: :meth:`save` does something at multiples of this step number.
        keep_last: the good checkpoints that were saved last and stay, at least 1. Older ones are
            deleted after a save has committed.
        keep_every: checkpoints at multiples of this stay for ever. None: none do.
        sigterm_deadline: seconds from SIGTERM in which the job may still save. The next
            :meth:`save` but one on every rank then saves whatever the step number, and
            :attr:`preempted` becomes true; the training loop should end. None: SIGTERM is not
            looked at. Set on the main thread.
        process_group: the ranks that save together; None: all.
        asynchronous: save by ``async_save``, in the background. An older checkpoint is deleted when
            the new one has committed; what fails is raised by the next :meth:`save` that is due, or
            by :meth:`close`.
        max_staging_bytes: what ``async_save`` takes under that name, 0 or more, only with
            ``asynchronous``: other saves copy nothing. None: no bound.
        trust_objects: objects that only trust can load are saved, and :meth:`restore_latest`
            loads them. It can run anything: for directories that only you write to.
        allow: classes that objects may be instances of when they are loaded, besides those of the
            state's own values. See :func:`load`.

    Without torch.distributed it is for one process. Raises ValueError for a number below its least,
    and for ``max_staging_bytes`` without ``asynchronous``; OSError, on every rank, for a root that
    can't be written to and holds no checkpoint to go on from."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        save_every: int = 1,
        keep_last: int = 3,
        keep_every: int | None = None,
        sigterm_deadline: float | None = None,
        process_group: Any = None,
        asynchronous: bool = False,
        max_staging_bytes: int | None = None,
        trust_objects: bool = False,
        allow: Iterable[type] = (),
    ) -> None:
        _check_at_least_one(save_every=save_every, keep_last=keep_last, keep_every=keep_every)
        _check_staging_bytes(max_staging_bytes, asynchronous)
        self.root = directory_of(root)
        self.save_every, self.keep_last, self.keep_every = save_every, keep_last, keep_every
        self.preempted = False
        self.asynchronous, self.max_staging_bytes = asynchronous, max_staging_bytes
        self.trust_objects, self.allow = trust_objects, tuple(allow)
        self._process_group = process_group
        self._agreement = agreement_of(process_group, "manager")
        self._job: list[_C.ProcessIdentity] = []  # the processes of all ranks, from the first save
        self._owner = RunOwner(self.root)  # of use on the coordinator
        self._named: set[str] = set()  # what the log has said of things in the way
        self._said_behind = False  # see _say_if_behind
        self._agreement.verdict("root", self._check_root)
        self._damaged: set[int] = set()
        self._saved_step: int | None = None
        self._restored_step: int | None = None  # and nothing saved since
        self._in_flight: AsyncSave | None = None
        self._settled = threading.Event()  # the save in flight has ended, old ones are deleted
        self._preemption: Preemption | None = None
        if sigterm_deadline is not None:
            self._preemption = Preemption(
                agreement_of(process_group, "preemption"), sigterm_deadline
            )

    def _check_root(self) -> bytes:
        found = checkpoints.contents(self.root)
        self._owner.look(found)
        error = checkpoints.why_unwritable(self.root)
        if error is not None:
            if not found.committed:
                raise error
            _logger.warning("%s: checkpoints can be read, and none be saved: %s", self.root, error)
        return b""

    def save(self, step: int, state: State | Callable[[], State]) -> bool:
        """Saves if it is time to; says whether it did. Call it after every step, on all ranks with
        the same ``step``.

        ``state``: what ``dcp.save`` takes, its ``Stateful`` objects included, or a function that
        makes it, called only if there is something to save. After a SIGTERM that all ranks have
        agreed on, saves once more if the deadline has not passed.

        Raises what the save raises, with ``asynchronous`` what the save before has raised (after a
        SIGTERM when this step has been saved), on every rank; the checkpoints that are there stay.
        """
        remaining = self._seconds_after_sigterm()
        if remaining is not None:
            return self._save_last(step, state, remaining)
        if step == self._saved_step or step % self.save_every:
            return False
        values = state() if callable(state) else state
        self._wait()
        self._start_save(step, values)
        return True

    def _seconds_after_sigterm(self) -> float | None:
        """What is left for the last save, at the one call that finds a SIGTERM; else None."""
        if self._preemption is None or self.preempted:
            return None
        return self._preemption.remaining()

    def _save_last(self, step: int, state: State | Callable[[], State], remaining: float) -> bool:
        """Saves whatever the step number, unless ``remaining`` seconds are none, and waits for the
        whole save: the process is to end."""
        self.preempted = True
        self._log_once(
            logging.WARNING,
            "SIGTERM: step %d is the last to be saved, %.1f s are left",
            step,
            remaining,
        )
        if step == self._saved_step:
            return False
        if remaining <= 0:
            self._log_once(
                logging.ERROR,
                "SIGTERM: the deadline has passed before step %d could be saved; nothing is",
                step,
            )
            return False
        values = state() if callable(state) else state
        failed_before: Exception | None = None
        try:
            self._wait()
        except Exception as error:
            failed_before = error  # raised when this step is saved
        self._start_save(step, values)
        self._wait()
        if failed_before is not None:
            raise failed_before
        return True

    def _start_save(self, step: int, values: State) -> None:
        """Saves, or with ``asynchronous`` begins to: the save is in flight then."""
        writer = self._begin_save(step)
        if not self.asynchronous:
            save(
                values,
                storage_writer=writer,
                process_group=self._process_group,
                no_dist=self._no_dist,
                trust_objects=self.trust_objects,
            )
            self._saved_step = step
            self._committed(step)
            return
        future: AsyncSave = async_save(
            values,
            storage_writer=writer,
            process_group=self._process_group,
            no_dist=self._no_dist,
            max_staging_bytes=self.max_staging_bytes,
            trust_objects=self.trust_objects,
        )
        self._in_flight, self._saved_step = future, step
        self._settled = threading.Event()
        future.add_done_callback(functools.partial(self._done, step, self._settled))

    def _begin_save(self, step: int) -> FileSystemWriter:
        """Makes sure that no other job saves here, and makes room; the writer of the save."""
        wait_for_save_in_flight()  # another manager's, whose files would be taken for leftovers
        if not self._job:
            packed = self._agreement.exchange("processes", _packed_process())
            self._job = [_C.ProcessIdentity(*_PROCESS.unpack(each)) for each in packed]
        writer = FileSystemWriter(checkpoints.path_of(self.root, step))

        def begin() -> bytes:
            found = checkpoints.contents(self.root)
            commit = self._owner.begin_save(found, self._job)
            writer._run_mark = self._owner.run, commit
            self._make_room(found)
            self._say_if_behind(step, [each.step for each in found.committed])
            return b""

        self._agreement.verdict("begin", begin)
        return writer

    def _say_if_behind(self, step: int, committed: list[int]) -> None:
        """Says once that training has gone back, so that a mistake is noticed."""
        higher = sorted(other for other in committed if other > step)
        if higher and not self._said_behind:
            self._said_behind = True
            _logger.warning(
                "%s: step %d is saved, and is the newest then; steps %s are newer by number only: "
                "they are of another branch, and go before it",
                self.root,
                step,
                higher,
            )

    def _make_room(self, found: checkpoints.Contents) -> None:
        """Removes what no checkpoint needs, before the save needs the room."""
        try:
            checkpoints.sweep(self.root, found.incomplete, self._job)
            if self._restored_step is not None:
                # What a job that was killed behind its last commit had still to delete. The newest
                # one has just been read, so that what stays is good.
                self._prune(found, {self._restored_step})
                self._restored_step = None
        except (CheckpointError, OSError) as error:
            _logger.warning("%s: leftovers of other saves are left: %s", self.root, error)

    def _done(self, step: int, settled: threading.Event, future: "Future[Any]") -> None:
        try:
            if future.exception() is None:
                self._committed(step)
        finally:
            settled.set()

    def _committed(self, step: int) -> None:
        self._damaged.discard(step)
        if not self._agreement.is_coordinator:
            return
        try:
            if self._owner.holds_root:  # else what is old is another job's to say
                self._prune(checkpoints.contents(self.root), {step})
        except Exception as error:
            # The save is good, whatever is in the way of this; what could not be deleted now is
            # tried again after the next one.
            _logger.warning(
                "step %d is saved; an older checkpoint could not be deleted: %s", step, error
            )

    def _wait(self) -> None:
        """Waits for the save in flight; raises, once and on every rank, what it raises."""
        in_flight = self._in_flight
        if in_flight is None:
            return
        try:
            await_save(in_flight)
            self._settled.wait()
        except BaseException as error:
            # After Ctrl-C in the wait the save goes on, and the next wait is for it.
            if in_flight.done() and in_flight.exception() in (error, error.__cause__):
                self._in_flight = self._saved_step = None
            raise
        self._in_flight = None

    def _log_once(self, level: int, message: str, *args: Any) -> None:
        """Logs what every rank knows once a job: the coordinator at ``level``, the others at
        DEBUG."""
        _logger.log(level if self._agreement.is_coordinator else logging.DEBUG, message, *args)

    @property
    def _no_dist(self) -> bool:
        return self._agreement.size == 1

    def _prune(self, found: checkpoints.Contents, spare: set[int]) -> None:
        run, damaged = self._owner.run, frozenset(self._damaged)
        retention = checkpoints.Retention(run, self.keep_last, self.keep_every, damaged)
        if gone := checkpoints.prune(self.root, found, retention, spare):
            _logger.info("deleted the checkpoints of steps %s", gone)
        self._name_what_stays(found, run)

    def _name_what_stays(self, found: checkpoints.Contents, run: int) -> None:
        """Says once of each directory with the name of a step that it is not this run's."""
        names = [*found.foreign]
        if run:
            others = (each.step for each in found.committed if each.run != run)
            names += [checkpoints.path_of(self.root, step).name for step in others]
        if new := [name for name in sorted(names) if name not in self._named]:
            self._named.update(new)
            _logger.warning(
                "%s: %s: not saved by this run's manager, never deleted by it",
                self.root,
                ", ".join(new),
            )

    def restore_latest(self, state: State) -> int | None:
        """Loads the good checkpoint that was saved last into ``state``, in place, as ``dcp.load``
        does; returns its step.

        None if there is no committed checkpoint. Checkpoints that did not commit, lack files or
        fail their checksums are skipped, each with a warning that says why. So is said which steps
        have higher numbers and were saved before: of a branch that was left. A ``Stateful`` object
        is handed the state of a good one only; tensors may hold parts of a damaged one until an
        older one is read over them.

        Raises:
            CheckpointError: there are committed checkpoints and none of them is good: starting anew
                would be a loss unnoticed.
            CheckpointError, OSError: ``state`` does not fit the checkpoint (a key or a shape
                differs), or reading failed for a reason that is not damage (no permission, a
                storage that does not answer). Older checkpoints are not tried then.
        """
        self._wait()
        wait_for_save_in_flight()  # another manager's
        listing = self._agreement.verdict("list", self._listing)
        committed, incomplete = json.loads(listing)
        for step in incomplete:
            path = checkpoints.path_of(self.root, step)
            self._log_once(logging.WARNING, "%s: its save did not come to an end, skipped", path)
        for at, step in reversed(list(enumerate(committed))):
            path = checkpoints.path_of(self.root, step)
            damage = self._restore(path, state)
            if not damage:
                self._saved_step = self._restored_step = step
                self._log_once(logging.INFO, "%s: restored", path)
                self._name_branch(path, [other for other in committed[:at] if other > step])
                return int(step)
            self._log_once(logging.WARNING, "%s: damaged, skipped: %s", path, damage)
            self._damaged.add(step)
        if committed:
            raise CheckpointError(
                f"{self.root}: none of the committed checkpoints (steps {sorted(committed)}) can "
                "be read; the log says why. Delete them to start anew"
            )
        return None

    def _name_branch(self, path: Path, higher: list[int]) -> None:
        if higher:
            self._log_once(
                logging.WARNING,
                "%s: restored, since it was saved last; steps %s are newer by number only: they "
                "are of another branch, saved before it",
                path,
                sorted(higher),
            )

    def _restore(self, path: Path, state: State) -> str:
        """Loads a checkpoint, or says which damage was found in it.

        One rank looks at the files first, so that a checkpoint that can't be whole is not begun
        with."""
        look = functools.partial(_visible_damage, path)
        damage = self._agreement.verdict("look", look).decode()
        return damage or self._load(path, state)

    def _load(self, path: Path, state: State) -> str:
        """Loads a checkpoint, or says which damage was found in it. Everything else that goes wrong
        is raised."""
        try:
            load(
                state,
                checkpoint_id=path,
                process_group=self._process_group,
                no_dist=self._no_dist,
                trust_objects=self.trust_objects,
                allow=self.allow,
            )
        except (CorruptCheckpointError, OSError) as error:
            if not checkpoints.is_damage(error):
                raise
            return str(error)
        return ""

    def _listing(self) -> bytes:
        """Steps of the committed checkpoints in the order of their commits, and of the incomplete
        ones."""
        found = checkpoints.contents(self.root)
        for each in found.committed:
            if each.failure is not None and not checkpoints.is_damage(each.failure):
                raise each.failure
        self._owner.look(found)
        self._name_what_stays(found, found.newest_of_a_run.run)
        if found.newest.commit == 0 and found.newest_of_a_run.commit:
            _logger.warning(
                "%s: step %d comes first: no manager has saved it, and it is newer than all that "
                "one has",
                self.root,
                found.newest.step,
            )
        return json.dumps([[each.step for each in found.committed], found.incomplete]).encode()

    def steps(self) -> list[int]:
        """The steps of the committed checkpoints, ascending, as this rank sees the directory
        now."""
        return checkpoints.committed_steps(self.root)

    def close(self) -> None:
        """Waits for a save in flight, whose exception it raises, and gives SIGTERM and the root
        back."""
        self._give_signal_back()
        self._wait()
        self._owner.release()

    def _give_signal_back(self) -> None:
        if self._preemption is not None:
            self._preemption.close()
            self._preemption = None

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            return self.close()
        # Nothing is waited for: peers that have not failed may not come. A save in flight goes on,
        # and says by itself how it ends.
        self._give_signal_back()
        if self._in_flight is None or self._in_flight.done():
            self._owner.release()


def _packed_process() -> bytes:
    process = _C.process_identity()
    return _PROCESS.pack(process.host, process.boot, process.pid, process.start)


def _visible_damage(path: Path) -> bytes:
    return (checkpoints.damage(path) or "").encode()


def _check_at_least_one(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _check_staging_bytes(max_staging_bytes: int | None, asynchronous: bool) -> None:
    if max_staging_bytes is None:
        return
    if max_staging_bytes < 0:
        raise ValueError(f"max_staging_bytes={max_staging_bytes}: bytes, 0 or more")
    if not asynchronous:
        raise ValueError(
            f"max_staging_bytes={max_staging_bytes}: it bounds asynchronous saves: pass "
            "asynchronous=True too"
        )
