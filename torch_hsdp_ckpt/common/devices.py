"""Devices with streams, all alike: CUDA's, and every other accelerator that torch knows."""

import contextlib
from collections.abc import Iterator

import torch

# Devices whose work the host waits for by itself: they have no streams to order it by.
_WITHOUT_STREAMS = ("cpu", "meta", "mps")


def has_streams(device: torch.device) -> bool:
    """Whether what is asked of ``device`` runs later, in the order of a stream."""
    return device.type not in _WITHOUT_STREAMS


def device_types() -> tuple[str, ...]:
    """The types of device that this process may have tensors on, the CPU first."""
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


def is_here(device_type: str) -> bool:
    """Whether this process has a device of an accelerator's type."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator is not None and accelerator.type == device_type


def current_stream(device: torch.device) -> torch.Stream:
    return torch.accelerator.current_stream(device)


@contextlib.contextmanager
def on_stream(stream: torch.Stream) -> Iterator[None]:
    """``stream`` is the current one of its device, and that the current device; what was current
    comes back. A stream's own ``with`` keeps that in the stream, which several threads may share.
    """
    device = torch.accelerator.current_device_index()
    before = current_stream(stream.device)
    torch.accelerator.set_stream(stream)
    try:
        yield
    finally:
        torch.accelerator.set_stream(before)
        torch.accelerator.set_device_index(device)
