"""What ``load`` will make of an object that is being saved is said at the save, not at the load."""

import logging
import re
from collections.abc import Callable

from ...errors import CheckpointError
from .object_table import name_of
from .objects import look_at_saved

_logger = logging.getLogger(__name__)
# A process says each thing once: a training job saves the same way thousands of times.
_said: set[str] = set()
# GLOBAL, without which a pickle holds plain data alone.
_GLOBAL = re.compile(rb"c[\w.]+\n[\w.]+\n")
_SHARD = re.compile(rb"ctorch\.distributed\.[\w.]+\n(DTensor|ShardedTensor)\n")

CheckObject = Callable[[str, memoryview], None]


def check_saved_object(name: str, data: memoryview) -> None:
    """For bytes that this process has just written by ``torch.save``, and may write to. Raises
    CheckpointError for an object that only ``trust_objects`` would load, and for shards in it."""
    _refuse_shards(name, data)
    if reason := _reason_to_refuse(name, data):
        raise CheckpointError(
            f"{name}: no load would take this object without trust: {reason}; save it as plain "
            "data, or pass trust_objects=True to the save and to the load"
        )


def check_trusted_object(name: str, data: memoryview) -> None:
    """The same, but for what takes trust there is a warning only."""
    _refuse_shards(name, data)
    warn_of_object(name, data)


def warn_of_object(name: str, data: memoryview) -> None:
    """For bytes that a planner of somebody's has made: what they are is its own affair."""
    if reason := _reason_to_refuse(name, data):
        _say(f"{name}: only a load with trust_objects=True will take this object: {reason}")


def _refuse_shards(name: str, data: memoryview) -> None:
    if shard := _SHARD.search(data):
        raise CheckpointError(
            f"{name}: it holds a {shard[1].decode()} within an object, such as a tuple or a "
            "dataclass, which is saved by one rank alone: the shards of all other ranks would be "
            "lost; put it into dicts and lists, or save its full tensor"
        )


def _reason_to_refuse(name: str, data: memoryview) -> str:
    """ "" if there is none."""
    if not _GLOBAL.search(data):
        return ""
    look = look_at_saved(data, name)
    if look.classes and not look.refused:
        classes = ", ".join(sorted(map(name_of, look.classes)))
        _say(
            f"{name}: to load it the state dict needs an object of the same class in this place, "
            f"or load needs allow=[...]: {classes}"
        )
    return look.refused


def _say(message: str) -> None:
    if message not in _said:
        _said.add(message)
        _logger.warning("%s", message)
