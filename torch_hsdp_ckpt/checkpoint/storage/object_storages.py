"""The storages of an object's tensors, which lie in its file."""

import torch
from torch import UntypedStorage
from torch.storage import TypedStorage
from typing_extensions import Buffer

from ...common.devices import is_here
from .object_table import MalformedError


def _typed(storage: UntypedStorage, dtype: torch.dtype) -> TypedStorage:
    return TypedStorage(  # type: ignore[no-untyped-call]
        wrap_storage=storage, dtype=dtype, _internal=True
    )


def _on_device(storage: UntypedStorage, location: str) -> UntypedStorage:
    """On the device that it was on, if there is one here."""
    device_type = location.split(":")[0]
    if device_type == "cpu" or not is_here(device_type):
        return storage
    device = torch.device(location)
    if device.index is not None and device.index >= torch.accelerator.device_count():
        return storage
    moved: UntypedStorage = storage.to(device=device)
    return moved


class Loaded:
    """Storages of their own memory."""

    def make(self, data: Buffer, first: int, size: int) -> UntypedStorage:
        if size == 0:
            return UntypedStorage(0)  # type: ignore[no-untyped-call]
        return UntypedStorage.from_buffer(data, "native", size, first, dtype=torch.uint8)

    def place(self, storage: UntypedStorage, location: str) -> UntypedStorage:
        return _on_device(storage, location)


class InPlace(Loaded):
    """Storages that are the file's own bytes, which are writable: for a look at what would be made
    of an object."""

    def make(self, data: Buffer, first: int, size: int) -> UntypedStorage:
        if size == 0:
            return UntypedStorage(0)  # type: ignore[no-untyped-call]
        return torch.frombuffer(data, dtype=torch.uint8, count=size, offset=first).untyped_storage()

    def place(self, storage: UntypedStorage, location: str) -> UntypedStorage:
        return storage


class ArchiveStorages:
    """Those of an archive's entries "data/0" and so on, which are places in ``data``. Called with
    what a storage's persistent id says."""

    def __init__(self, data: Buffer, entries: dict[str, tuple[int, int]], memory: Loaded) -> None:
        self._data, self._entries, self._memory = memoryview(data), entries, memory
        self._made: dict[str, tuple[int, str, UntypedStorage]] = {}
        order = entries.get("byteorder")
        if order is not None and bytes(self._data[order[0] : order[0] + order[1]]) != b"little":
            raise MalformedError("is of a machine of another byte order")

    def __call__(self, dtype: torch.dtype, key: str, location: str, size: int) -> TypedStorage:
        if key not in self._made:
            self._made[key] = size, location, self._read(key, location, size)
        known, place, storage = self._made[key]
        if (known, place) != (size, location):
            raise MalformedError(f"makes storage {key} of two sizes")
        return _typed(storage, dtype)

    def _read(self, key: str, location: str, size: int) -> UntypedStorage:
        first, held = self._entries.get(f"data/{key}", (0, 0))
        if size > held:
            raise MalformedError(f"makes storage {key} of {size} bytes, which has {held}")
        return self._memory.place(self._memory.make(self._data, first, size), location)
