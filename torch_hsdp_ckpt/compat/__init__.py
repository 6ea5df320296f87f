"""Programs as they are: ``patch()`` puts this package in the place of torch's own wrappers and
checkpoints, by their names in the modules that have been imported.

``replacement`` decides a call between the two sides, ``stand_in`` makes what has the name of one of
torch's classes meanwhile, ``patch`` exchanges the names, and ``script`` runs a program so."""

from .patch import Patch, Replaced, patch, unpatch

__all__ = ["Patch", "Replaced", "patch", "unpatch"]
