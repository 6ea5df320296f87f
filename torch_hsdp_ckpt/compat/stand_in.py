"""What stands for one of torch's classes while they are patched."""

import inspect
from abc import ABCMeta
from typing import Any

from .replacement import Replacement, by_modules


class StandIn(type):
    """Of the class of a class that stands for one of torch's, and is derived from it. Called, it
    makes what its replacement decides on; its objects and subclasses are both sides'. What is
    derived from it is an ordinary subclass of torch's."""

    @property
    def _replacement(cls) -> Replacement | None:
        return cls.__dict__.get("_stands_for")

    @property
    def __signature__(cls) -> inspect.Signature:
        """What a call takes, for those who ask: the one below says nothing of it."""
        if cls._replacement is not None:
            return inspect.signature(cls._replacement.torchs)
        of_init = inspect.signature(cls.__init__)  # type: ignore[misc]
        return of_init.replace(parameters=list(of_init.parameters.values())[1:])

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        replacement = cls._replacement
        make = super().__call__ if replacement is None else replacement
        return make(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        if cls._replacement is None:
            return super().__instancecheck__(instance)
        return issubclass(type(instance), cls) or issubclass(instance.__class__, cls)

    def __subclasscheck__(cls, subclass: type) -> bool:
        replacement = cls._replacement
        if replacement is None or not isinstance(subclass, type):
            return super().__subclasscheck__(subclass)
        # An ABC asks its subclasses, of which this is one: so it is not asked here.
        return replacement.ours in subclass.__mro__ or replacement.torchs in subclass.__mro__


def stand_in(replacement: Replacement, module: str) -> type:
    """A class in torch's place. Static methods go to the side whose module they are given.
    ``module``: where the name is looked up by ``pickle``."""
    torchs: Any = replacement.torchs
    namespace = {"_stands_for": replacement, "__doc__": torchs.__doc__, "__module__": module}
    for name in dir(replacement.ours):
        of_torchs = inspect.getattr_static(torchs, name, None)
        if isinstance(of_torchs, staticmethod) and not name.startswith("_"):
            method = Replacement(getattr(replacement.ours, name), of_torchs.__func__, by_modules)
            namespace[name] = staticmethod(method.as_function())
    # ABCs may be bases besides it, as they may be torch's.
    beside = type(torchs) if issubclass(type(torchs), ABCMeta) else ABCMeta
    metaclass: Any = type("StandIn", (StandIn, beside), {})
    made: type = metaclass(torchs.__name__, (torchs,), namespace)
    return made
