"""``CheckpointManager``: when to save, which checkpoints to keep, and which one to go on from."""

import errno
import functools
import json
import logging
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

from ..checkpoint.load.load import load
from ..checkpoint.save.async_save import AsyncSave, async_save, await_save
from ..checkpoint.save.save import save
from ..common.agreement import agreement_of
from ..errors import CheckpointError, CorruptCheckpointError
from . import run_directory as checkpoints
from .preemption import Preemption

_logger = logging.getLogger(__name__)
State = dict[str, Any]


class CheckpointManager:
    """The checkpoints of one training run, ``root/step-000120`` and so on. Every method but
    ``steps`` is called by all ranks.

    Args:
        root: directory of the checkpoints, seen by all ranks; made by the first save. Other things
            in it are left alone.
        save_every: :meth:`save` does something at multiples of this step number.
        keep_last: the newest good checkpoints that stay, at least 1. Older ones are deleted after a
            save has committed.
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
    and for ``max_staging_bytes`` without ``asynchronous``."""

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
        self.root = Path(root)
        self.save_every, self.keep_last, self.keep_every = save_every, keep_last, keep_every
        self.preempted = False
        self.asynchronous, self.max_staging_bytes = asynchronous, max_staging_bytes
        self.trust_objects, self.allow = trust_objects, tuple(allow)
        self._process_group = process_group
        self._agreement = agreement_of(process_group, "manager")
        self._damaged: set[int] = set()
        self._saved_step: int | None = None
        self._in_flight: AsyncSave | None = None
        self._settled = threading.Event()  # the save in flight has ended, old ones are deleted
        self._preemption: Preemption | None = None
        if sigterm_deadline is not None:
            self._preemption = Preemption(
                agreement_of(process_group, "preemption"), sigterm_deadline
            )

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
        path = checkpoints.path_of(self.root, step)
        if not self.asynchronous:
            save(
                values,
                checkpoint_id=path,
                process_group=self._process_group,
                no_dist=self._no_dist,
                trust_objects=self.trust_objects,
            )
            self._saved_step = step
            self._committed(step)
            return
        future: AsyncSave = async_save(
            values,
            checkpoint_id=path,
            process_group=self._process_group,
            no_dist=self._no_dist,
            max_staging_bytes=self.max_staging_bytes,
            trust_objects=self.trust_objects,
        )
        self._in_flight, self._saved_step = future, step
        self._settled = threading.Event()
        future.add_done_callback(functools.partial(self._done, step, self._settled))

    def _done(self, step: int, settled: threading.Event, future: "Future[Any]") -> None:
        try:
            if future.exception() is None:
                self._committed(step)
        finally:
            settled.set()

    def _committed(self, step: int) -> None:
        self._damaged.discard(step)
        if self._agreement.is_coordinator:
            self._prune(step)

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
            if in_flight.done() and in_flight.exception() is error:
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

    def _prune(self, step: int) -> None:
        try:
            gone = checkpoints.prune(
                self.root, self.keep_last, self.keep_every, {step}, set(self._damaged)
            )
        except OSError as error:
            # The save is good; what could not be deleted now is tried again after the next one.
            _logger.warning(
                "step %d is saved; an older checkpoint could not be deleted: %s", step, error
            )
        else:
            if gone:
                _logger.info("deleted the checkpoints of steps %s", gone)

    def restore_latest(self, state: State) -> int | None:
        """Loads the newest good checkpoint into ``state``, in place, as ``dcp.load`` does; returns
        its step.

        None if there is no committed checkpoint. Checkpoints that did not commit, lack files or
        fail their checksums are skipped, each with a warning that says why. A ``Stateful`` object
        is handed the state of a good one only; tensors may hold parts of a damaged one until an
        older one is read over them.

        Raises:
            CheckpointError: there are committed checkpoints and none of them is good: starting anew
                would be a loss unnoticed.
            CheckpointError, OSError: ``state`` does not fit the checkpoint (a key or a shape
                differs), or reading failed for a reason that is not damage. Older checkpoints are
                not tried then.
        """
        self._wait()
        listing = self._agreement.verdict("list", self._listing)
        committed, incomplete = json.loads(listing)
        for step in incomplete:
            path = checkpoints.path_of(self.root, step)
            self._log_once(logging.WARNING, "%s: its save did not come to an end, skipped", path)
        for step in reversed(committed):
            path = checkpoints.path_of(self.root, step)
            damage = self._restore(path, state)
            if not damage:
                self._saved_step = step
                self._log_once(logging.INFO, "%s: restored", path)
                return int(step)
            self._log_once(logging.WARNING, "%s: damaged, skipped: %s", path, damage)
            self._damaged.add(step)
        if committed:
            raise CheckpointError(
                f"{self.root}: none of the committed checkpoints (steps {committed}) can be read; "
                "the log says why. Delete them to start anew"
            )
        return None

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
        except CorruptCheckpointError as error:
            return str(error)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EIO):
                raise
            return str(error)
        return ""

    def _listing(self) -> bytes:
        return json.dumps(checkpoints.steps_in(self.root)).encode()

    def steps(self) -> list[int]:
        """The steps of the committed checkpoints, ascending, as this rank sees the directory
        now."""
        return checkpoints.steps_in(self.root)[0]

    def close(self) -> None:
        """Waits for a save in flight, whose exception it raises, and gives SIGTERM back."""
        if self._preemption is not None:
            self._preemption.close()
            self._preemption = None
        self._wait()

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            _logger.error("%s: the save in flight failed too: %s", self.root, failure)


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
