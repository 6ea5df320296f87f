"""The rules of the house hold, and each check of them finds what breaks its rule."""

from pathlib import Path

import house
import pytest

ROOT = Path(__file__).resolve().parent.parent
CHECKS = [
    house.rooms_that_are_not_there,
    house.wrong_includes,
    house.wrong_namespaces,
    house.tests_outside_the_build,
    house.wrong_imports,
    house.import_cycles,
    house.private_imports_of_examples,
    house.large_functions,
    house.long_lines,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_house_keeps_its_rule(check: house.Check) -> None:
    departures = check(house.read_house(ROOT))
    assert not departures, "\n".join(departures)


TABLE = """
<!-- rooms -->
| room | may use | what it is for |
|---|---|---|
| `csrc/base` | none | |
| `csrc/io` | base | |
| `csrc/hsdp` | base | |
| `csrc/python` | all | |
| `torch_hsdp_ckpt/common` | none | |
| `torch_hsdp_ckpt/checkpoint/storage` | common | |
| `torch_hsdp_ckpt/checkpoint/load` | common, checkpoint/storage | |
| `torch_hsdp_ckpt/training` | common checkpoint | |
<!-- /rooms -->
"""

GOOD = {
    "CONTRIBUTING.md": TABLE,
    "csrc/CMakeLists.txt": "hsdp_ckpt_room_sources(core_sources base io)\n",
    "csrc/base/error.h": "namespace hsdp_ckpt::base {}\n",
    "csrc/io/file.h": '#include "base/error.h"\nnamespace hsdp_ckpt::io {}\n',
    "csrc/hsdp/unit.h": "#include <ATen/ATen.h>\nnamespace hsdp_ckpt::hsdp {}\n",
    "csrc/python/module.cpp": '#include "hsdp/unit.h"\n#include "io/file.h"\n',
    "test/CMakeLists.txt": "file(GLOB tests ${CMAKE_CURRENT_SOURCE_DIR}/cpp/*.cpp)\n",
    "test/cpp/file_test.cpp": "",
    "torch_hsdp_ckpt/__init__.py": 'from .training.manager import save\n__all__ = ["save"]\n',
    "torch_hsdp_ckpt/errors.py": "",
    "torch_hsdp_ckpt/manager.py": "from .training import manager\n",
    "torch_hsdp_ckpt/common/tensors.py": "from .. import errors\n",
    "torch_hsdp_ckpt/checkpoint/stateful.py": "from ..common import tensors\n",
    "torch_hsdp_ckpt/checkpoint/storage/reader.py": "from ...common.tensors import f\n",
    "torch_hsdp_ckpt/checkpoint/load/load.py": (
        "from .. import stateful\nfrom ..storage.reader import read\n"
    ),
    "torch_hsdp_ckpt/training/manager.py": "from ..checkpoint.load.load import load\n",
    "examples/train.py": "from torch_hsdp_ckpt import save\nimport torch_hsdp_ckpt.manager\n",
}


def built(root: Path, *changes: tuple[str, str]) -> house.House:
    for name, text in {**GOOD, **dict(changes)}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return house.read_house(root)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_good_house_has_no_departures(check: house.Check, tmp_path: Path) -> None:
    assert check(built(tmp_path)) == []


BRANCHY = "def f(x):\n" + "    if x: return 1\n" * 15
NOTED_AND_LONG = f"{'#' * 99} # noqa: E501\n{'#' * 101}"
LONG = "def f(x):\n" + "    x += 1\n" * 60


@pytest.mark.parametrize(
    "check, file, text, says",
    [
        (house.rooms_that_are_not_there, "csrc/attic/a.h", "", "csrc/attic: a folder that"),
        (house.wrong_includes, "csrc/base/a.h", '#include "io/file.h"', "csrc/base may not use"),
        (house.wrong_includes, "csrc/hsdp/a.cpp", '#include "io/file.h"', "csrc/hsdp may not use"),
        (house.wrong_includes, "csrc/io/a.cpp", "#  include <c10/a.h>", "a room without torch"),
        (house.wrong_namespaces, "csrc/io/a.h", "namespace hsdp_ckpt {}", "not hsdp_ckpt::io"),
        (house.wrong_namespaces, "csrc/io/a.h", "struct A {};", "not hsdp_ckpt::io"),
        (house.tests_outside_the_build, "test/more/a_test.cpp", "", "test/more/a_test.cpp"),
        (house.wrong_imports, "torch_hsdp_ckpt/common/a.py", "from ..training import manager", ""),
        (
            house.wrong_imports,
            "torch_hsdp_ckpt/common/a.py",
            "def f():\n    from torch_hsdp_ckpt.checkpoint.load.load import load",
            "common/a.py:2: imports torch_hsdp_ckpt/checkpoint/load/load",
        ),
        (
            house.wrong_imports,
            "torch_hsdp_ckpt/checkpoint/storage/a.py",
            "from ..load import load",
            "torch_hsdp_ckpt/checkpoint/storage may not use",
        ),
        (
            house.wrong_imports,
            "torch_hsdp_ckpt/checkpoint/stateful.py",
            "from .storage import reader",
            "torch_hsdp_ckpt/checkpoint may not use",
        ),
        (house.wrong_imports, "torch_hsdp_ckpt/training/a.py", "from .. import manager", "manager"),
        (
            house.import_cycles,
            "torch_hsdp_ckpt/common/tensors.py",
            "def f():\n    from ..training import manager",
            "an import cycle",
        ),
        (
            house.private_imports_of_examples,
            "examples/a.py",
            "from torch_hsdp_ckpt.training import manager",
            "imports torch_hsdp_ckpt/training/manager, which is not public",
        ),
        (house.private_imports_of_examples, "examples/a.py", "from torch_hsdp_ckpt import f", "f"),
        (house.large_functions, "torch_hsdp_ckpt/common/a.py", BRANCHY, "16 branches"),
        (house.large_functions, "torch_hsdp_ckpt/common/a.py", LONG, "61 lines"),
        (house.long_lines, "test/a.py", NOTED_AND_LONG, "test/a.py:2: 101 characters"),
    ],
)
def test_a_departure_is_found(
    check: house.Check, file: str, text: str, says: str, tmp_path: Path
) -> None:
    (found,) = check(built(tmp_path, (file, text)))
    assert says in found


def test_a_comment_says_why_a_function_is_large(tmp_path: Path) -> None:
    explained = f"# One branch a kind of value: a table would hide the order.\n{BRANCHY}"
    assert house.large_functions(built(tmp_path, ("torch_hsdp_ckpt/common/a.py", explained))) == []


def test_a_house_without_its_table_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"CONTRIBUTING\.md has no table"):
        built(tmp_path, ("CONTRIBUTING.md", "no rooms"))
