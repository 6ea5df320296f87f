"""Builds the C++ side with CMake and hands the extension module to setuptools.

Environment: HSDP_CKPT_CUDA (0: without CUDA, 1: insist on it), TORCH_CUDA_ARCH_LIST,
HSDP_CKPT_TESTS=1 (C++ tests too), HSDP_CKPT_WERROR=1 (warnings are errors), HSDP_CKPT_FETCH=0
(fetch no missing third-party source), HSDP_CKPT_BUILD_DIR (default build/cmake), MAX_JOBS."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

from distutils.command.build_scripts import build_scripts  # isort: skip  (setuptools brings it)

ROOT = Path(__file__).resolve().parent
PROGRAM = "hsdp-ckpt"


def _build_dir() -> Path:
    return Path(os.environ.get("HSDP_CKPT_BUILD_DIR") or ROOT / "build" / "cmake").resolve()


def _jobs() -> int:
    if "MAX_JOBS" in os.environ:
        return int(os.environ["MAX_JOBS"])
    # torch's headers cost about 2 GiB a compiler: memory bounds the jobs as much as cores do.
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(os.cpu_count() or 1, int(gib // 2)))


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        cmake = shutil.which("cmake")
        if cmake is None:
            raise SystemExit(
                "torch_hsdp_ckpt: CMake 3.24 or newer is needed to build: pip install cmake ninja"
            )
        env = dict(os.environ)
        cuda_home = env.get("CUDA_HOME") or env.get("CUDA_PATH")
        if cuda_home and "CUDACXX" not in env and (Path(cuda_home) / "bin" / "nvcc").exists():
            env["CUDACXX"] = str(Path(cuda_home) / "bin" / "nvcc")
        build = _build_dir()
        options = {
            "Python_EXECUTABLE": sys.executable,
            "HSDP_CKPT_CUDA": env.get("HSDP_CKPT_CUDA") or "AUTO",
            "HSDP_CKPT_TESTS": "ON" if env.get("HSDP_CKPT_TESTS") == "1" else "OFF",
            "HSDP_CKPT_FETCH": "OFF" if env.get("HSDP_CKPT_FETCH") == "0" else "ON",
        }
        if (
            "HSDP_CKPT_WERROR" in env
        ):  # else as the build tree is: another flag would compile all of it again
            options["HSDP_CKPT_WERROR"] = "ON" if env["HSDP_CKPT_WERROR"] == "1" else "OFF"
        # A build tree keeps its generator; a new one gets Ninja where there is one.
        generator = (
            ["-G", "Ninja"]
            if shutil.which("ninja") and not (build / "CMakeCache.txt").exists()
            else []
        )
        configure = [cmake, "-S", str(ROOT), "-B", str(build), *generator]
        subprocess.run(
            [*configure, *(f"-D{k}={v}" for k, v in options.items())], check=True, env=env
        )
        subprocess.run([cmake, "--build", str(build), "-j", str(_jobs())], check=True, env=env)
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        install = [cmake, "--install", str(build), "--component", "python", "--prefix", str(target)]
        subprocess.run(install, check=True, env=env)

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


setup(
    ext_modules=[Extension("torch_hsdp_ckpt._C", sources=[])],
    scripts=[PROGRAM],
    cmdclass={"build_ext": CMakeBuild, "build_scripts": Programs},
)
