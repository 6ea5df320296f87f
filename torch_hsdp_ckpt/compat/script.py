"""Runs a program with this package in torch's place. Its main module says that it is this one, so
that whoever starts further processes of it, ``multiprocessing`` or a launcher, runs them so too."""

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any, NamedTuple

from torch_hsdp_ckpt.compat import patch

_PROGRAM = "TORCH_HSDP_CKPT_PROGRAM"  # tells further processes which it is


class Program(NamedTuple):
    """A main module."""

    code: CodeType
    path: str
    package: str

    @staticmethod
    def of_file(path: str) -> "Program":
        with open(path, "rb") as file:
            code = compile(file.read(), path, "exec", dont_inherit=True)
            return Program(code, path, "")

    @staticmethod
    def of_module(name: str) -> "Program":
        """ImportError if there is none that could be run."""
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
        code = getattr(spec and spec.loader, "get_code", lambda _: None)(spec and spec.name)
        if spec is None or code is None or spec.origin is None:
            raise ImportError(f"there is no module {name} that could be run", name=name)
        return Program(code, spec.origin, spec.parent or "")

    def execute(self, main: dict[str, Any]) -> None:
        """``main``: the names of the main module."""
        sys.argv[0] = self.path
        main.update(__file__=self.path, __package__=self.package, __spec__=_MainSpec(self.package))
        exec(self.code, main)


class _MainSpec(ModuleSpec):
    """That of the main module: what ``multiprocessing`` runs in processes that it spawns."""

    def __init__(self, package: str) -> None:
        super().__init__("torch_hsdp_ckpt.compat.script", None, origin=__file__)
        self._package = package

    @property
    def parent(self) -> str:
        """What relative imports of the program's begin at."""
        return self._package


def run(arguments: list[str]) -> None:
    """``arguments``: a script's path, or ``-m`` and a module's name, and what it gets as its
    own."""
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        os.environ[_PROGRAM] = f"module:{arguments[1]}"
    else:
        sys.argv = list(arguments)
        os.environ[_PROGRAM] = f"file:{os.path.abspath(arguments[0])}"
    _run_as_main()


def _run_as_main() -> None:
    main = sys.modules["__main__"] = ModuleType("__main__")
    kind, _, name = os.environ[_PROGRAM].partition(":")
    if not getattr(sys.flags, "safe_path", False):  # Python 3.11's -P
        sys.path[0] = os.getcwd() if kind == "module" else os.path.dirname(os.path.realpath(name))
    _execute_in(main.__dict__)


def _execute_in(main: dict[str, Any]) -> None:
    if os.environ.get("TORCH_HSDP_CKPT", "1") != "0":
        patch()
    kind, _, name = os.environ[_PROGRAM].partition(":")
    program = Program.of_module(name) if kind == "module" else Program.of_file(name)
    program.execute(main)


if __name__ == "__main__":
    _run_as_main()  # a launcher has started it
elif __name__ == "__mp_main__":
    names: dict[str, Any] = {"__name__": __name__}
    _execute_in(names)
    globals().update(names)
