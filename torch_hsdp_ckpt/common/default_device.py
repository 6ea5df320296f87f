"""The default device that a caller may have set (``with torch.device("meta")``) is none of this
package's, nor of torch's planners, which make small tensors without naming a device."""

import torch


def without_default_device() -> torch.device:
    """A context, in which tensors are made on the CPU unless their device is named."""
    return torch.device("cpu")
