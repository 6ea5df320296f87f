"""Puts this package in torch's place, by name, in all modules that have been imported."""

import functools
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch.distributed.checkpoint as dcp
import torch.distributed.fsdp as fsdp

from ..checkpoint.load.load import load
from ..checkpoint.save.async_save import async_save
from ..checkpoint.save.save import save
from ..filesystem import FileSystemReader, FileSystemWriter
from ..hsdp.fsdp import FullyShardedDataParallel
from ..hsdp.fully_shard import fully_shard
from .stand_in import Choice, stand_in

# Where torch's own code calls itself by these names, and what it makes has to stay torch's.
_INSIDE_TORCH = (
    "torch.distributed.fsdp._",
    "torch.distributed.checkpoint.state_dict",  # its saver and loader too
    "torch_hsdp_ckpt.",
)


class Replaced(NamedTuple):
    """A name that stands for this package's."""

    module: str
    name: str


def _function(choice: Choice) -> Any:
    """A function in torch's place."""

    @functools.wraps(choice.torchs)
    def call(*args: Any, **kwargs: Any) -> Any:
        return choice(*args, **kwargs)

    return call


_CHOICES = [
    Choice("FullyShardedDataParallel", FullyShardedDataParallel, fsdp.FullyShardedDataParallel),
    Choice("FileSystemWriter", FileSystemWriter, dcp.FileSystemWriter),
    Choice("FileSystemReader", FileSystemReader, dcp.FileSystemReader),
    Choice("fully_shard", fully_shard, fsdp.fully_shard),
    Choice("save", save, dcp.save),
    Choice("load", load, dcp.load),
    Choice("async_save", async_save, dcp.async_save),
]
# By the id of torch's: what is in its place.
_REPLACEMENTS: dict[int, Any] = {
    id(choice.torchs): (stand_in if isinstance(choice.torchs, type) else _function)(choice)
    for choice in _CHOICES
}
_ORIGINALS = {id(_REPLACEMENTS[id(choice.torchs)]): choice.torchs for choice in _CHOICES}


class Patch:
    """That torch's names stand for this package's, until :meth:`undo` or the end of a ``with``."""

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def undo(self) -> None:
        """Gives torch's names back, also where they were taken over since."""
        _exchange(_ORIGINALS)

    def report(self) -> list[Replaced]:
        """The names that stand for this package's now, by module."""
        return sorted(Replaced(module, name) for module, name, _ in _names(_ORIGINALS))


def patch(*, strict: bool = False) -> Patch:
    """Puts ``FullyShardedDataParallel``, ``fully_shard``, ``save``, ``load``, ``async_save``,
    ``FileSystemWriter`` and ``FileSystemReader`` of this package in the place of torch's, in torch
    and in all modules that have imported them; who imports them later gets them too. A second call
    takes in what has come since.

    Arguments that ours refuse go to torch's, with one line in the log; ``strict``: they raise
    ValueError. isinstance and subclasses of torch's classes work as before."""
    for choice in _CHOICES:
        choice.strict = strict
    _exchange(_REPLACEMENTS)
    return Patch()


def _exchange(by_id: dict[int, Any]) -> None:
    for module, name, value in list(_names(by_id)):
        setattr(sys.modules[module], name, by_id[id(value)])


def _names(by_id: dict[int, Any]) -> Iterator[tuple[str, str, Any]]:
    for module_name, module in list(sys.modules.items()):
        if module is None or module_name.startswith(_INSIDE_TORCH):
            continue
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if id(value) in by_id:
                yield module_name, name, value
