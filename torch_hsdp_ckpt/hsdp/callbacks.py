"""Callbacks that C++ keeps without keeping their objects alive."""

import weakref
from collections.abc import Callable
from typing import ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def weak_callback(method: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
    """A bound method that does not keep its object: C++ holds the callback, and the object holds
    the C++ side. It does nothing once the object is gone."""
    reference = weakref.WeakMethod(method)

    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        bound = reference()
        if bound is not None:
            bound(*args, **kwargs)

    return call


def weak_function(
    method: Callable[_Arguments, _Result],
) -> Callable[_Arguments, _Result]:
    """The same of a method whose result the C++ side needs: RuntimeError once its object is
    gone."""
    reference = weakref.WeakMethod(method)

    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        bound = reference()
        if bound is None:
            raise RuntimeError("a model that is gone has been asked for something")
        return bound(*args, **kwargs)

    return call
