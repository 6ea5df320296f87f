"""``save(state, writer)`` and ``load(state, reader)``: DCP's functions take a storage by position,
with a warning, for programs of the time before ``checkpoint_id``."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


def storage_by_position(keyword: str) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Makes a function take its argument ``keyword`` as the second one by position."""

    def decorate(call: Callable[_P, _T]) -> Callable[_P, _T]:
        @functools.wraps(call)
        def with_storage(*args: Any, **named: Any) -> _T:
            if len(args) == 2:
                warnings.warn(
                    f"{call.__name__}: pass the storage as {keyword}=; by position it is taken "
                    "for compatibility only",
                    FutureWarning,
                    stacklevel=2,
                )
                state_dict, storage = args
                return call(state_dict, **named, **{keyword: storage})  # type: ignore[call-arg, arg-type]
            return call(*args, **named)

        return with_storage

    return decorate
