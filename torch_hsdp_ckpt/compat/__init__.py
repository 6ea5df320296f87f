"""Programs as they are: ``patch()`` puts this package in the place of torch's own wrappers and
checkpoints, wherever they are known by name."""

from .patch import Patch, Replaced, patch

__all__ = ["Patch", "Replaced", "patch"]
