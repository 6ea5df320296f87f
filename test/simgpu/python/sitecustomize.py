"""Puts the simulator's kernels under torch as soon as it is imported, in every Python process that
``simgpu.py`` has started and their children."""

import atexit
import faulthandler
import importlib.abc
import importlib.machinery
import os
import signal
import sys
import types
from collections.abc import Sequence

_FINDINGS_EXIT = 73  # beside those of core/faults.h
_LIBRARIES = os.environ.get("SIMGPU_LIBRARIES")


class _Loader(importlib.abc.Loader):
    """torch's own loader, and then the simulator's extension."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        self._loader.exec_module(module)
        with _Silence():  # the dispatcher says of the first kernel that it is replaced
            import simgpu_aten
        module.backends.cudnn.enabled = False
        # Fused attention has kernels of its own; the others are composed of simpler ones.
        for fused in ("flash", "mem_efficient", "cudnn"):
            getattr(module.backends.cuda, f"enable_{fused}_sdp")(False)
        atexit.register(_end_by_findings, simgpu_aten)
        _watch_allocator(module, simgpu_aten)


class _Silence:
    def __enter__(self) -> None:
        self._saved = os.dup(2)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.close(null)

    def __exit__(self, *exception: object) -> None:
        os.dup2(self._saved, 2)
        os.close(self._saved)


def _watch_allocator(torch: types.ModuleType, simgpu_aten: types.ModuleType) -> None:
    """The allocator can be watched from when CUDA is initialised on."""
    initialize = torch.cuda._lazy_init

    def initialize_and_watch() -> None:
        initialize()
        if torch.cuda.is_initialized():
            torch.cuda._lazy_init = initialize
            simgpu_aten.watch_allocator()

    torch.cuda._lazy_init = initialize_and_watch


def _end_by_findings(simgpu_aten: types.ModuleType) -> None:
    """A process that would end well is told from one without findings by its status."""
    if simgpu_aten.findings() > 0:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_FINDINGS_EXIT)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


if _LIBRARIES:
    sys.path.append(_LIBRARIES)
    sys.meta_path.insert(0, _Finder())
    # How the simulator shows the Python stacks of a process in a deadlock.
    faulthandler.register(signal.SIGUSR2, all_threads=True, chain=False)
