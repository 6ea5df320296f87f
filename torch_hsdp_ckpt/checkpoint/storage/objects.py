"""Objects of a checkpoint, which are pickles: what may be made of them, and what may not."""

import dataclasses
import io
from typing import Any

import torch
from typing_extensions import Buffer

from ... import _C
from ...errors import CheckpointError, CorruptCheckpointError
from .object_builder import ObjectBuilder
from .object_classes import AllowedClasses, Classes, ClassesOfTensors, ImportedClasses
from .object_legacy import OBJECT, PICKLES, StorageScan
from .object_storages import ArchiveStorages, InPlace, Loaded
from .object_table import MalformedError, show

_SHOWN = 200  # characters of a library's message
_TIMES = 4  # an array passes through text and bytes on its way


@dataclasses.dataclass(frozen=True)
class Trust:
    """``objects``: their pickles are run as they are, which can do anything. ``classes``: those
    that objects may be made of without that."""

    objects: bool
    classes: Classes

    @staticmethod
    def of(trust_objects: bool, allow: Any) -> "Trust":
        """Raises TypeError if ``allow`` holds anything but classes."""
        for each in allow:
            if not isinstance(each, type):
                raise TypeError(f"allow={each!r}: classes are allowed, by the classes themselves")
        return Trust(trust_objects, AllowedClasses.of(allow))

    def for_target(self, target: Any) -> "Trust":
        """An object that goes where ``target`` is may be of its classes."""
        assert isinstance(self.classes, AllowedClasses)
        return Trust(self.objects, self.classes.with_those_in(target))

    @staticmethod
    def for_tensor(target: torch.Tensor) -> "Trust":
        """For a tensor's record whose numbers go to ``target``."""
        allowed = AllowedClasses.of(()).with_those_in(target)
        return Trust(False, ClassesOfTensors(allowed))


def load_object(data: bytes, what: str, trust: Trust) -> Any:
    """The object in bytes that ``torch.save`` wrote. Unless ``trust.objects``, it is made of the
    kinds that ``object_table.py`` lists and of classes that are allowed, and nothing else is run or
    imported. As in DCP, tensors go back to the device they were on; to the CPU where there is no
    such device.

    Raises:
        CheckpointError: the object needs more than that.
        CorruptCheckpointError: the bytes are no such object, or one that makes more than they
            explain.
        MemoryError, torch.OutOfMemoryError: there is no memory for it.
    """
    if trust.objects:
        return _load_trusted(data, what)
    try:
        return _build(data, what, trust.classes, Loaded())
    except (CorruptCheckpointError, MemoryError, torch.OutOfMemoryError):
        raise
    except CheckpointError as error:
        raise CheckpointError(
            f"{what}: the object is not loaded, for it needs more than everyday kinds: {error}\n"
            "Have an object of that class in its place in the state dict, or pass allow=[the "
            "class]; if you trust the checkpoint's source, pass trust_objects=True"
        ) from error
    except MalformedError as error:
        raise _corrupt(what, f"its pickle {error}") from error
    except Exception as error:
        problem = f"{type(error).__name__}: {_text_of(error)}"
        raise _corrupt(what, f"its pickle does not fit: {problem}") from error


@dataclasses.dataclass(frozen=True)
class SavedObject:
    """What it takes to load an object: ``refused``: why it needs trust, "" if it does not;
    ``classes``: those of users' that it is made of."""

    refused: str
    classes: frozenset[type]


def look_at_saved(data: memoryview, what: str) -> SavedObject:
    """For bytes that this process has just written, and may write to. Nothing of them is copied."""
    classes = ImportedClasses()
    try:
        _build(data, what, classes, InPlace())
    except Exception as error:
        return SavedObject(str(error), frozenset(classes.found))
    return SavedObject("", frozenset(classes.found))


def _text_of(error: Exception) -> str:
    """A KeyError writes out its key, which may be anything."""
    shown = (each[:_SHOWN] if type(each) is str else show(each) for each in error.args)
    return ", ".join(shown)


def _corrupt(what: str, problem: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"{what}: the object is not loaded: {problem}")


def _load_trusted(data: bytes, what: str) -> Any:
    location = None if torch.accelerator.is_available() else "cpu"
    try:
        return torch.load(io.BytesIO(data), map_location=location, weights_only=False)
    except Exception as error:
        raise CorruptCheckpointError(
            f"{what}: torch.load refuses the object: {type(error).__name__}: {error}"
        ) from error


def _build(data: Buffer, what: str, classes: Classes, memory: Loaded) -> Any:
    problem = f"{what}: the object is not loaded"
    entries = _C.object_archive(data, what)
    if entries is None:
        entries = _legacy_entries(data, problem, classes)
    if "data.pkl" not in entries:
        raise _corrupt(what, "it has no pickle")
    first, size = entries["data.pkl"]
    storages = ArchiveStorages(data, entries, memory)
    builder = ObjectBuilder(_limit(data), classes, storages)
    value, _ = _C.build_object(data, first, size, problem, builder)
    builder.bounds.check_all_set()
    return value


def _limit(data: Buffer) -> int:
    return _TIMES * memoryview(data).nbytes


def _legacy_entries(data: Buffer, problem: str, classes: Classes) -> dict[str, tuple[int, int]]:
    """The places of an object of the older format, by the names that they have in an archive."""
    end = memoryview(data).nbytes
    scan = StorageScan(ObjectBuilder(_limit(data), classes, storages=None))
    begins, value = [0], None
    for _ in range(PICKLES):
        value, size = _C.build_object(data, begins[-1], end, problem, scan)
        begins.append(begins[-1] + size)
    first, behind = begins[OBJECT : OBJECT + 2]
    return {"data.pkl": (first, behind - first), **scan.entries(value, begins[-1], end)}


def checked_stream(data: bytes, what: str, trust: Trust) -> io.BytesIO:
    """For planners, which run an object's pickle: the bytes as they are if they are trusted, else
    bytes that this process made of what :func:`load_object` gave, so that nothing of the
    checkpoint's own reaches a pickle machine that runs code. Classes that are allowed may run to be
    pickled and unpickled, as the planner wants it."""
    if trust.objects:
        return io.BytesIO(data)
    stream = io.BytesIO()
    torch.save(load_object(data, what, trust), stream)
    stream.seek(0)
    return stream
