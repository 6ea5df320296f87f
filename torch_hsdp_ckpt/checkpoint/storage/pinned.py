"""Pinned host memory, which devices copy to while the host goes on; pageable memory where there is
no more of it."""

import logging
import mmap
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


class PinnedBlock:
    """Memory that goes back as soon as it is freed, and is as large as was asked for. On CUDA
    devices a program's own memory is pinned by registration: torch's comes in powers of two, and
    never goes back. On others it is torch's. Where it can't be pinned, which is told once, copies
    to it work all the same, but may hold up the host.

    Raises OSError without memory."""

    def __init__(self, size: int) -> None:
        accelerator = torch.accelerator.current_accelerator()
        self._is_registered = False
        if accelerator is None or accelerator.type != "cuda":
            self.memory = pinned_or_pageable(size)
            return
        # Shared: after a fork, a write to private memory would leave the device with pages that
        # this process no longer has.
        self.memory = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
        error = _register(self.memory)
        self._is_registered = error is None
        if error is not None:
            _tell_once(size, str(error))

    def free(self) -> None:
        """Nothing copies to or from it any more."""
        if self._is_registered:
            self._is_registered = False
            cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            torch.cuda.check_error(cudart.cudaHostUnregister(self.memory.data_ptr()))


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
