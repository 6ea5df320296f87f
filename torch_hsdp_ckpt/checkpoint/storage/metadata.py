"""A checkpoint's `.metadata`: read without running anything in it, written with a checksum behind
the pickle."""

import dataclasses
import os
import pickle
from collections.abc import Callable
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata
from typing_extensions import Self

from ... import _C
from .directory import encoded


def read_metadata(path: str | os.PathLike[str]) -> Metadata:
    """The metadata in a `.metadata` file, whether stock DCP or this package wrote it: what
    ``pickle.load`` gives, but read by a decoder that knows DCP's classes and plain data and can run
    nothing.

    ``TensorProperties.strides`` (torch 2.15) is dropped by a torch that does not have it.

    Raises:
        OSError: the file can't be read.
        CheckpointError: it is no regular file, or of 4 GiB or more, or it names a class that is
            neither DCP's nor plain data; the message says which.
        CorruptCheckpointError: the bytes are no such pickle, differ from their checksum, or name
            files outside the directory.
    """
    return decode_metadata(read_metadata_bytes(path), path)


def read_metadata_bytes(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a `.metadata` file, opened once, and looked at when it is open. Raises OSError,
    and CheckpointError for what is no file, such as a FIFO, is a link that leads out of the
    directory, or is larger than the decoder takes."""
    directory, name = os.path.split(os.fspath(path))
    return _C.read_metadata_file(encoded(directory), encoded(name))


def decode_metadata(file: bytes | memoryview, path: str | os.PathLike[str]) -> Metadata:
    """As :func:`read_metadata`, for a file's bytes; ``path`` is for messages only."""
    return _C.decode_metadata(file, encoded(path))


def encode_metadata(metadata: Metadata) -> bytes:
    """The bytes of a `.metadata` file: a pickle that stock DCP reads, then our trailer with a
    CRC-32, which it never sees.

    Parts of exactly DCP's types and plain data are written natively, others by :mod:`pickle`, and
    then read back: an object that :func:`read_metadata` would refuse is refused here, before a
    checkpoint depends on it.

    Raises:
        CheckpointError: the metadata (for example a planner's data) holds an object of another
            class, or names a file outside the checkpoint's directory; the message says which.
    """
    native = _C.encode_metadata(metadata)
    if native is not None:
        return native
    data = pickle.dumps(metadata)
    _C.decode_metadata(data, "the metadata to be written")
    return data + _C.metadata_trailer(data)


class LazyMetadata(Metadata):
    """A ``Metadata`` that is decoded when it is first looked at: at 1,024 ranks it has 128,000
    chunks, which hardly any caller wants as Python objects on every rank.

    Compares equal to the same ``Metadata``; a pickle or a copy of it is a plain one."""

    def __init__(self, *fields: Any, **named: Any) -> None:
        self.__dict__.update(_load=None, _loaded=Metadata(*fields, **named))

    @classmethod
    def lazy(cls, load: Callable[[], Metadata]) -> Self:
        self = cls.__new__(cls)
        self.__dict__.update(_load=load, _loaded=None)
        return self

    def plain(self) -> Metadata:
        """DCP's own object."""
        if self.__dict__["_loaded"] is None:
            self.__dict__.update(_loaded=self.__dict__["_load"](), _load=None)
        loaded: Metadata = self.__dict__["_loaded"]
        return loaded

    def __eq__(self, other: object) -> bool:
        return self.plain() == (other.plain() if isinstance(other, LazyMetadata) else other)

    __hash__ = None  # type: ignore[assignment]  # as Metadata's

    def __repr__(self) -> str:
        return repr(self.plain())

    def __reduce__(self) -> tuple[Any, ...]:
        plain = self.plain()
        return Metadata, tuple(getattr(plain, field.name) for field in dataclasses.fields(Metadata))


def _field(name: str) -> property:
    return property(
        lambda self: getattr(self.plain(), name),
        lambda self, value: setattr(self.plain(), name, value),
    )


for _name in (field.name for field in dataclasses.fields(Metadata)):
    setattr(LazyMetadata, _name, _field(_name))
