"""Keeps ``torch.compile`` out of the wrapper's own frames: only what the wrapped modules compute is
compiled."""

import functools
import importlib
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

# The modules of this package whose functions run in a forward or around it.
_MODULES = (
    "eager",
    "fsdp",
    "fully_shard",
    "materialize",
    "precision",
    "root",
    "runner",
    "unit",
    "wrap",
)


@functools.cache
def keep_dynamo_out() -> None:
    """Tells dynamo to skip the wrapper's frames. It is called when a module is wrapped: by then
    DTensor has imported dynamo, which takes seconds.

    It works frame by frame: what these functions call, the wrapped module's forward above all, may
    be compiled."""
    from torch._dynamo.decorators import skip

    for name in _MODULES:
        for function in _functions(importlib.import_module(f"{__package__}.{name}")):
            skip(function)


def _functions(module: types.ModuleType) -> Iterator[Callable[..., Any]]:
    """All functions that ``module`` defines, methods and properties included."""
    for value in vars(module).values():
        if getattr(value, "__module__", None) != module.__name__:
            continue
        members = vars(value).values() if inspect.isclass(value) else (value,)
        for function in map(_function_of, members):
            if isinstance(function, types.FunctionType):
                yield function


def _function_of(member: Any) -> Any:
    """The function behind a property, a class method or a decorated function."""
    if isinstance(member, property):
        return member.fget
    return inspect.unwrap(getattr(member, "__func__", member))
