"""Keeps ``torch.compile`` out of the wrapper's own frames: only what the wrapped modules compute is
compiled."""

import functools
import importlib
import inspect
import pkgutil
import types
from collections.abc import Callable, Iterator
from typing import Any

@functools.cache
def keep_dynamo_out() -> None:
    """Once, when a module is wrapped: by then DTensor has imported dynamo, which takes seconds.

    Frame by frame: what these functions call, the wrapped module's forward above all, may be
    compiled."""
    from torch._dynamo.decorators import skip

    package = importlib.import_module(__package__)
    for found in pkgutil.iter_modules(package.__path__):
        if found.ispkg:  # state dicts are not made in forward or backward
            continue
        for function in _functions(importlib.import_module(f"{__package__}.{found.name}")):
            skip(function)


def _functions(module: types.ModuleType) -> Iterator[Callable[..., Any]]:
    """All that ``module`` defines, methods and properties included."""
    for value in vars(module).values():
        if getattr(value, "__module__", None) != module.__name__:
            continue
        for member in vars(value).values() if inspect.isclass(value) else (value,):
            function = (
                member.fget
                if isinstance(member, property)
                else inspect.unwrap(getattr(member, "__func__", member))
            )
            if isinstance(function, types.FunctionType):
                yield function
