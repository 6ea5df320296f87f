"""Pinned host memory, which devices copy to while the host goes on; pageable memory where there is
no more of it."""

import logging
import threading
from typing import Any

import torch
from torch import Tensor

from ...common.tensors import scratch

_logger = logging.getLogger(__name__)
_FOR_ALL_DEVICES = 1  # cudaHostRegisterPortable
_has_told = False


def pinned_or_pageable(size: int) -> Tensor:
    """Bytes of host memory; not pinned, which is told once, if there is none that can be. Raises
    OSError without memory."""
    try:
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
    except RuntimeError as error:
        _tell_once(size, str(error).splitlines()[0])
        return scratch(size)


def pin(block: Tensor) -> bool:
    """Pins memory as it is. False, which is told once: it can't be, and copies to it work all the
    same, but hold up the host."""
    error = _register(block)
    if error is None:
        return True
    _tell_once(block.numel(), str(error))
    return False


def unpin(block: Tensor) -> None:
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    torch.cuda.check_error(cudart.cudaHostUnregister(block.data_ptr()))


def _register(block: Tensor) -> RuntimeError | None:
    """In a thread of its own: the next kernel that the thread of a call which has failed launches
    would be taken for the one that did, as nobody asks CUDA for that error before."""
    device = torch.cuda.current_device()
    errors: list[RuntimeError] = []

    def register() -> None:
        cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        with torch.cuda.device(device):
            code = cudart.cudaHostRegister(block.data_ptr(), block.numel(), _FOR_ALL_DEVICES)
        try:
            torch.cuda.check_error(code)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=register, name="hsdp_ckpt pin")
    thread.start()
    thread.join()
    return errors[0] if errors else None


def _tell_once(size: int, why: str) -> None:
    global _has_told
    if not _has_told:
        _has_told = True
        _logger.warning(
            "%d bytes of host memory can't be pinned (%s): they stay pageable. Saves and loads of "
            "tensors on devices are slower, and async_save returns when they are copied; its "
            "max_staging_bytes bounds what it pins",
            size,
            why,
        )
