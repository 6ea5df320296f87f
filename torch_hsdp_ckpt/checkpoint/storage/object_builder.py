"""Makes an object of the opcodes of its pickle, which ``_C.build_object`` runs: what a name, a call
or a state means is looked up in the list of harmless kinds, and anything else is refused."""

import collections
import enum
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._utils import IMPORT_MAPPING, NAME_MAPPING

from ...common.devices import is_here
from ...errors import CheckpointError
from .numpy_kinds import add_numpy_kinds
from .object_classes import Classes, has_finalizer
from .object_instances import called_instance, new_instance, set_instance_state
from .object_kinds import NAMESPACES, add_python_kinds
from .object_table import (
    Arguments,
    Bounds,
    Function,
    MalformedError,
    Table,
    are,
    are_sizes,
    expect,
    is_a,
    name_of,
)
from .placement_kinds import add_placements
from .tensor_kinds import add_storages, add_torch_kinds, set_attributes

_table = Table()
add_python_kinds(_table)
add_torch_kinds(_table)
add_placements(_table)
_STORAGES = add_storages(_table)
_GETATTR = _table.add_function("builtins.getattr")
_FROM_TYPE = _table.add_function("torch._tensor._rebuild_from_type_v2")
_WRAPPER = _table.add_function("torch._utils._rebuild_wrapper_subclass")
_RECONSTRUCTOR = _table.add_function("copyreg._reconstructor")
# Classes of the list whose instances may have attributes.
_WITH_ATTRIBUTES = (
    *NAMESPACES,
    collections.OrderedDict,
    collections.Counter,
    types.SimpleNamespace,
)
_numpy = Table()  # replaced when a pickle first names something of NumPy's
_filling = threading.Lock()
_SHOWN = 200  # characters of a name in a message
# The functions that are given others: those that make what these would, with what they would need.
_TAKES_FUNCTIONS = ("builtins.getattr", "torch._tensor._rebuild_from_type_v2", "numpy.random.")

# (data type, key, location, bytes) to a storage.
Storages = Callable[[torch.dtype, str, str, int], torch.storage.TypedStorage]


def _numpy_table() -> Table:
    global _numpy
    with _filling:
        if not _numpy.names:
            table = Table()  # nobody sees one that is half full
            try:
                add_numpy_kinds(table)
            except ImportError as error:
                raise CheckpointError(f"it holds something of NumPy's: {error}") from error
            _numpy = table
        return _numpy


def _weight(value: Any) -> int:
    weight = _table.weights.get(type(value)) or _numpy.weights.get(type(value))
    return 1 if weight is None else weight(value)


class ObjectBuilder:
    """The hooks of ``_C.build_object``. ``limit``: bytes and items that the pickle may make beyond
    what it holds. ``classes``: of users'. ``storages``: the file's,
    None if there are none.

    Every method is called with what the pickle says, and raises MalformedError for what no
    ``torch.save`` writes, CheckpointError for what is not made here; other exceptions come from
    constructors of the listed kinds, whose arguments do not fit."""

    function_type = Function

    def __init__(self, limit: int, classes: Classes, storages: Storages | None) -> None:
        self.bounds = Bounds(limit, lambda value: type(value) in self._allowed, _weight)
        self._classes, self._storages = classes, storages
        self._allowed: set[type] = set()

    def find(self, module: Any, name: Any) -> Any:
        """What a name stands for."""
        if not are((module, name), str):
            raise MalformedError("names something by what is no str")
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        table = _numpy_table() if module.split(".")[0] == "numpy" else _table
        full = f"{module}.{name}"
        if full in table.names:
            return table.names[full]
        cls = self._classes.find(module, name)
        if cls is None and self._classes.has_inner(module, name):
            return Function(f"{module}:{name}")
        if cls is None:
            raise CheckpointError(f"it needs {full[:_SHOWN]}")
        if has_finalizer(cls):
            raise CheckpointError(f"{name_of(cls)} has a __del__, which would run")
        self._allowed.add(cls)
        return cls

    def call(self, function: Any, arguments: Any) -> Any:
        if not is_a(function, type, Function):
            raise MalformedError(f"calls {name_of(function)}")
        if type(arguments) is not tuple:
            raise MalformedError(f"calls {name_of(function)} without arguments in a tuple")
        self._check_functions(function, arguments)
        own: dict[Any, Callable[[Arguments], Any]] = {
            _GETATTR: self._attribute,
            _FROM_TYPE: self._tensor_with_type,
            _RECONSTRUCTOR: self._reconstructed,
        }
        if function in own:
            return own[function](arguments)
        rule = _table.calls.get(function) or _numpy.calls.get(function)
        if rule is not None:
            return rule(self.bounds, arguments)
        if function in self._allowed:
            return called_instance(self.bounds, function, arguments)  # type: ignore[arg-type]
        raise CheckpointError(f"it needs a call of {name_of(function)}")

    def _check_functions(self, function: Any, arguments: Arguments) -> None:
        """The machine lets functions lie in arguments; there they end."""
        if type(function) is Function and str(function).startswith(_TAKES_FUNCTIONS):
            return
        expect(not any(type(each) is Function for each in arguments), function, arguments)

    def new(self, cls: Any, arguments: Any) -> Any:
        if not is_a(cls, type) or type(arguments) is not tuple:
            raise MalformedError(f"makes an instance of {name_of(cls)}")
        self._check_functions(cls, arguments)
        if cls in _table.news:
            return _table.news[cls](self.bounds, arguments)
        if cls in self._allowed:
            return new_instance(self.bounds, cls, arguments)
        return self.call(cls, arguments)

    def set_state(self, made: Any, state: Any) -> None:
        cls = type(made)
        rule = _table.states.get(cls) or _numpy.states.get(cls)
        if rule is not None:
            rule(self.bounds, made, state)
        elif cls in self._allowed or cls in _WITH_ATTRIBUTES:
            set_instance_state(self.bounds, made, state)
        else:
            raise MalformedError(f"sets the state of a {name_of(cls)} anew")

    def storage(self, identity: Any) -> torch.storage.TypedStorage:
        if self._storages is None:
            raise MalformedError("names a storage where none is")
        return self._storages(*self.storage_parts(identity))

    def storage_class(self, module: Any, name: Any) -> Function | None:
        """What a name stands for, if it is a storage's class."""
        if not are((module, name), str):
            raise MalformedError("names something by what is no str")
        found = _table.names.get(f"{module}.{name}")
        return found if isinstance(found, Function) and found in _STORAGES else None

    def storage_parts(self, identity: Any) -> tuple[torch.dtype, str, str, int]:
        """Type, key, location, and bytes of ("storage", class, key, location, elements)."""
        fits = type(identity) is tuple and len(identity) in (5, 6) and are(identity[:1], str)
        fits = (
            fits
            and identity[0] == "storage"
            and are(identity[2:4], str)
            and are(identity[4:5], int)
        )
        fits = fits and are(identity[5:], type(None))  # no view of another, as before torch 0.4
        if not fits or not identity[2].isascii() or not identity[2].isdigit():
            raise MalformedError("names a storage as torch.save does not")
        dtype = _STORAGES.get(identity[1]) if type(identity[1]) is Function else None
        if dtype is None:
            raise MalformedError("names a storage type that torch does not have")
        size = identity[4] * dtype.itemsize
        if size < 0:
            raise MalformedError(f"makes storage {identity[2]} of a size that none has")
        return dtype, identity[2], identity[3], size

    def append(self, holder: Any, items: list[Any]) -> None:
        for base in (list, collections.deque):
            if is_a(holder, base) and (type(holder) is base or type(holder) in self._allowed):
                return base.extend(holder, items)
        raise MalformedError(f"appends to a {name_of(type(holder))}")

    def set_item(self, holder: Any, key: Any, value: Any) -> None:
        self.check_key(holder, key)
        kinds = (collections.OrderedDict, collections.defaultdict, collections.Counter, dict)
        is_own = type(holder) in kinds or type(holder) in self._allowed
        if not is_a(holder, dict) or not is_own:
            raise MalformedError(f"sets an item of a {name_of(type(holder))}")
        base = collections.OrderedDict if is_a(holder, collections.OrderedDict) else dict
        base.__setitem__(holder, key, value)

    def add(self, holder: Any, items: list[Any]) -> None:
        if not is_a(holder, set):
            raise MalformedError(f"adds to a {name_of(type(holder))}")
        for item in items:
            self.check_key(holder, item)
            set.add(holder, item)

    def check_key(self, holder: Any, key: Any) -> None:
        self.bounds.check_key(holder, key)

    # ---- what needs more than a rule is given

    def _attribute(self, arguments: Arguments) -> Any:
        """A nested class, which old protocols write as an attribute of the outer one."""
        fits = len(arguments) == 2 and is_a(arguments[0], type, Function)
        expect(fits and type(arguments[1]) is str, "builtins.getattr", arguments)
        owner, name = arguments
        if owner in self._allowed and issubclass(owner, enum.Enum):
            member = owner._member_map_.get(name)  # an enum that is pickled by name
            if member is not None:
                return member
        if is_a(owner, type):
            module, outer = owner.__module__, owner.__qualname__
        else:
            module, _, outer = str(owner).partition(":")
        return self.find(module, f"{outer}.{name}")

    def _reconstructed(self, arguments: Arguments) -> Any:
        """How protocols before 2 write new instances."""
        fits = len(arguments) == 3 and arguments[1] is object and arguments[2] is None
        expect(fits and is_a(arguments[0], type), _RECONSTRUCTOR, arguments)
        return self.new(arguments[0], ())

    def _tensor_with_type(self, arguments: Arguments) -> Any:
        """(function, class, its arguments, attributes)"""
        fits = len(arguments) == 4 and type(arguments[0]) is Function
        fits = fits and str(arguments[0]).startswith("torch._utils._rebuild_")
        fits = fits and is_a(arguments[1], type) and issubclass(arguments[1], Tensor)
        expect(fits and type(arguments[2]) is tuple, _FROM_TYPE, arguments)
        function, cls, inner, state = arguments
        if function is _WRAPPER:
            made = self._wrapper_subclass(cls, inner)
        else:
            made = self.call(function, inner)
        if type(made) is not cls:
            made = made.as_subclass(cls)
        if cls in self._allowed:  # it may have a way of its own to set its state
            set_instance_state(self.bounds, made, state)
        else:
            set_attributes(self.bounds, made, (state,))
        return made

    def _wrapper_subclass(self, cls: type, arguments: Arguments) -> Tensor:
        """(class, dtype, size, stride, offset, layout, device, requires grad): a tensor without
        memory; what it wraps are its attributes."""
        if cls is Tensor:  # a class that is not allowed, see ClassesOfTensors
            raise CheckpointError("it needs the class of a tensor that wraps others")
        fits = len(arguments) == 8 and arguments[0] is cls and cls in self._allowed
        expect(fits and type(arguments[1]) is torch.dtype, _WRAPPER, arguments)
        _, dtype, size, stride, offset, layout, device, requires_grad = arguments
        expect(are_sizes(size) and are_sizes(stride) and are_sizes((offset,)), _WRAPPER, arguments)
        fits = type(layout) is torch.layout and type(requires_grad) is bool
        expect(fits and are((device,), torch.device, str), _WRAPPER, arguments)
        if (named := torch.device(device).type) not in ("cpu", "meta") and not is_here(named):
            device = "cpu"
        made: Tensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            size,
            strides=stride,
            dtype=dtype,
            storage_offset=offset,
            layout=layout,
            device=device,
            requires_grad=requires_grad,
        )
        return made
