"""A checkpoint's `.metadata`: read without running anything in it, written with a checksum behind
the pickle."""

import os
import pickle
import stat

from torch.distributed.checkpoint.metadata import Metadata

from ... import _C
from ...errors import CheckpointError


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
    """The bytes of a `.metadata` file. Raises OSError, and CheckpointError for what is no file,
    such as a FIFO, or is larger than the decoder takes."""
    # Without O_NONBLOCK the open of a FIFO waits for a writer, for ever. It changes nothing for a
    # file.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{os.fspath(path)}: not a regular file")
        if status.st_size > _C.MAX_METADATA_BYTES:
            raise CheckpointError(
                f"{os.fspath(path)}: {status.st_size} bytes are too many for metadata"
            )
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def decode_metadata(file: bytes | memoryview, path: str | os.PathLike[str]) -> Metadata:
    """As :func:`read_metadata`, for a file's bytes; ``path`` is for messages only."""
    return _C.decode_metadata(file, os.fspath(path))


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
