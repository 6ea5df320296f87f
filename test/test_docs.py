"""README, CONTRIBUTING and docs/ tell the truth: code and commands in them run, and the paths,
links, names and messages that they mention exist."""

import ast
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch.distributed.fsdp
import torch.distributed.run
from simgpu import simgpu

import torch_hsdp_ckpt
from examples.demo import __main__ as demo
from examples.demo import train

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
# Those of frameworks run in tests of their own; a reader's own is train.py.
SCRIPTS = [("train.py", [])] + [
    (str(path.relative_to(ROOT)), ["checkpoints"])
    for path in (ROOT / "examples" / "frameworks").glob("*.py")
]
LAST_LINE = "dist.destroy_process_group()\n"

# Runs behind the README's example, on each of its four ranks.
CHECK = """
for parameter in model.parameters():
    mine = parameter.to_local().detach()
    others = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(others, mine, group=mesh.get_group("replicate"))
    assert all(torch.equal(mine, other) for other in others), "replicas differ"

def run_block(page, code):
    exec(compile(code, page, "exec"), pages.setdefault(page, dict(globals())))

pages = {}
"""


class Block(NamedTuple):
    page: str  # relative to the root
    language: str
    text: str


def blocks(language: str) -> list[Block]:
    """Returns the fenced blocks of all pages that are in ``language``."""
    found = []
    for page in PAGES:
        fences = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
        found += [Block(str(page.relative_to(ROOT)), name, text) for name, text in fences]
    assert {block.language for block in found} <= {"python", "bash", "text"}
    return [block for block in found if block.language == language]


def commands() -> list[str]:
    """Returns each command once: continued lines joined, comments off."""
    lines: dict[str, None] = {}
    for block in blocks("bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                lines[shlex.join(words).replace("'&&'", "&&")] = None
    return list(lines)


# ---- code ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def examples_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs the README's example on four ranks, and behind it every other page's code, each page's
    blocks one after the other. Returns the directory that they have run in."""
    directory = tmp_path_factory.mktemp("docs")
    example, *others = blocks("python")
    assert example.page == "README.md" and example.text.endswith(LAST_LINE)
    calls = "".join(f"run_block({block.page!r}, {block.text!r})\n" for block in others)
    program = example.text.removesuffix(LAST_LINE) + CHECK + calls + LAST_LINE
    (directory / "train.py").write_text(program)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc-per-node", "4", "train.py"]
    run = subprocess.run(launch, cwd=directory, capture_output=True, text=True, timeout=180)
    assert run.returncode == 0, run.stderr
    return directory


def test_examples_run_under_torchrun(examples_directory: Path) -> None:
    assert (examples_directory / "checkpoint" / ".metadata").is_file()
    assert len(list((examples_directory / "checkpoint").glob("*.distcp"))) == 4
    assert sorted(path.name for path in (examples_directory / "run").iterdir()) == [
        f"step-{step:06}" for step in (800, 900, 1000)
    ]


# ---- commands ------------------------------------------------------------------------------------
def _run(command: list[str], directory: Path = ROOT) -> str:
    run = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, f"{shlex.join(command)}\n{run.stdout}{run.stderr}"
    return run.stdout


def _check_make(words: list[str]) -> None:
    _run(["make", "--dry-run", *words[1:]])


def _check_torchrun(words: list[str]) -> None:
    """Both command lines are parsed: torchrun's, and the script's behind it. The demo's own tests
    run the latter; the README's example runs in a test of this file."""
    options = torch.distributed.run.get_args_parser().parse_args(words[1:])
    if options.training_script == "torch_hsdp_ckpt.compat":
        script, *arguments = options.training_script_args
        assert options.module and (script, arguments) in SCRIPTS
    elif options.module:
        assert options.training_script == train.__name__
        train.parse(options.training_script_args)
    else:
        assert (options.training_script, options.training_script_args) == ("train.py", [])


def _functions(path: Path) -> list[str]:
    body = ast.parse(path.read_text()).body
    return [node.name for node in body if isinstance(node, ast.FunctionDef)]


def _check_pytest(words: list[str]) -> None:
    """The file has tests whose names hold the word behind -k; they run in their own file."""
    path, option, word = words[3:]
    names = [name for name in _functions(ROOT / path) if name.startswith("test_")]
    assert option == "-k" and any(word in name for name in names)


def _check_simgpu(words: list[str]) -> None:
    """What stands behind the program is a command of its own; test_simgpu.py runs some."""
    command = simgpu.parser().parse_args(words[2:]).command
    assert words[2:] == command
    (_check_torchrun if command[0] == "torchrun" else _check_pytest)(command)


def _check_ctest(words: list[str]) -> None:
    """A test of this name is in the sources; which build folders there are is the reader's."""
    sources = [*(ROOT / "test/cpp").glob("*.cpp"), *(ROOT / "test/catch2").glob("*.cpp")]
    name = words[words.index("-R") + 1]
    assert any(name in source.read_text() for source in sources), name


def _check_environment(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert words == [".", ".venv/bin/activate"] and "VENV ?= .venv\n" in makefile


def _check_setup(words: list[str]) -> None:
    variable = words[0].partition("=")[0]
    assert f'"{variable}"' in (ROOT / "setup.py").read_text()
    _run([sys.executable, *words[2:], "--help"])


def _check_demo(words: list[str]) -> None:
    demo.parser().parse_args(words[3:])


def _check_pip(words: list[str]) -> None:
    """The build is asked for the package's metadata, which shows that its tools are there."""
    _run([sys.executable, "-m", *words, "--dry-run", "--quiet", "--no-deps"])


PARSED: dict[str, Callable[[list[str]], None]] = {
    "make": _check_make,
    ". .venv/bin/activate": _check_environment,
    "torchrun": _check_torchrun,
    "python -m pytest": _check_pytest,
    "python test/simgpu/simgpu.py": _check_simgpu,
    "ctest": _check_ctest,
    "HSDP_CKPT_TESTS=1 python setup.py": _check_setup,
    "python -m examples.demo": _check_demo,
    "pip install": _check_pip,
}
# Those that other tests of this file run.
BENCH = ("python test/bench/run.py", "python test/bench/plot.py")
RUN_BELOW = ("hsdp-ckpt", "python -c", "cmake", *BENCH)


def _rule(command: str) -> Callable[[list[str]], None] | None:
    matching = [check for start, check in PARSED.items() if command.startswith(start)]
    return matching[0] if matching else None


@pytest.mark.parametrize("command", [c for c in commands() if not c.startswith(RUN_BELOW)])
def test_a_command_is_what_its_program_takes(command: str) -> None:
    check = _rule(command)
    assert check is not None, f"no rule says how to check: {command}"
    check(shlex.split(command))


def _beginning(start: str) -> list[str]:
    found = [command for command in commands() if command.startswith(start)]
    assert found, start
    return found


def test_hsdp_ckpt_reads_the_example(examples_directory: Path) -> None:
    program = str(ROOT / "torch_hsdp_ckpt" / "hsdp-ckpt")
    for command in _beginning("hsdp-ckpt"):
        assert _run([program, *shlex.split(command)[1:]], examples_directory)


def test_python_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for command in _beginning("python -c"):
        assert "crc32" in _run([sys.executable, *shlex.split(command)[1:]], tmp_path)


def test_the_core_is_configured_as_the_page_says(tmp_path: Path) -> None:
    for command in _beginning("cmake"):
        configure, _, build = command.partition(" && ")
        assert "-B build/core" in configure and build == "ninja -C build/core"
        _run(shlex.split(configure.replace("build/core", str(tmp_path))))
        assert _run(["ninja", "-C", str(tmp_path), "-n"])


def test_benchmarks_of_the_pages_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "test" / "bench"))
    import run as bench

    started: list[str] = []
    monkeypatch.setattr(bench, "BENCHMARKS", dict.fromkeys(bench.BENCHMARKS, lambda args: ""))
    monkeypatch.setattr(bench, "publish", lambda name, body: started.append(name))
    for command in _beginning("python test/bench/run.py"):
        monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
        bench.main()
    assert set(started) == set(bench.BENCHMARKS)


def test_the_picture_shows_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """``python test/bench/plot.py`` draws it anew."""
    monkeypatch.syspath_prepend(str(ROOT / "test" / "bench"))
    import plot

    assert plot.PICTURE.read_text() == plot.draw()


def test_targets_named_in_sentences_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"`make ([\w-]+)", page.read_text())}
    assert named and named <= targets


# ---- links, paths, names, messages ---------------------------------------------------------------
def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"[\s-]+", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


PATH = re.compile(r"`((?:csrc|torch_hsdp_ckpt|test|docs|examples)/[\w./*-]*)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_exist(page: Path) -> None:
    missing = [path for path in PATH.findall(page.read_text()) if not any(ROOT.glob(path))]
    assert not missing


def test_every_public_name_is_documented() -> None:
    page = (ROOT / "docs" / "reference.md").read_text()
    from_docstrings = re.findall(r"^::: torch_hsdp_ckpt\.(\w+)$", page, re.MULTILINE)
    by_hand = re.findall(r"^### (\w+)$", page, re.MULTILINE)
    torchs = re.findall(r"`(\w+)`", page.partition("## Torch's own names")[2])
    torchs = [name for name in torchs if name[0].isupper()]
    assert sorted([*from_docstrings, *by_hand, *torchs]) == sorted(torch_hsdp_ckpt.__all__)
    for name in torchs:
        assert getattr(torch_hsdp_ckpt, name) is getattr(torch.distributed.fsdp, name)
    for name in from_docstrings:
        assert inspect.getdoc(getattr(torch_hsdp_ckpt, name)), name


def _python_strings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _source_strings() -> str:
    """Returns the text of the package's string literals, joined where the compilers join them."""
    python = [s for p in (ROOT / "torch_hsdp_ckpt").rglob("*.py") for s in _python_strings(p)]
    sources = [p.read_text() for p in (ROOT / "csrc").rglob("*.*") if p.suffix in (".h", ".cpp")]
    return "\n".join([*python, *(re.sub(r'"\s*"', "", text) for text in sources)])


def test_messages_of_the_troubleshooting_page_are_the_packages() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    cells = re.findall(r"^\| (`.*?) \| ", page.partition("## Installing")[2], re.MULTILINE)
    source = _source_strings()
    unknown = [
        message
        for message in re.findall(r"`([^`]+)`", "\n".join(cells))
        if not all(part.strip() in source for part in message.split("..."))
    ]
    assert cells and not unknown
