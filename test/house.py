"""The rules of the house, read from the sources themselves: which room may use which, how long a
function and a line may be, what is in the build. Each check returns the departures, a line each."""

from __future__ import annotations

import ast
import fnmatch
import graphlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "torch_hsdp_ckpt"
TREES = ("csrc", PACKAGE)
"""Where rooms are. A room is named by its path, such as ``csrc/io``."""

FOR_EVERY_ROOM = (f"{PACKAGE}/_C", f"{PACKAGE}/errors")
BRANCHES, LINES, COLUMNS = 15, 60, 100
_BRANCH = (
    ast.If,
    ast.For,
    ast.While,
    ast.ExceptHandler,
    ast.With,
    ast.IfExp,
    ast.comprehension,
    ast.BoolOp,
    ast.Assert,
)


@dataclass(frozen=True)
class Room:
    """A row of the table: the room's path from the root, and the paths of those it may use."""

    path: str
    may_use: frozenset[str]


@dataclass(frozen=True)
class House:
    """A checkout and its rooms."""

    root: Path
    rooms: dict[str, Room]

    def sources(self, *patterns: str) -> Iterator[Path]:
        """Yields the files that match, and none of a build's."""
        for pattern in patterns:
            yield from sorted(self.root.glob(pattern))
            for folder in (*TREES, "test", "examples", "third_party"):
                yield from sorted((self.root / folder).rglob(pattern))

    def name(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix()


Check = Callable[[House], list[str]]


# ---- the table of rooms ----------------------------------------------------------------------


def read_house(root: Path) -> House:
    """Reads the table between ``<!-- rooms -->`` and ``<!-- /rooms -->`` of CONTRIBUTING.md.

    A row is ``| room | may use | what it is for |``. A room under ``may use`` is a path from the
    root, or from the tree (``csrc``, the package) that the row's room is in; "all" and "none" are
    what they say. Raises ValueError where there is no table."""
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- rooms -->(.*)<!-- /rooms -->", text, re.DOTALL)
    if table is None:
        raise ValueError("CONTRIBUTING.md has no table between <!-- rooms --> and <!-- /rooms -->")
    rooms = {}
    for name, may_use in re.findall(r"^\|([^|]*)\|([^|]*)\|", table[1], re.MULTILINE):
        path = name.strip(" `")
        if path.startswith(tuple(f"{tree}/" for tree in TREES)):
            rooms[path] = Room(path, _paths(path, re.findall(r"[\w/]+", may_use)))
    return House(root, rooms)


def _paths(room: str, may_use: list[str]) -> frozenset[str]:
    """Returns the paths that the words under ``may use`` in a room's row stand for."""
    tree = room.partition("/")[0]
    if may_use == ["all"]:
        return frozenset({tree})
    if may_use == ["none"]:
        return frozenset()
    return frozenset(word if word.startswith(TREES) else f"{tree}/{word}" for word in may_use)


def room_of(house: House, path: str) -> Room | None:
    """Returns the innermost room that a path stands in.

    A folder that holds rooms and is none (``checkpoint``) is shared by them: what stands directly
    in it may use what all of them may use. None for what stands in no room at all, such as the
    public modules: they are entrances, which use any room and which no room may use."""
    folders = [path, *(parent.as_posix() for parent in Path(path).parents)]
    for folder in folders:
        if folder in house.rooms:
            return house.rooms[folder]
        inner = [room for room in house.rooms.values() if room.path.startswith(f"{folder}/")]
        if inner and folder not in TREES and folder != ".":
            return Room(folder, frozenset.intersection(*(room.may_use for room in inner)))
    return None


def _may_use(house: House, room: Room, used: str) -> bool:
    """Says whether a room may use what stands at the path ``used``."""
    if used in FOR_EVERY_ROOM:
        return True
    target = room_of(house, used)
    if target is None:
        return False
    if target.path == room.path:
        return True
    if target.path not in house.rooms:
        return room.path.startswith(f"{target.path}/")
    # A room inside a room is the outer one's too (hsdp's classes hand out what hsdp/state makes);
    # import_cycles sees to the direction there.
    own = {room.path} & house.rooms.keys()
    return any(f"{target.path}/".startswith(f"{path}/") for path in own | room.may_use)


def rooms_that_are_not_there(house: House) -> list[str]:
    """The table and the folders agree: each room is a folder, and csrc has no other folder."""
    missing = [path for path in house.rooms if not (house.root / path).is_dir()]
    folders = (house.name(path) for path in (house.root / "csrc").iterdir() if path.is_dir())
    unlisted = [folder for folder in folders if folder not in house.rooms]
    return [f"{path}: in the table, and no folder" for path in missing] + [
        f"{path}: a folder that the table of rooms does not have" for path in unlisted
    ]


# ---- C++ ---------------------------------------------------------------------------------------


def _csrc_files(house: House, *patterns: str) -> Iterator[tuple[Path, Room]]:
    for pattern in patterns:
        for file in sorted((house.root / "csrc").rglob(pattern)):
            room = room_of(house, house.name(file))
            if room is not None:
                yield file, room


def torch_free_rooms(house: House) -> set[str]:
    """Returns the rooms of which csrc/CMakeLists.txt builds the targets that know no torch."""
    text = (house.root / "csrc" / "CMakeLists.txt").read_text(encoding="utf-8")
    lists = re.findall(r"hsdp_ckpt_room_sources\((?:core|cli)_sources ([\w ]+)\)", text)
    return {f"csrc/{name}" for rooms in lists for name in rooms.split()}


def wrong_includes(house: House) -> list[str]:
    """A file includes headers of its own room and of those that the table names; a torch-free room
    includes none of torch's."""
    wrong = []
    torch_free = torch_free_rooms(house)
    for file, room in _csrc_files(house, "*.h", "*.cpp", "*.cu"):
        text = file.read_text(encoding="utf-8")
        for header in re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, re.MULTILINE):
            if not _may_use(house, room, f"csrc/{header}"):
                said = f"includes {header}, which {room.path} may not use"
                wrong.append(f"{house.name(file)}: {said}")
        torch = re.search(r'#\s*include\s+[<"]((?:torch|ATen|c10|pybind11)/[^>"]+)', text)
        if torch is not None and room.path in torch_free:
            wrong.append(f"{house.name(file)}: includes {torch[1]} in a room without torch")
    return wrong


def wrong_namespaces(house: House) -> list[str]:
    """A header's namespace is ``hsdp_ckpt::`` and its room's name."""
    wrong = []
    for file, room in _csrc_files(house, "*.h"):
        text = file.read_text(encoding="utf-8")
        expected = "hsdp_ckpt::" + room.path.removeprefix("csrc/")
        for found in re.findall(r"^namespace (hsdp_ckpt[\w:]*)", text, re.MULTILINE) or ["none"]:
            if found != expected and not found.startswith(f"{expected}::"):
                wrong.append(f"{house.name(file)}: namespace {found} and not {expected}")
    return wrong


def tests_outside_the_build(house: House) -> list[str]:
    """Each ``*_test.cpp`` and ``*_test.cu`` is named or globbed by a CMakeLists.txt above it."""
    test = house.root / "test"
    patterns = [
        (lists.parent.relative_to(test) / path.lstrip("/")).as_posix()
        for lists in test.rglob("CMakeLists.txt")
        for path in re.findall(r"[\w./*]+\.(?:cpp|cu)\b", lists.read_text())
    ]
    files = (file.relative_to(test).as_posix() for file in test.rglob("*_test.c*"))
    left_out = (file for file in files if not any(fnmatch.fnmatch(file, p) for p in patterns))
    return [f"test/{file}: not in the build" for file in sorted(left_out)]


# ---- Python ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Import:
    """One name that a file imports from this package, wherever in the file: ``path`` is that of
    the module, or of the package, that brings it."""

    path: str
    name: str
    line: int


def _module_path(file: Path, root: Path) -> str:
    return file.relative_to(root).with_suffix("").as_posix()


def _is_module(root: Path, path: str) -> bool:
    return any((root / path).with_suffix(end).is_file() for end in (".py", ".pyi"))


def imports(root: Path, file: Path) -> Iterator[Import]:
    """Yields what a file imports of this package, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _import_of(root, alias.name.replace(".", "/"), "", node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").replace(".", "/")
            if node.level:
                folder = file.parents[node.level - 1].relative_to(root).as_posix()
                base = f"{folder}/{base}".rstrip("/")
            for alias in node.names:
                yield from _import_of(root, base, alias.name, node.lineno)


def _import_of(root: Path, base: str, name: str, line: int) -> Iterator[Import]:
    if base.partition("/")[0] != PACKAGE:
        return
    inner = f"{base}/{name}"
    if name and (_is_module(root, inner) or (root / inner).is_dir()):
        yield Import(inner, "", line)
    else:
        yield Import(base, name, line)


def _package_files(house: House) -> list[Path]:
    return sorted((house.root / PACKAGE).rglob("*.py"))


def wrong_imports(house: House) -> list[str]:
    """A module imports from its own room and from those that the table names."""
    wrong = []
    for file in _package_files(house):
        room = room_of(house, house.name(file))
        if room is None:
            continue
        for used in imports(house.root, file):
            if not _may_use(house, room, used.path):
                where = f"{house.name(file)}:{used.line}"
                wrong.append(f"{where}: imports {used.path}, which {room.path} may not use")
    return wrong


def import_cycles(house: House) -> list[str]:
    """No module imports, by others or itself, the module it is imported by; an import in a function
    counts, for it hides a cycle and does not undo it. One cycle is named, if there are any."""
    graph: dict[str, set[str]] = {}
    for file in _package_files(house):
        module = _module_path(file, house.root).removesuffix("/__init__")
        graph[module] = {used.path for used in imports(house.root, file)} - {module}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return ["an import cycle: " + " <- ".join(error.args[1])]
    return []


def private_imports_of_examples(house: House) -> list[str]:
    """Examples import what users may: names of ``__all__``, and the public modules."""
    package = house.root / PACKAGE
    public = {path.stem for path in package.glob("[!_]*.py")}
    names = re.search(r"__all__ = (\[.*?\])", (package / "__init__.py").read_text(), re.DOTALL)
    public_names = set(ast.literal_eval(names[1])) if names else set()
    wrong = []
    for file in sorted((house.root / "examples").rglob("*.py")):
        for used in imports(house.root, file):
            inner = used.path.removeprefix(PACKAGE).lstrip("/")
            if inner not in public if inner else used.name and used.name not in public_names:
                what = f"{used.path}.{used.name}".strip(".")
                wrong.append(f"{house.name(file)}:{used.line}: imports {what}, which is not public")
    return wrong


# ---- sizes -------------------------------------------------------------------------------------


def large_functions(house: House) -> list[str]:
    """No function of the package has more than 15 branches or 60 lines without its docstring,
    unless a comment right above it says why it is simplest so."""
    large: list[str] = []
    for file in _package_files(house):
        large.extend(_large_in(house, file))
    return large


def _large_in(house: House, file: Path) -> Iterator[str]:
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        if lines[first - 2].lstrip().startswith("#"):
            continue
        branches, length = 1 + sum(isinstance(n, _BRANCH) for n in ast.walk(node)), _length(node)
        if branches > BRANCHES or length > LINES:
            where = f"{house.name(file)}:{node.lineno} {node.name}"
            yield f"{where}: {branches} branches, {length} lines"


def _length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    docstring = function.body[0] if ast.get_docstring(function) is not None else None
    end = function.end_lineno or function.lineno
    whole = end - function.lineno + 1
    if docstring is None:
        return whole
    return whole - ((docstring.end_lineno or docstring.lineno) - docstring.lineno + 1)


def long_lines(house: House) -> list[str]:
    """Lines of code have 100 characters at the most."""
    wrong = []
    code = ("*.py", "*.pyi", "*.h", "*.cpp", "*.cu", "*.sh", "CMakeLists.txt", "Makefile")
    for file in house.sources(*code):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            # What a checker is told at the end of a line is no part of what one reads.
            code = re.sub(r"\s*# (type: ignore|noqa)\b.*$", "", line)
            if len(code) > COLUMNS:
                wrong.append(f"{house.name(file)}:{number}: {len(line)} characters")
    return wrong
