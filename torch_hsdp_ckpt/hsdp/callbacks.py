"""Callbacks that C++ keeps without keeping their objects alive."""

import weakref
from collections.abc import Callable


def weak_callback(method: Callable[[], None]) -> Callable[[], None]:
    """A bound method that does not keep its object: C++ holds the callback, and the object holds
    the C++ side. It does nothing once the object is gone."""
    reference = weakref.WeakMethod(method)

    def call() -> None:
        bound = reference()
        if bound is not None:
            bound()

    return call
