"""Where ranks that are to have a process group of their own meet: a part of the default group's
store that no process before has written to.

torchrun gives the processes that it starts again the store of those before (torch 2.11 to 2.15,
``--rdzv-backend c10d``), in which Gloo would find the addresses of dead peers. Nothing that a
process is told tells one life of the job from another: ``TORCHELASTIC_RESTART_COUNT`` is each
agent's own count, and differs between hosts when one of them has seen a failure and the others
have seen that it came back. So the first rank draws a name, and hands it to those who answer."""

import secrets
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.1  # seconds


def default_store() -> Any:
    """The store that the job's ranks were started with."""
    return dist.distributed_c10d._get_default_store()


def meet_at(place: str, rank: int, size: int, timeout: timedelta) -> tuple[str, Any]:
    """A name that was never used before, the same for ``size`` ranks, and the part of the default
    group's store that is theirs by it.

    Collective over these ranks, of which this one is the ``rank``-th. ``place``: what tells them
    from others who meet at the same time; they may meet there again. No process group is used.
    Raises RuntimeError, naming who is missing, if a rank does not come within ``timeout``."""
    store = dist.PrefixStore(f"torch_hsdp_ckpt/meeting/{place}", default_store())
    drawn = secrets.token_hex(8)
    patience = _Patience(place, rank, size, timeout)
    if rank == 0:
        _invite(store, drawn, size, patience)
        name = drawn
    else:
        name = _answer(store, drawn, rank, patience)
    return name, dist.PrefixStore(f"torch_hsdp_ckpt/met/{name}", default_store())


class _Patience:
    """How long a rank waits for the others."""

    def __init__(self, place: str, rank: int, size: int, timeout: timedelta) -> None:
        self._place, self._rank, self._size, self._timeout = place, rank, size, timeout
        self._end = time.monotonic() + timeout.total_seconds()

    def until(self, has_come: Callable[[], bool], missing: Callable[[], object]) -> None:
        """Asks again and again. Not by the store's own wait, in which the store of a process serves
        no other thread. ``missing``: the ranks, for the error."""
        pause = _FIRST_PAUSE
        while not has_come():
            if time.monotonic() > self._end:
                raise RuntimeError(
                    f"rank {self._rank} of the {self._size} that meet for {self._place} has waited "
                    f"{self._timeout.total_seconds():g} s for {missing()}"
                )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)


def _invite(store: Any, name: str, size: int, patience: _Patience) -> None:
    """Tells ``name`` to all who ask, until each rank of this life has heard it."""
    waiting = set(range(1, size))

    def all_have_heard() -> bool:
        for rank in sorted(waiting):
            if store.check([f"heard/{name}/{rank}"]):
                waiting.discard(rank)
            # What a rank of a life before has asked is answered too: only the living hear it.
            elif store.check([f"asks/{rank}"]):
                store.set(f"answer/{store.get(f'asks/{rank}').decode()}", name)
        return not waiting

    patience.until(all_have_heard, lambda: f"ranks {sorted(waiting)}")


def _answer(store: Any, question: str, rank: int, patience: _Patience) -> str:
    """The name that the first rank has drawn: only that of this life can know ``question``."""
    store.set(f"asks/{rank}", question)
    patience.until(lambda: bool(store.check([f"answer/{question}"])), lambda: "rank 0")
    name = str(store.get(f"answer/{question}").decode())
    store.set(f"heard/{name}/{rank}", "")
    return name
