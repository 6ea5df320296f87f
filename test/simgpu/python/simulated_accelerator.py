"""A simulated device that torch's own files know nothing of (``simgpu/accelerator``), as who makes
an accelerator adds it to torch: ``torch.device("simulated")``, with collectives by the backend
``simccl``. Imported before the process has used any device."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LIBRARIES = Path(__file__).parents[3] / "build" / "cmake" / "test" / "simgpu"
NAME = "simulated"

sys.path.append(str(LIBRARIES))
import simgpu_accelerator  # noqa: E402

torch.utils.rename_privateuse1_backend(NAME)


# ---- torch.simulated: what torch asks the module of a device for


def is_available() -> bool:
    return True


def is_initialized() -> bool:
    return True


def device_count() -> int:
    return simgpu_accelerator.device_count()


def current_device() -> int:
    return simgpu_accelerator.current_device()


def set_device(device: Any) -> None:
    simgpu_accelerator.set_device(_index(device))


def synchronize(device: Any = None) -> None:
    torch.accelerator.synchronize(_index(device))


def current_stream(device: Any = None) -> torch.Stream:
    return torch.accelerator.current_stream(_index(device))


def _index(device: Any) -> int:
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return current_device() if index is None else index


def _is_in_bad_fork() -> bool:
    return False


def manual_seed_all(seed: int) -> None:
    """Random numbers are the CPU's."""


class Event(torch.Event):
    def __new__(cls, enable_timing: bool = False) -> "Event":
        return super().__new__(cls, device=NAME, enable_timing=enable_timing)


class Stream(torch.Stream):
    def __new__(cls, device: Any = None, priority: int = 0) -> "Stream":
        return super().__new__(cls, torch.device(NAME, _index(device)), priority=priority)


@contextlib.contextmanager
def stream(entered: torch.Stream | None) -> Iterator[None]:
    if entered is None:
        yield
        return
    with entered:
        yield


@contextlib.contextmanager
def device(index: Any) -> Iterator[None]:
    with torch.accelerator.device_index(_index(index)):
        yield


torch._register_device_module(NAME, sys.modules[__name__])
torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
dist.Backend.register_backend(
    simgpu_accelerator.BACKEND,
    lambda store, rank, size, timeout: simgpu_accelerator.make_backend(store, rank, size),
    devices=[NAME],
)
