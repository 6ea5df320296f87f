"""Builds the C++ side with CMake and hands the extension module to setuptools.

Environment: HSDP_CKPT_CUDA (0: without CUDA, 1: insist on it), TORCH_CUDA_ARCH_LIST,
HSDP_CKPT_TESTS=1 (C++ tests too), HSDP_CKPT_WERROR=1 (warnings are errors), HSDP_CKPT_FETCH=0
(fetch no missing third-party source), HSDP_CKPT_BUILD_DIR (default build/cmake), MAX_JOBS."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, NoReturn

import setuptools
from setuptools import Command, Distribution, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError

from distutils.command.build_scripts import build_scripts  # isort: skip  (setuptools brings it)

ROOT = Path(__file__).resolve().parent
PROGRAM = "hsdp-ckpt"

# Debian 12's own CMake is 3.25.1 and knows no C++20 for nvcc; 3.25.2 is the first that does.
# Without CUDA an older one is enough; CMake itself says so where it is not.
CMAKE_FOR_CUDA = (3, 25, 2)
CMAKE_FOR_CPU = (3, 24)
INSTALL_TOOLS = 'pip install "setuptools>=70.1" "cmake>=3.25.2" ninja'


def _stop(problem: str) -> NoReturn:
    raise SystemExit(f"torch_hsdp_ckpt: {problem}")


def _programs(name: str) -> Iterator[str]:
    """Yields the paths at which a build tool stands, the best place first.

    pip called by its path runs in a virtual environment that nobody activated: the tools that were
    installed beside this interpreter are then not on PATH. They come first, not resolved through
    the link that a virtual environment's interpreter is."""
    places = [str(Path(sys.executable).parent), *os.environ.get("PATH", "").split(os.pathsep)]
    for place in places:
        found = shutil.which(name, path=place)
        if found is not None:
            yield found


def _cmake_version(cmake: str) -> tuple[int, ...]:
    """Returns the version of a CMake, or () for a program that does not answer."""
    try:
        asked = subprocess.run([cmake, "--version"], capture_output=True, text=True, check=False)
    except OSError:  # a script whose interpreter is gone
        return ()
    found = re.search(r"cmake version (\d+)\.(\d+)\.(\d+)", asked.stdout)
    return tuple(int(part) for part in found.groups()) if found else ()


def _find_cmake() -> str:
    """Returns the first CMake that can build with CUDA, else the first that can without."""
    versions = {cmake: _cmake_version(cmake) for cmake in _programs("cmake")}
    for least in (CMAKE_FOR_CUDA, CMAKE_FOR_CPU):
        for cmake, version in versions.items():
            if version >= least:
                return cmake
    seen = [
        f"{cmake} is {'.'.join(map(str, version)) or 'broken'}"
        for cmake, version in versions.items()
    ]
    missing = f"CMake 3.24 or newer is missing ({', '.join(seen) or 'there is none'})"
    _stop(f"{missing}: {INSTALL_TOOLS}")


def _generator(build: Path) -> list[str]:
    """Returns the arguments that name the build tool. A build tree keeps the one it has."""
    cache = build / "CMakeCache.txt"
    if cache.exists() and "CMAKE_GENERATOR:INTERNAL=Ninja" not in cache.read_text():
        return []
    ninja = next(_programs("ninja"), None)
    if ninja is not None:
        # Named, because Ninja may be on PATH as little as CMake is.
        return ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    if shutil.which("make") is None:
        _stop(f"Ninja is missing, and so is make: {INSTALL_TOOLS}")
    return []


def _build_dir() -> Path:
    return Path(os.environ.get("HSDP_CKPT_BUILD_DIR") or ROOT / "build" / "cmake").resolve()


def _jobs() -> int:
    if "MAX_JOBS" in os.environ:
        return int(os.environ["MAX_JOBS"])
    # torch's headers cost about 2 GiB a compiler: memory bounds the jobs as much as cores do.
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(os.cpu_count() or 1, int(gib // 2)))


def _environment() -> dict[str, str]:
    """Returns the environment for CMake: torch's CUDA_HOME names the compiler for it too."""
    env = dict(os.environ)
    cuda_home = env.get("CUDA_HOME") or env.get("CUDA_PATH")
    if cuda_home and "CUDACXX" not in env:
        nvcc = Path(cuda_home) / "bin" / "nvcc"
        if nvcc.exists():
            env["CUDACXX"] = str(nvcc)
    return env


def _options(env: dict[str, str]) -> list[str]:
    options = {
        "Python_EXECUTABLE": sys.executable,
        "HSDP_CKPT_CUDA": env.get("HSDP_CKPT_CUDA") or "AUTO",
        "HSDP_CKPT_TESTS": "ON" if env.get("HSDP_CKPT_TESTS") == "1" else "OFF",
        "HSDP_CKPT_FETCH": "OFF" if env.get("HSDP_CKPT_FETCH") == "0" else "ON",
    }
    # Unset, the build tree keeps what it has: another flag would compile all of it again.
    if "HSDP_CKPT_WERROR" in env:
        options["HSDP_CKPT_WERROR"] = "ON" if env["HSDP_CKPT_WERROR"] == "1" else "OFF"
    return [f"-D{name}={value}" for name, value in options.items()]


def _run(command: list[str], env: dict[str, str]) -> None:
    if subprocess.run(command, env=env, check=False).returncode != 0:
        _stop(f"the build failed and says above why: {' '.join(command[:3])} ...")


class CMakeBuild(build_ext):
    """Configures, builds and installs with CMake where setuptools would compile sources."""

    def build_extension(self, ext: Extension) -> None:
        build = _build_dir()
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        cmake, env = _find_cmake(), _environment()
        configure = ["-S", str(ROOT), "-B", str(build), *_generator(build), *_options(env)]
        install = ["--install", str(build), "--component", "python", "--prefix", str(target)]
        _run([cmake, *configure], env)
        _run([cmake, "--build", str(build), "-j", str(_jobs())], env)
        _run([cmake, *install], env)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        shutil.copy2(_build_dir() / "csrc" / PROGRAM, ROOT / "torch_hsdp_ckpt" / PROGRAM)


class Programs(build_scripts):
    """The command line is a program and no script: it is copied as it is to where pip installs
    scripts."""

    def run(self) -> None:
        self.mkpath(self.build_dir)
        shutil.copy2(_build_dir() / "csrc" / PROGRAM, Path(self.build_dir) / PROGRAM)

    def get_source_files(self) -> list[str]:
        return []


class NoWheels(Command):
    """Stands in for ``bdist_wheel`` where setuptools has none, to say in one line what to do.

    A virtual environment of Python 3.10 or 3.11 begins with such a setuptools, and pip without
    build isolation does not look at what the build requires."""

    user_options: ClassVar[list[tuple[str, str, str]]] = []

    def initialize_options(self) -> None:
        _stop(f"setuptools {setuptools.__version__} cannot make wheels: {INSTALL_TOOLS}")

    def finalize_options(self) -> None: ...

    def run(self) -> None: ...


def _commands() -> dict[str, type[Command]]:
    commands = {"build_ext": CMakeBuild, "build_scripts": Programs}
    try:
        Distribution().get_command_class("bdist_wheel")
    except BaseError:
        commands["bdist_wheel"] = NoWheels
    return commands


setup(
    ext_modules=[Extension("torch_hsdp_ckpt._C", sources=[])],
    scripts=[PROGRAM],
    cmdclass=_commands(),
)
