"""Where a value of a flattened state dict goes. DCP flattens with every key as a str, so that its
own way back puts the value of 3 beside it, under "3"."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner


class NestedKeys:
    """Finds the keys of one state dict whose strs stand in paths; what has been looked at is
    kept."""

    def __init__(self, state_dict: dict[Any, Any]) -> None:
        self._root = state_dict
        self._keys: dict[int, dict[str, Any]] = {}  # by container

    def set(self, path: Sequence[str | int], value: Any) -> None:
        """Puts a value where the path leads, under the key that is there."""
        holder: Any = self._root
        try:
            for part in path[:-1]:
                holder = holder[self._key(holder, part)]
            key = self._key(holder, path[-1])
        except LookupError:  # the state dict has no such place: as DCP makes one
            set_element(self._root, tuple(path), value)
        else:
            holder[key] = value

    def _key(self, holder: Any, part: str | int) -> Any:
        """Raises LookupError where there is none."""
        if isinstance(holder, list):
            return range(len(holder))[int(part)]
        if not isinstance(holder, Mapping):
            raise LookupError
        if part in holder:
            return part
        if id(holder) not in self._keys:
            self._keys[id(holder)] = {str(key): key for key in holder if type(key) is not str}
        return self._keys[id(holder)][part]  # type: ignore[index]


def set_object(planner: DefaultLoadPlanner, keys: NestedKeys, name: str, value: Any) -> None:
    """What ``DefaultLoadPlanner.load_bytes`` does with an object that it has unpickled. ``keys``:
    of the planner's ``original_state_dict``."""
    if planner.flatten_state_dict:
        keys.set(planner.mappings[name], value)
    else:
        planner.state_dict[name] = value
