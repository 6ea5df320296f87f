"""What stands for one of torch's classes while they are patched."""

import functools
import logging
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch import nn

from ..hsdp.arguments import NotSupportedError
from ..hsdp.runner import named_runners

_logger = logging.getLogger(__name__)
# Within a call that has fallen back: what torch makes inside is torch's too.
_is_torchs: ContextVar[bool] = ContextVar("is_torchs", default=False)


class Choice:
    """Between ours and torch's: ours, but for arguments that ours refuses. ``strict``: these raise
    NotSupportedError."""

    def __init__(self, name: str, ours: Callable[..., Any], torchs: Callable[..., Any]) -> None:
        self.name, self.ours, self.torchs = name, ours, torchs
        self.strict = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _is_torchs.get():
            return self.torchs(*args, **kwargs)
        try:
            return self.ours(*args, **kwargs)
        except NotSupportedError as error:
            if self.strict or _is_wrapped_in_part(args, kwargs):
                raise
            _logger.warning("torch's own %s is used here: %s", self.name, error)
        token = _is_torchs.set(True)
        try:
            return self.torchs(*args, **kwargs)
        finally:
            _is_torchs.reset(token)


def _is_wrapped_in_part(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(map(_is_ours, (*args, *kwargs.values())))


def _is_ours(value: Any) -> bool:
    return isinstance(value, nn.Module) and any(True for _ in named_runners(value))


class StandIn(type):
    """The class of a class that stands for another one: it makes what its ``choice`` chooses, has
    both's objects and subclasses for its own, and a class derived from it derives from torch's, as
    it does unpatched. Static methods go to the side whose module they are given."""

    choice: Choice

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> Any:
        if not bases:
            return super().__new__(mcs, name, bases, namespace)
        real = tuple(base.choice.torchs if isinstance(base, StandIn) else base for base in bases)
        metaclass: Any = type(real[0])
        return metaclass(name, real, namespace)

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> None:
        super().__init__(name, bases, namespace)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.choice(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, (cls.choice.ours, cls.choice.torchs))  # type: ignore[arg-type]

    def __subclasscheck__(cls, subclass: type) -> bool:
        sides: Any = (cls.choice.ours, cls.choice.torchs)
        return subclass is cls or issubclass(subclass, sides)

    def __getattr__(cls, name: str) -> Any:
        torchs = getattr(cls.choice.torchs, name)
        ours = getattr(cls.choice.ours, name, None)
        if name.startswith("_") or ours is None or not callable(torchs):
            return torchs

        @functools.wraps(torchs)
        def side_of_module(*args: Any, **kwargs: Any) -> Any:
            side = ours if _is_wrapped_in_part(args, kwargs) else torchs
            return side(*args, **kwargs)

        return side_of_module


def stand_in(choice: Choice) -> type:
    """A class in torch's place."""
    torchs: Any = choice.torchs
    namespace = {
        "choice": choice,
        "__doc__": torchs.__doc__,
        "__module__": torchs.__module__,
        "__init__": torchs.__init__,
    }
    made: type = StandIn(torchs.__name__, (), namespace)
    return made
