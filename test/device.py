"""The device that the tests run on: what HSDP_TEST_DEVICE says, or the CPU.

A test that names no device makes its models and data there: `make simgpu` runs the wrapper's, the
state dicts' and the checkpoints' tests on simulated GPUs that way."""

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._device import DeviceContext, _device_constructors

DEVICE = os.environ.get("HSDP_TEST_DEVICE", "cpu")

# The process groups of ranks whose tests ask for none: NCCL for what lies on the device, of which
# each rank then needs one of its own.
BACKEND = "gloo" if DEVICE == "cpu" else f"cpu:gloo,{DEVICE}:nccl"

_RANDOM = (torch.rand, torch.randn, torch.randint, torch.randperm)


class OnDevice(DeviceContext):
    """Tensors that name no device are made on it, as by ``torch.device``. Random ones have the
    CPU's numbers, which tests draw from generators of the CPU's and compare with."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") is not None or func not in _device_constructors():
            return func(*args, **kwargs)
        if func not in _RANDOM:
            return func(*args, **{**kwargs, "device": self.device})
        needs_gradient = kwargs.pop("requires_grad", False)
        drawn: torch.Tensor = func(*args, **{**kwargs, "device": "cpu"})
        return drawn.to(self.device).requires_grad_(needs_gradient)


def use_device(rank: int) -> None:
    """Makes the device the default one of this thread, for as long as the process lives."""
    if DEVICE == "cpu":
        return
    torch.cuda.set_device(rank % torch.cuda.device_count())
    OnDevice(DEVICE).__enter__()


def cpu_only(reason: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For a test, or one of the functions of a ``run_checks``, that is skipped on other devices."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        if DEVICE == "cpu":
            return function

        @functools.wraps(function)
        def skip(*arguments: Any, **keywords: Any) -> None:
            pytest.skip(reason)

        return skip

    return decorate


def not_on_device(reason: str) -> pytest.MarkDecorator:
    """The ``pytestmark`` of a file whose tests run on the CPU only."""
    return pytest.mark.skipif(DEVICE != "cpu", reason=reason)
