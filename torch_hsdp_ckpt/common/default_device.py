"""The default device that a caller may have set (``with torch.device("meta")``) is none of this
package's, nor of torch's planners, which make small tensors without naming a device."""

import contextlib
from typing import Any

import torch


def without_default_device() -> contextlib.AbstractContextManager[Any]:
    """A context, in which tensors are made on the CPU unless their device is named."""
    if torch.empty(0).device.type == "cpu":
        # Torch's context takes part in every question that is asked of a tensor.
        return contextlib.nullcontext()
    return torch.device("cpu")
