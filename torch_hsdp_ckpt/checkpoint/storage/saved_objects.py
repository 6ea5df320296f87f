"""What ``load`` will make of an object that is being saved is said at the save, not at the load."""

import logging
from collections.abc import Callable

from ... import _C
from ...errors import CheckpointError
from .object_table import name_of
from .objects import look_at_saved

_logger = logging.getLogger(__name__)
# A process says each thing once: a training job saves the same way thousands of times.
_said: set[str] = set()
_SHARDS = ("DTensor", "ShardedTensor")

Names = set[tuple[str, str]]  # modules and what is named of them
CheckObject = Callable[[str, memoryview], None]


def check_saved_object(name: str, data: memoryview) -> None:
    """For bytes that this process has just written by ``torch.save``, and may write to. Raises
    CheckpointError for an object that only ``trust_objects`` would load, and for shards in it."""
    names = _names_in(name, data)
    _refuse_shards(name, names)
    if names and (reason := _reason_to_refuse(name, data)):
        raise CheckpointError(
            f"{name}: no load would take this object without trust: {reason}; save it as plain "
            "data, or pass trust_objects=True to the save and to the load"
        )


def check_trusted_object(name: str, data: memoryview) -> None:
    """The same, but for what takes trust there is a warning only."""
    _refuse_shards(name, _names_in(name, data))
    warn_of_object(name, data)


def warn_of_object(name: str, data: memoryview) -> None:
    """For bytes that a planner of somebody's has made: what they are is its own affair."""
    if _names_in(name, data) and (reason := _reason_to_refuse(name, data)):
        _say(f"{name}: only a load with trust_objects=True will take this object: {reason}")


def _names_in(name: str, data: memoryview) -> Names:
    """What the object's pickle names; a pickle that names nothing holds plain data alone. Bytes of
    another kind name something that nobody knows, so that they are looked at."""
    unknown = {("", "")}
    try:
        entries = _C.object_archive(data, name)
        if entries is None or "data.pkl" not in entries:
            return unknown
        return _C.pickle_names(data, *entries["data.pkl"], name)
    except CheckpointError:
        return unknown


def _refuse_shards(name: str, names: Names) -> None:
    shards = {cls for module, cls in names if module.startswith("torch.distributed.")}
    for shard in sorted(shards.intersection(_SHARDS)):
        raise CheckpointError(
            f"{name}: it holds a {shard} within an object, such as a tuple or a "
            "dataclass, which is saved by one rank alone: the shards of all other ranks would be "
            "lost; put it into dicts and lists, or save its full tensor"
        )


def _reason_to_refuse(name: str, data: memoryview) -> str:
    """ "" if there is none."""
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
