import contextlib
import os
from collections.abc import Iterator

import pytest
import torch
from device import DEVICE, OnDevice
from ranks import findings_of_simulated_gpu

from torch_hsdp_ckpt import _C


def pytest_report_header() -> str:
    """Tests that inject faults or count bytes fail in a build without tests: say so at the head."""
    if hasattr(_C, "_inject_fault"):
        return "torch_hsdp_ckpt: built with tests"
    return (
        "torch_hsdp_ckpt: built WITHOUT tests, so that faults can't be injected: tests which do "
        "that fail. Build with HSDP_CKPT_TESTS=1"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are skipped without a CUDA device, unless HSDP_CKPT_REQUIRE_GPU=1: then
    they fail."""
    if torch.cuda.is_available() or os.environ.get("HSDP_CKPT_REQUIRE_GPU") == "1":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skipif(True, reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    """What a test makes in this process lies on the device too."""
    with OnDevice(DEVICE) if DEVICE != "cpu" else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def _no_findings() -> Iterator[None]:
    """On the simulated GPU a test fails with what the simulator has found in this process."""
    yield
    found = findings_of_simulated_gpu()
    assert not found, found
