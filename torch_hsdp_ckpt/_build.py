"""What this installation was built with."""

import torch

_BUILD_AGAIN = (
    "build it again in this environment: pip install --no-build-isolation --force-reinstall "
    "--no-deps ."
)

try:
    from . import _C
except ImportError as error:  # pragma: no cover - depends on the installation
    raise ImportError(
        f"torch_hsdp_ckpt's extension module does not load with torch {torch.__version__}: "
        f"{error}. It is built for one torch version; {_BUILD_AGAIN}"
    ) from error


def build_info() -> dict[str, str]:
    """What is in this build: ``torch`` (the version it was built against), ``cuda`` (toolkit
    version, empty in a CPU-only build), ``cuda_archs``, ``crc32`` (``isa-l`` or ``zlib``) and
    ``compiler``."""
    return _C._build_info()


def _check_torch() -> None:
    built = build_info()["torch"]
    if built.split("+")[0] != torch.__version__.split("+")[0]:
        raise ImportError(
            f"torch_hsdp_ckpt was built for torch {built} and this is torch {torch.__version__}; "
            f"{_BUILD_AGAIN}"
        )


_check_torch()
