"""Runs a command on simulated GPUs.

    python test/simgpu/simgpu.py [--libraries DIRECTORY] python -m pytest ...

The environment says how they are (``core/settings.h``): SIMGPU_SEED, SIMGPU_PACE, SIMGPU_DEVICES
and so on. Processes of the command are one job: their collectives meet, and deadlocks are found
among all of them."""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
LIBRARIES = HERE.parent.parent / "build" / "cmake" / "test" / "simgpu"


def environment(libraries: Path, shared: str) -> dict[str, str]:
    """That of a process with simulated GPUs, whose job shares the directory ``shared``."""
    out = dict(os.environ)

    def prepend(name: str, value: str) -> None:
        out[name] = os.pathsep.join(filter(None, (value, out.get(name))))

    prepend("LD_LIBRARY_PATH", str(libraries))  # for libcuda.so.1, which torch opens by name
    prepend("PYTHONPATH", str(HERE / "python"))
    out["LD_PRELOAD"] = " ".join(
        filter(None, (str(libraries / "libsimgpu_cuda.so"), out.get("LD_PRELOAD")))
    )
    out["SIMGPU_LIBRARIES"] = str(libraries)
    out["SIMGPU_DIR"] = shared
    out.setdefault("OMP_NUM_THREADS", "1")
    return out


@contextlib.contextmanager
def job(libraries: Path = LIBRARIES) -> Iterator[dict[str, str]]:
    """The environment for the processes of one job, whose directory goes with it."""
    shared = tempfile.mkdtemp(prefix="simgpu_", dir="/dev/shm")
    try:
        yield environment(libraries, shared)
    finally:
        shutil.rmtree(shared, ignore_errors=True)


def run(command: list[str], libraries: Path = LIBRARIES) -> int:
    with job(libraries) as its_environment:
        return subprocess.run(command, env=its_environment, check=False).returncode


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--libraries", type=Path, default=LIBRARIES)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    return parser


if __name__ == "__main__":
    arguments = parser().parse_args()
    sys.exit(run(arguments.command, arguments.libraries))
