"""Puts this package in torch's place, by name, in all modules that have been imported."""

import functools
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as _state_dict
import torch.distributed.fsdp as fsdp

from ..checkpoint.load.load import load
from ..checkpoint.save.async_save import async_save
from ..checkpoint.save.save import save
from ..filesystem import FileSystemReader, FileSystemWriter
from ..hsdp.fsdp import FullyShardedDataParallel
from ..hsdp.fully_shard import fully_shard, register_fsdp_forward_method, share_comm_ctx
from . import turns
from .replacement import Replacement, always_ours, by_modules, is_torchs_for, wraps_modules
from .stand_in import stand_in

# Where torch's own code calls itself by these names, and what it makes has to stay torch's. They
# are imported by now: whoever came later would take over what has the name then.
_INSIDE_TORCH = (
    "torch.distributed.fsdp._",
    _state_dict.__name__,
    "torch.distributed.checkpoint.state_dict_saver",
    "torch.distributed.checkpoint.state_dict_loader",
    "torch_hsdp_ckpt.",
)


class Replaced(NamedTuple):
    """A name that stands for this package's."""

    module: str
    name: str


# What torch makes public, and who decides a call by that name while it is patched.
_PUBLIC: dict[Replaced, Replacement] = {
    Replaced(module.__name__, name): Replacement(ours, getattr(module, name), decide)
    for module, name, ours, decide in (
        (fsdp, "FullyShardedDataParallel", FullyShardedDataParallel, wraps_modules),
        (fsdp, "fully_shard", fully_shard, wraps_modules),
        (fsdp, "register_fsdp_forward_method", register_fsdp_forward_method, by_modules),
        (fsdp, "share_comm_ctx", share_comm_ctx, by_modules),
        (dcp, "FileSystemWriter", FileSystemWriter, always_ours),
        (dcp, "FileSystemReader", FileSystemReader, always_ours),
        (dcp, "save", save, always_ours),
        (dcp, "load", load, always_ours),
        (dcp, "async_save", async_save, always_ours),
    )
    if hasattr(module, name)  # torch 2.11 has no share_comm_ctx
}


def _made_for(at: Replaced, replacement: Replacement) -> Any:
    if isinstance(replacement.torchs, type):
        return stand_in(replacement, at.module)
    made = replacement.as_function()
    made.__module__ = at.module  # where `pickle` finds it again
    return made


# By the id of torch's: what is in its place; and the way back.
_REPLACEMENTS: dict[int, Any] = {
    id(replacement.torchs): _made_for(at, replacement) for at, replacement in _PUBLIC.items()
}
_ORIGINALS: dict[int, Any] = {
    id(_REPLACEMENTS[id(replacement.torchs)]): replacement.torchs
    for replacement in _PUBLIC.values()
}
_TORCHS_CLASS: Any = fsdp.FullyShardedDataParallel


class Patch:
    """That torch's names stand for this package's, until :meth:`undo` or the end of a ``with``."""

    def __init__(self, strict: bool) -> None:
        self.strict = strict

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def undo(self) -> None:
        """Ends this patch. With the last one that is in force torch's names are given back, also
        where they were taken over since. A second time changes nothing."""
        with turns.lock:
            if self not in turns.in_force:
                return
            turns.in_force.remove(self)
            if not turns.in_force:
                _exchange(_ORIGINALS)
                _give_constructor_back()

    def report(self) -> list[Replaced]:
        """The names that stand for this package's now, by module."""
        return sorted(Replaced(module, name) for module, name, _ in _names(_ORIGINALS))


def patch(*, strict: bool = False) -> Patch:
    """Puts this package's ``FullyShardedDataParallel``, ``fully_shard``, ``save``, ``load``,
    ``async_save``, ``FileSystemWriter`` and ``FileSystemReader`` in the place of torch's, in
    ``torch.distributed.fsdp`` and ``torch.distributed.checkpoint`` and in all modules that have
    imported them; who imports them later gets them too. A second call takes in what has come since.

    Construction arguments that ours refuse go to torch's, with one line in the log, and so do
    wrappers around a module of which that is so; ``strict``: they raise ValueError. isinstance goes
    by both sides' classes, and subclasses of torch's classes are torch's. What is held elsewhere
    than as a module's attribute (a default argument, a registry) is not found. Patches count: torch
    has its names back when all are undone, or by ``unpatch()``.

    ValueError if somebody else has replaced one of the names."""
    with turns.lock:
        _check_names()
        made = Patch(strict)
        if not turns.in_force:
            _take_constructor()
        turns.in_force.append(made)
        _exchange(_REPLACEMENTS)
    return made


def unpatch() -> None:
    """Ends all patches that are in force."""
    with turns.lock:
        for each in list(turns.in_force):
            each.undo()


def _take_constructor() -> None:
    """That of torch's own class and what is derived from it wraps what is inside by the class's
    name: torch's own while it runs."""
    init = _TORCHS_CLASS.__init__

    @functools.wraps(init)
    def on_torchs_turn(self: Any, *args: Any, **kwargs: Any) -> None:
        with turns.torchs_turn():
            init(self, *args, **kwargs)
        is_torchs_for(self, "it is of torch's class, or of one derived from it")

    on_torchs_turn.is_compats = True  # type: ignore[attr-defined]
    _TORCHS_CLASS.__init__ = on_torchs_turn


def _give_constructor_back() -> None:
    """Unless somebody else has taken it since."""
    if hasattr(_TORCHS_CLASS.__init__, "is_compats"):
        _TORCHS_CLASS.__init__ = _TORCHS_CLASS.__init__.__wrapped__


def _check_names() -> None:
    for at, replacement in _PUBLIC.items():
        value = getattr(sys.modules[at.module], at.name, None)
        if value is not replacement.torchs and id(value) not in _ORIGINALS:
            raise ValueError(
                f"{at.module}.{at.name} is not torch's own any more but {value!r}: call patch() "
                "before whatever has put that there, or leave one of the two out"
            )


def _exchange(by_id: dict[int, Any]) -> None:
    for module, name, value in list(_names(by_id)):
        setattr(sys.modules[module], name, by_id[id(value)])


def _names(by_id: dict[int, Any]) -> Iterator[tuple[str, str, Any]]:
    stay = _INSIDE_TORCH if by_id is _REPLACEMENTS else ()
    for module_name, module in list(sys.modules.items()):
        if module is None or module_name.startswith(stay):
            continue
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if id(value) in by_id:
                yield module_name, name, value
