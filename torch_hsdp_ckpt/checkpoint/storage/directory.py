"""Where a checkpoint is: a directory, named by a path or a ``file://`` address."""

import os
import re
from pathlib import Path

from ...errors import CheckpointError

# Also with one slash, which is what pathlib makes of two.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)(.*)", re.DOTALL)


def directory_of(path: str | os.PathLike[str]) -> Path:
    """The directory's absolute path, as it is now: whoever changes the working directory later does
    not move it.

    ``file:///a/b`` is ``/a/b``. Raises CheckpointError for any other address (``s3://``,
    ``memory://``), of which a local directory named ``s3:`` would be made, and for a ``file://``
    address of another host or with a percent sign, which readers take in two ways."""
    text = os.fspath(path)
    address = _ADDRESS.fullmatch(text)
    if address is None:
        return Path(text).absolute()
    scheme, slashes, rest = address.groups()
    if scheme.lower() != "file":
        raise CheckpointError(
            f"{text}: addresses of object stores and other file systems are not supported; pass a "
            "mounted directory, or a storage_writer and a storage_reader of the store, such as "
            f"torch's FsspecWriter and FsspecReader (a directory of this name: ./{text})"
        )
    if len(slashes) == 2:  # what stands before the next slash is a host
        host, slash, rest = rest.partition("/")
        if host != "localhost" or not slash:
            raise CheckpointError(
                f"{text}: a file:// address needs an absolute path, as in file:///a/b"
            )
    if "%" in rest:
        raise CheckpointError(
            f"{text}: a file:// address with a percent sign may be meant in two ways; pass the path"
        )
    return Path("/" + rest)


def encoded(path: str | os.PathLike[str]) -> bytes:
    """A path as the system has it, which need not be UTF-8."""
    return os.fsencode(path)
