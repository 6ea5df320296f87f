"""Forks of the test's own process, which make saves, and the small state that they save."""

import ctypes
import multiprocessing
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch

FORK = multiprocessing.get_context("fork")


def small_state(value: int) -> dict[str, Any]:
    # Small: OpenMP, which fills larger tensors, hangs in a fork of a process that has used it.
    return {"w": torch.full((1000,), float(value)), "value": value}


def in_child(work: Callable[[], Any], host: str | None = None) -> int:
    """Runs ``work`` in a fork, on a host of another name if there is one; its exit code."""

    def run() -> None:
        if host is not None:
            _rename_host(host)
        work()

    child = FORK.Process(target=run)
    child.start()
    child.join(20)
    child.kill()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def _rename_host(host: str) -> None:
    namespace_of_names = 0x04000000
    if ctypes.CDLL(None, use_errno=True).unshare(namespace_of_names) != 0:
        pytest.skip("needs a host name of its own")
    socket.sethostname(host)
