"""Runs a command on simulated GPUs.

    python test/simgpu/simgpu.py [--libraries DIRECTORY] torchrun --nproc-per-node 4 train.py

The environment says how they are, see core/settings.h: SIMGPU_SEED (0), SIMGPU_PACE (lazy, mixed or
eager; by the seed), SIMGPU_DEVICES (4), SIMGPU_DEVICE_MB (8192), SIMGPU_TRACE=1 and others.
Processes of the command, 64 at most, are one job: their collectives meet, and deadlocks are found
among all of them. A process in which something was found ends with status 70 (a deadlock), 71 (the
host touched device memory), 72 (collectives that differ) or, at its own end, 73 (all else)."""

import argparse
import contextlib
import os
import shutil
import signal
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


def check_built(libraries: Path) -> None:
    """Ends the program with words if the simulator is not there."""
    if not list(libraries.glob("simgpu_aten*.so")):
        sys.exit(
            f"{libraries} has no simulated GPU: `make build-tests` builds it, where torch has CUDA "
            "and a CUDA toolkit is installed"
        )


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--libraries", type=Path, default=LIBRARIES)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    return parser


if __name__ == "__main__":
    arguments = parser().parse_args()
    if not arguments.command:
        parser().error("no command to run")
    check_built(arguments.libraries)
    # The job's directory goes with it then too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(run(arguments.command, arguments.libraries))
