"""A call by one of torch's names while it is patched: which side it goes to."""

import functools
import logging
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as TorchsFSDP

from ..hsdp.arguments import NotSupportedError, at
from ..hsdp.module_tree import is_managed, is_wrapped
from . import turns
from .frameworks import check_frameworks

_logger = logging.getLogger(__name__)
# Modules that torch's own have wrapped while patched, and the arguments' fault.
_refused: "weakref.WeakKeyDictionary[Any, str]" = weakref.WeakKeyDictionary()


class Replacement(NamedTuple):
    """``ours`` stands where ``torchs`` is known by its name; ``decide`` makes a call."""

    ours: Callable[..., Any]
    torchs: Callable[..., Any]
    decide: "Callable[[Replacement, tuple[Any, ...], dict[str, Any]], Any]"

    @property
    def name(self) -> str:
        return str(getattr(self.torchs, "__name__", self.torchs))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.decide(self, args, kwargs)

    def as_function(self) -> Callable[..., Any]:
        """A function that looks like torch's."""

        @functools.wraps(self.torchs)
        def call(*args: Any, **kwargs: Any) -> Any:
            return self(*args, **kwargs)

        return call


def always_ours(this: Replacement, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """For functions and classes that take all that torch's take."""
    return (this.torchs if turns.is_torchs_turn() else this.ours)(*args, **kwargs)


def by_modules(this: Replacement, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """For functions on modules that are wrapped: the side that has wrapped them."""
    is_ours = any(map(_holds_ours, modules_in(args, kwargs)))
    return (this.ours if is_ours else this.torchs)(*args, **kwargs)


def wraps_modules(this: Replacement, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """For wrappers: ours; torch's where ours refuse the arguments, or a module inside is torch's
    for that reason. NotSupportedError with ``patch(strict=True)`` then, and where modules inside
    are ours already; ValueError where one was torch's before ``patch()``."""
    if turns.is_torchs_turn():
        return this.torchs(*args, **kwargs)
    check_frameworks()
    modules = modules_in(args, kwargs)
    refusal = _torchs_inside(this, modules)
    if refusal is None:
        try:
            return this.ours(*args, **kwargs)
        except NotSupportedError as error:
            if turns.is_strict() or any(map(_holds_ours, modules)):
                raise
            refusal = str(error)
    _logger.warning("torch's own %s is used here: %s", this.name, refusal)
    with turns.torchs_turn():
        made = this.torchs(*args, **kwargs)
    for module in [*modules, *modules_in((made,), {})]:
        is_torchs_for(module, refusal)
    return made


def is_torchs_for(module: nn.Module, reason: str) -> None:
    """Remembers why torch's own wrapper has wrapped ``module`` while patched."""
    _refused.setdefault(module, reason)


def modules_in(args: Iterable[Any], kwargs: dict[str, Any]) -> list[nn.Module]:
    """The modules among a call's arguments, those in lists too."""
    found: list[nn.Module] = []
    for value in (*args, *kwargs.values()):
        values = value if isinstance(value, (list, tuple)) else (value,)
        found += [each for each in values if isinstance(each, nn.Module)]
    return found


def _holds_ours(module: nn.Module) -> bool:
    return any(map(is_wrapped, module.modules()))


def _torchs_inside(this: Replacement, modules: list[nn.Module]) -> str | None:
    """Why the wrapper around ``modules`` has to be torch's, if modules inside are."""
    for module in modules:
        for name, inner in module.named_modules():
            if is_managed(inner) or not isinstance(inner, (FSDPModule, TorchsFSDP)):
                continue
            if inner not in _refused:
                raise ValueError(
                    f"{at(module)}torch's own wrapper has been applied to {name or 'it'} before "
                    "patch(): call patch() before any module is wrapped"
                )
            if any(map(_holds_ours, modules)):
                raise NotSupportedError(
                    f"{at(module)}torch's own {this.name} was used for {name or 'it'}, and "
                    f"this package's for others inside: {_refused[inner]}"
                )
            return f"it was for {name or 'the module itself'} inside"
    return None
