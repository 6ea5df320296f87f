"""Objects as torch wrote them before 1.6: five pickles (magic, version, system, object, storage
keys), and then the storages' bytes, whose sizes the object's pickle alone says."""

import struct
from typing import Any

from .object_builder import ObjectBuilder
from .object_table import Function, MalformedError

PICKLES = 5
OBJECT = 3  # the number of the object's


class StorageScan:
    """Hooks of ``_C.build_object`` that make nothing: ``sizes``, in bytes, of the storages that a
    pickle names, and where their contents lie behind it."""

    function_type = Function

    def __init__(self, builder: ObjectBuilder) -> None:
        self.sizes: dict[str, int] = {}
        self._builder = builder

    def find(self, module: Any, name: Any) -> Any:
        return self._builder.storage_class(module, name)

    def storage(self, identity: Any) -> None:
        _, key, _, size = self._builder.storage_parts(identity)
        self.sizes[key] = size

    def entries(self, keys: Any, at: int, end: int) -> dict[str, tuple[int, int]]:
        """As an archive has them. ``keys``: in the order in which the contents lie from ``at``,
        each behind its number of elements (8 bytes)."""
        if type(keys) is not list or set(self.sizes) != set(keys):
            raise MalformedError("names other storages than the file has")
        found: dict[str, tuple[int, int]] = {}
        for key in keys:
            first = at + struct.calcsize("<q")
            at = first + self.sizes[key]
            found[f"data/{key}"] = first, max(0, min(at, end) - first)
        return found

    def call(self, function: Any, arguments: Any) -> None: ...

    def new(self, cls: Any, arguments: Any) -> None: ...

    def set_state(self, made: Any, state: Any) -> None: ...

    def append(self, holder: Any, items: list[Any]) -> None: ...

    def set_item(self, holder: Any, key: Any, value: Any) -> None: ...

    def add(self, holder: Any, items: list[Any]) -> None: ...

    def check_key(self, holder: Any, key: Any) -> None:
        self._builder.check_key(holder, key)
