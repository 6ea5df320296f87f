"""The build: what it says of itself, and that the type hints tell the truth about the extension
module."""

import ast
import inspect
from pathlib import Path

import torch
from setuptools.config.pyprojecttoml import read_configuration

import torch_hsdp_ckpt
from torch_hsdp_ckpt import _C


def test_build_info_names_this_torch() -> None:
    info = torch_hsdp_ckpt.build_info()
    assert info["torch"] == torch.__version__
    assert info["crc32"] in ("isa-l", "zlib")
    assert set(info) == {"torch", "cuda", "cuda_archs", "crc32", "compiler"}


def test_the_wheel_holds_the_package_alone() -> None:
    pyproject = Path(__file__).resolve().parent.parent / "pyproject.toml"
    packages = read_configuration(pyproject)["tool"]["setuptools"]["packages"]
    assert "torch_hsdp_ckpt.checkpoint.load" in packages
    assert {name.partition(".")[0] for name in packages} == {"torch_hsdp_ckpt"}


def _public(owner: object) -> set[str]:
    return {
        name
        for name in vars(owner)
        if not name.startswith("__") and name != "_pybind11_conduit_v1_"
    }


def test_stub_and_module_agree() -> None:
    """Every name and every method's arguments of `_C.pyi` are the module's, and the other way
    round."""
    stub = ast.parse(Path(inspect.getfile(torch_hsdp_ckpt)).with_name("_C.pyi").read_text())
    functions = {node.name: node for node in stub.body if isinstance(node, ast.FunctionDef)}
    classes = {node.name: node for node in stub.body if isinstance(node, ast.ClassDef)}
    constants = {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)}  # type: ignore[union-attr]
    assert _public(_C) == set(functions) | set(classes) | constants
    for name, node in classes.items():
        members = {child.name for child in node.body if isinstance(child, ast.FunctionDef)}
        members |= {child.target.id for child in node.body if isinstance(child, ast.AnnAssign)}  # type: ignore[union-attr]
        documented = {m for m in members if not m.startswith("__")}
        assert _public(getattr(_C, name)) == documented, name
    for name, node in functions.items():
        # pybind11 writes the signature into the first line of the docstring.
        signature = (getattr(_C, name).__doc__ or "").splitlines()[0]
        for argument in node.args.args:
            assert f"{argument.arg}:" in signature, f"{name}: {argument.arg} not in {signature}"
