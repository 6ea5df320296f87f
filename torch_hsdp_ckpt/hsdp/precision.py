"""Mixed precision as torch's two wrappers define it: which dtypes a unit computes, reduces and
returns in."""

import dataclasses
from collections.abc import Collection
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy
from torch.distributed.utils import _apply_to_tensors, _cast_forward_inputs

from .. import _C
from .arguments import at
from .unit import REDUCED

# on a module: {buffer's name: (the dtype that it had, the dtype that it was given)}
_BUFFERS_CAST = "_hsdp_ckpt_buffers_cast"


@dataclasses.dataclass(frozen=True)
class Precision:
    """``param_dtype``: of the full parameters, their gathers and the computation. ``reduce_dtype``:
    of the reduction (None: the gradients' own). ``buffer_dtype``: the buffers are converted to it
    once, at the first forward. None: as the parameters, gradients and buffers are.
    ``keep_low_precision_grads``: the sharded gradients stay in ``param_dtype``."""

    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    buffer_dtype: torch.dtype | None = None
    output_dtype: torch.dtype | None = None
    cast_forward_inputs: bool = True
    cast_root_forward_inputs: bool = True
    keep_low_precision_grads: bool = False

    @staticmethod
    def of(given: MixedPrecision | MixedPrecisionPolicy | None, *modules: nn.Module) -> "Precision":
        """From torch's own classes, for the unit of ``modules``; None is full precision. ValueError
        for dtypes by parameter, and for dtypes that no unit serves."""
        if given is None:
            return Precision()
        if (
            getattr(given, "param_dtype_override_fn", None) is not None
        ):  # torch 2.15 has it, and older versions do not
            raise ValueError(
                f"{at(*modules)}MixedPrecisionPolicy's param_dtype_override_fn is not served, a "
                "unit's parameters have one "
                "param_dtype: apply fully_shard with an mp_policy of their own to the modules "
                "whose parameters are to have "
                "another one"
            )
        for dtype in (given.param_dtype, given.reduce_dtype):
            if dtype is not None and dtype not in REDUCED:
                raise ValueError(
                    f"{at(*modules)}mixed precision in {dtype} is not served: pass "
                    f"{', '.join(map(str, REDUCED))}"
                )
        if isinstance(given, MixedPrecisionPolicy):
            return Precision(
                given.param_dtype,
                given.reduce_dtype,
                None,
                given.output_dtype,
                given.cast_forward_inputs,
                given.cast_forward_inputs,
            )
        return Precision(
            given.param_dtype,
            given.reduce_dtype or given.param_dtype,
            given.buffer_dtype,
            None,
            given.cast_forward_inputs,
            given.cast_root_forward_inputs,
            given.keep_low_precision_grads,
        )

    def of_unit(self) -> _C.UnitPrecision:
        """What ``ShardedUnit`` takes."""
        return _C.UnitPrecision(
            param_dtype=self.param_dtype,
            reduce_dtype=self.reduce_dtype,
            keep_low_precision_grads=self.keep_low_precision_grads,
        )

    def input_dtype(self, outermost: bool) -> torch.dtype | None:
        """What floating point arguments are converted to before forward; None: they stay."""
        return (
            self.param_dtype
            if (self.cast_root_forward_inputs if outermost else self.cast_forward_inputs)
            else None
        )

    def cast_inputs(
        self, dtype: torch.dtype, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return cast(
            tuple[tuple[Any, ...], dict[str, Any]], _cast_forward_inputs(dtype, *args, **kwargs)
        )

    def cast_outputs(self, outputs: Any) -> Any:
        dtype = self.output_dtype
        return _apply_to_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, outputs)

    def cast_buffers(self, module: nn.Module, ignored: Collection[nn.Module]) -> None:
        """Converts the floating point buffers of ``module`` that neither wrapped modules below nor
        ``ignored`` ones hold."""
        dtype = self.buffer_dtype
        if dtype is None:
            return
        for owner in own_modules(module):
            for name, buffer in owner._buffers.items() if owner not in ignored else ():
                if buffer is not None and buffer.is_floating_point() and buffer.dtype != dtype:
                    owner.__dict__.setdefault(_BUFFERS_CAST, {})[name] = (buffer.dtype, dtype)
                    owner._buffers[name] = buffer.to(dtype)


def saved_dtype(module: nn.Module, name: str, tensor: torch.Tensor) -> torch.dtype:
    """What ``module``'s ``tensor`` is in state dicts: for a buffer that ``cast_buffers`` has
    converted, as FSDP1 has it, the dtype before; for one that somebody has converted since, and for
    all else, its own."""
    before, cast_to = module.__dict__.get(_BUFFERS_CAST, {}).get(name, (tensor.dtype, tensor.dtype))
    return cast(torch.dtype, before if tensor.dtype == cast_to else tensor.dtype)


def restore_buffers(module: nn.Module, state: dict[str, Any], prefix: str) -> None:
    """Gives ``state``'s values for the buffers of ``module``, those below wrapped modules excepted,
    their ``saved_dtype``."""
    from .runner import runner_of

    for name in module.__dict__.get(_BUFFERS_CAST, ()):
        value = state.get(prefix + name)
        if isinstance(value, torch.Tensor):
            state[prefix + name] = value.to(saved_dtype(module, name, value))
    for name, child in module._modules.items():
        if child is not None and runner_of(child) is None:
            inside = prefix if name == "_checkpoint_wrapped_module" else f"{prefix}{name}."
            restore_buffers(child, state, inside)


def own_modules(module: nn.Module) -> list[nn.Module]:
    """``module`` and the modules inside, down to those that are wrapped themselves, each once,
    outermost first."""
    from .runner import runner_of

    found: dict[nn.Module, None] = {}

    def visit(owner: nn.Module) -> None:
        if owner in found:
            return
        found[owner] = None
        for child in owner.children():
            if runner_of(child) is None:
                visit(child)

    visit(module)
    return list(found)
