"""Pinned host memory, which devices copy to while the host goes on; pageable memory where there is
no more of it."""

import logging
import mmap
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...common.tensors import scratch

_logger = logging.getLogger(__name__)
_FOR_ALL_DEVICES = 1  # cudaHostRegisterPortable
# Bytes that one call registers: launches of other threads may wait for the driver meanwhile. No
# copy may go from one such part into the next (CopyPair.pieces).
STEP = 256 << 20
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
    devices a program's own memory is pinned by registration, up to multiples of STEP by turns:
    torch's comes in powers of two, and never goes back. On others it is torch's. Where it can't be
    pinned, which is told once, copies to it work all the same, but may hold up the host.

    Raises OSError without memory."""

    def __init__(self, size: int) -> None:
        accelerator = torch.accelerator.current_accelerator()
        self._registered: list[int] = []  # addresses
        if accelerator is None or accelerator.type != "cuda":
            self.memory = pinned_or_pageable(size)
            return
        # Shared: after a fork, a write to private memory would leave the device with pages that
        # this process no longer has.
        self.memory = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
        error = _register(self.memory, self._registered)
        if error is not None:
            self.free()  # all of it or nothing: who copies to it asks its first byte
            _tell_once(size, str(error))

    def free(self) -> None:
        """Nothing copies to or from it any more."""
        while self._registered:
            cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            torch.cuda.check_error(cudart.cudaHostUnregister(self._registered.pop()))


def _steps(block: Tensor) -> Iterator[tuple[int, int]]:
    """Address and size of each part that is registered by a call of its own."""
    at, end = block.data_ptr(), block.data_ptr() + block.numel()
    while at < end:
        following = min((at // STEP + 1) * STEP, end)
        yield at, following - at
        at = following


def _register(block: Tensor, registered: list[int]) -> RuntimeError | None:
    """Up to the first error. In a thread of its own: the next kernel that the thread of a call
    which has failed launches would be taken for the one that did, as nobody asks CUDA for that
    error before."""
    device = torch.cuda.current_device()
    errors: list[RuntimeError] = []

    def register() -> None:
        cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        with torch.cuda.device(device):
            try:
                for address, size in _steps(block):
                    torch.cuda.check_error(cudart.cudaHostRegister(address, size, _FOR_ALL_DEVICES))
                    registered.append(address)
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
