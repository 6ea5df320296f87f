"""DCP's file system storage with the bytes moved in C++: drop-ins for torch's ``FileSystemWriter``
and ``FileSystemReader``.

What the writer here writes, stock torch reads, and the reader here reads what stock torch wrote.
``docs/design/format.md`` has the bytes and the order of steps that makes a save atomic."""

from .checkpoint.storage.reader import FileSystemReader
from .checkpoint.storage.writer import FileSystemWriter

__all__ = ["FileSystemReader", "FileSystemWriter"]
