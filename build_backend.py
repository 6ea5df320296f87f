"""setuptools' PEP 517 backend, which also works with --no-build-isolation where a build tool is
missing.

pip installs [build-system] requires only when it isolates the build. A virtual environment of
Python 3.10 or 3.11 with torch has a setuptools without bdist_wheel and no CMake; what is missing is
then put in a temporary directory for this build alone."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile

from setuptools.build_meta import *  # noqa: F403
from setuptools.dist import Distribution
from setuptools.errors import BaseError as DistutilsError


def _missing() -> list[str]:
    tools = [] if shutil.which("cmake") else ["cmake>=3.24", "ninja"]
    try:
        Distribution().get_command_class("bdist_wheel")
    except DistutilsError:
        tools.append("wheel")
    return tools


if tools := _missing():
    print(
        f"torch_hsdp_ckpt: installing {', '.join(tools)} for this build only",
        file=sys.stderr,
        flush=True,
    )
    where = tempfile.mkdtemp(prefix="torch_hsdp_ckpt-build-")
    atexit.register(shutil.rmtree, where, ignore_errors=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--target",
        where,
    ]
    if subprocess.run([*pip, *tools], stdout=sys.stderr).returncode != 0:
        raise SystemExit(
            "torch_hsdp_ckpt: these build tools are missing and could not be installed: "
            f"{' '.join(tools)}"
        )
    sys.path.insert(0, where)
    os.environ["PATH"] = os.path.join(where, "bin") + os.pathsep + os.environ["PATH"]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [where, os.environ.get("PYTHONPATH")]))
