"""Mixed precision as torch's two wrappers define it: which dtypes a unit computes, reduces and
returns in."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.utils import _apply_to_tensors, _cast_forward_inputs

from .. import _C
from .arguments import NotSupportedError, at
from .module_tree import child_prefix, is_wrapped, modules_of_unit

# Gradients can be reduced in these, and mixed precision can compute in them.
REDUCIBLE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# From torch 2.15 on the full parameters of FSDP2 tell autograd the dtype of their gradients.
_FSDP2_ACCUMULATION = (
    _C.GradAccumulation.REDUCED_BY_AUTOGRAD
    if hasattr(FSDPParam, "unsharded_grad_dtype")
    else _C.GradAccumulation.REDUCED
)

# A module has this attribute where its buffers were converted: by the buffer's name the dtype that
# it had, and the dtype that it was given.
_BUFFERS_CAST = "_hsdp_ckpt_buffers_cast"


@dataclasses.dataclass(frozen=True)
class Precision:
    """``param_dtype``: of the full parameters, their gathers and the computation. ``reduce_dtype``:
    of the reduction (None: the gradients' own, see ``accumulation``). ``buffer_dtype``: the buffers
    are converted to it once, at the first forward. None: as the parameters, gradients and buffers
    are. ``keep_low_precision_grads``: the sharded gradients stay in ``param_dtype``.
    ``accumulation``: what gradients are added up in that wait for a reduction.
    ``param_dtype_override_fn``: the ``param_dtype`` of a parameter that has one of its own, see
    :meth:`param_dtype_of`."""

    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    buffer_dtype: torch.dtype | None = None
    output_dtype: torch.dtype | None = None
    cast_forward_inputs: bool = True
    cast_root_forward_inputs: bool = True
    keep_low_precision_grads: bool = False
    accumulation: _C.GradAccumulation = _C.GradAccumulation.COMPUTED
    param_dtype_override_fn: Callable[[nn.Parameter], torch.dtype | None] | None = None

    @property
    def policy(self) -> MixedPrecisionPolicy:
        """What FSDP2's gather extensions are told."""
        return MixedPrecisionPolicy(
            param_dtype=self.param_dtype,
            reduce_dtype=self.reduce_dtype,
            output_dtype=self.output_dtype,
            cast_forward_inputs=self.cast_forward_inputs,
        )

    @staticmethod
    def of(given: MixedPrecision | MixedPrecisionPolicy | None, *modules: nn.Module) -> "Precision":
        """From torch's own classes, for the unit of ``modules``; None is full precision. ValueError
        for dtypes that no unit supports."""
        if given is None:
            return Precision()
        _check_supported(given, *modules)
        if isinstance(given, MixedPrecisionPolicy):
            return Precision(
                param_dtype=given.param_dtype,
                reduce_dtype=given.reduce_dtype,
                output_dtype=given.output_dtype,
                cast_forward_inputs=given.cast_forward_inputs,
                cast_root_forward_inputs=given.cast_forward_inputs,
                accumulation=_FSDP2_ACCUMULATION,
                # torch 2.15 has it, and older versions do not
                param_dtype_override_fn=getattr(given, "param_dtype_override_fn", None),
            )
        return Precision(
            param_dtype=given.param_dtype,
            reduce_dtype=given.reduce_dtype or given.param_dtype,
            buffer_dtype=given.buffer_dtype,
            cast_forward_inputs=given.cast_forward_inputs,
            cast_root_forward_inputs=given.cast_root_forward_inputs,
            keep_low_precision_grads=given.keep_low_precision_grads,
        )

    @property
    def kept_grad_dtype(self) -> torch.dtype | None:
        """The dtype of the sharded gradients, where it is not the parameters'; else None."""
        return self.param_dtype if self.keep_low_precision_grads else None

    def param_dtype_of(self, parameter: nn.Parameter) -> torch.dtype | None:
        """What ``parameter`` computes in; None: as it is stored. ValueError, without its name, for
        another answer of ``param_dtype_override_fn`` than torch takes."""
        override = self.param_dtype_override_fn(parameter) if self.param_dtype_override_fn else None
        if override is None:
            return self.param_dtype
        if override not in (self.param_dtype, parameter.dtype):
            raise ValueError(
                f"is to compute in {override} by param_dtype_override_fn, which may return None, "
                f"the policy's param_dtype ({self.param_dtype}) or the parameter's own "
                f"({parameter.dtype})"
            )
        return override

    def of_unit(self) -> _C.UnitPrecision:
        """What ``_C.Unit`` takes."""
        return _C.UnitPrecision(
            reduce_dtype=self.reduce_dtype,
            keep_low_precision_grads=self.keep_low_precision_grads,
            accumulation=self.accumulation,
        )

    def input_dtype(self, outermost: bool) -> torch.dtype | None:
        """What floating point arguments are converted to before forward; None: they stay."""
        casts = self.cast_root_forward_inputs if outermost else self.cast_forward_inputs
        return self.param_dtype if casts else None

    def cast_inputs(
        self, dtype: torch.dtype, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return cast(
            tuple[tuple[Any, ...], dict[str, Any]], _cast_forward_inputs(dtype, *args, **kwargs)
        )

    def cast_outputs(self, outputs: Any) -> Any:
        """Converts the floating point tensors in a forward's result to ``output_dtype``."""
        dtype = self.output_dtype
        if dtype is None:
            return outputs
        return _apply_to_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, outputs)

    def cast_buffers(self, module: nn.Module, ignored: Collection[nn.Module]) -> None:
        """Converts the floating point buffers of ``module`` that neither wrapped modules below nor
        ``ignored`` ones hold."""
        dtype = self.buffer_dtype
        if dtype is None:
            return
        for owner in modules_of_unit(module):
            if owner not in ignored:
                _cast_buffers_of(owner, dtype)


def _check_supported(given: MixedPrecision | MixedPrecisionPolicy, *modules: nn.Module) -> None:
    for dtype in (given.param_dtype, given.reduce_dtype):
        if dtype is not None and dtype not in REDUCIBLE_DTYPES:
            raise NotSupportedError(
                f"{at(*modules)}mixed precision in {dtype} is not supported: pass "
                f"{', '.join(map(str, REDUCIBLE_DTYPES))}"
            )


def _cast_buffers_of(owner: nn.Module, dtype: torch.dtype) -> None:
    for name, buffer in owner._buffers.items():
        if buffer is None or not buffer.is_floating_point() or buffer.dtype == dtype:
            continue
        casts = owner.__dict__.setdefault(_BUFFERS_CAST, {})
        casts[name] = (buffer.dtype, dtype)
        owner._buffers[name] = buffer.to(dtype)


def saved_dtype(module: nn.Module, name: str, tensor: torch.Tensor) -> torch.dtype:
    """The dtype that ``module``'s ``tensor`` has in state dicts: for a buffer that
    ``cast_buffers`` has converted, as FSDP1 has it, the dtype before; for one that somebody has
    converted since, and for all else, its own."""
    unchanged = (tensor.dtype, tensor.dtype)
    before, cast_to = module.__dict__.get(_BUFFERS_CAST, {}).get(name, unchanged)
    return cast(torch.dtype, before if tensor.dtype == cast_to else tensor.dtype)


def restore_buffers(module: nn.Module, state: dict[str, Any], prefix: str) -> None:
    """Gives ``state``'s values for the buffers of ``module``, those below wrapped modules excepted,
    their ``saved_dtype``."""
    for name in module.__dict__.get(_BUFFERS_CAST, ()):
        key = prefix + name
        value = state.get(key)
        if isinstance(value, torch.Tensor):
            state[key] = value.to(saved_dtype(module, name, value))
    for name, child in module._modules.items():
        if child is not None and not is_wrapped(child):
            restore_buffers(child, state, child_prefix(prefix, name))
