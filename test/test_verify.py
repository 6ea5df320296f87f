"""``verify`` and the command line: what they report of checkpoints that are whole, damaged or
hostile."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
from small_checkpoints import flipped, load_small, save_small

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt import _C
from torch_hsdp_ckpt.checkpoint.storage.metadata import encode_metadata, read_metadata

PROGRAM = Path(h.__file__).parent / "hsdp-ckpt"


def _run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROGRAM, *arguments], capture_output=True, text=True, timeout=60, env={})


@pytest.mark.parametrize("writer", [h.FileSystemWriter, dcp.FileSystemWriter])
def test_verify_and_the_program_agree(tmp_path: Path, writer: Callable[..., Any]) -> None:
    path = save_small(tmp_path, writer)
    report = h.verify(path)
    assert report.ok and report.problems == [] and report.unchecked == [] and report.leftovers == []
    assert (report.tensors, report.objects, report.files) == (4, 4, 1)
    assert report.bytes > 4 * 520 * 512
    for threads in (1, 5):
        again = h.verify(path, threads=threads)
        assert (again.problems, again.tensors, again.bytes) == ([], report.tensors, report.bytes)
    done = _run("verify", path)
    assert (
        done.returncode == 0
        and "4 tensors and 4 objects in 1 files" in done.stdout
        and "0 problems" in done.stdout
    )
    shown = _run("inspect", path)
    assert shown.returncode == 0 and "large  float32 [520, 512] in 1 chunk" in shown.stdout
    (data,) = path.glob("*.distcp")
    infos = read_metadata(path / ".metadata").storage_data.items()
    large, small = (next(v for i, v in infos if i.fqn == name) for name in ("large", "small"))
    places = [large.offset + large.length // 2, large.offset + large.length // 3]
    if writer is h.FileSystemWriter:
        places.append(small.offset + small.length // 2)
    with flipped(data, places[0], 1), flipped(data, places[1], 1), flipped(data, places[-1], 2):
        report = h.verify(path)
        assert {p.record for p in report.problems} == (
            {"large", "small"} if len(places) == 3 else {"large"}
        )
        assert all(p.file == data.name and data.name not in p.message for p in report.problems)
        assert report.bytes > 0  # a damaged file's are counted too
        assert f"VerifyReport(ok=False, problems={len(report.problems)}," in repr(report)
        done = _run("verify", path)
        assert done.returncode == 1 and f"WRONG      {data.name}: large" in done.stdout
    (path / "__9_0.distcp").write_bytes(b"what a dead save left")
    assert h.verify(path).leftovers == ["__9_0.distcp"]
    (path / ".metadata").unlink()
    assert "no checkpoint is here" in h.verify(path).problems[0].message
    for command in ("verify", "inspect"):
        done = _run(command, path)
        assert done.returncode == 1 and "no checkpoint is here" in done.stdout, command
        assert _run(command, path / "nowhere").returncode == 2, command
    (
        path / ".metadata"
    ).mkdir()  # what the system refuses to read is wrong with the checkpoint, too
    for command in ("verify", "inspect"):
        done = _run(command, path)
        assert done.returncode == 1 and ".metadata" in done.stdout + done.stderr, command


def test_a_checkpoint_that_is_saved_over_meanwhile_is_not_wrong(tmp_path: Path) -> None:
    save_small(tmp_path)
    saves: list[str] = []
    asked = [False]

    def save_over(op: str, path: str) -> int:
        if op == "open" and path.endswith(".distcp") and len(saves) < 3 and not asked[0]:
            asked[0] = True  # what follows are the save's own calls
            saves.append(path)
            save_small(tmp_path)
            asked[0] = False
        return 0

    _C._inject_fault(save_over)
    try:
        report = h.verify(tmp_path, threads=1)
    finally:
        _C._inject_fault(None)
    assert len(saves) == 3 and report.ok and report.files == 1, report.problems
    (tmp_path / ".metadata").write_bytes(b"damaged")
    assert not h.verify(tmp_path).ok


def test_what_the_program_shows_of_hostile_metadata(tmp_path: Path) -> None:
    path = save_small(tmp_path)
    metadata = read_metadata(path / ".metadata")
    metadata.version = "1\x1b[2J\x9b2J\u00e9"
    for info in metadata.storage_data.values():
        info.length = (1 << 63) - 1 - info.offset
    (path / ".metadata").write_bytes(encode_metadata(metadata))
    shown = _run("inspect", path)
    assert shown.returncode == 0 and "format version  1\\x1b[2J\\x9b2J\u00e9\n" in shown.stdout
    assert re.search(r"files +1, 70368744\d{6}\.\d MiB of records", shown.stdout), shown.stdout
    assert _run("verify", path).returncode == 1
    os.truncate(path / ".metadata", 1 << 40)  # of which nearly all is a hole
    with pytest.raises(h.CheckpointError, match=r"\.metadata: \d+ bytes are too many"):
        load_small(path)
    assert "too many" in h.verify(path).problems[0].message
    for command in ("verify", "inspect"):
        done = _run(command, path)
        assert done.returncode == 1 and "too many" in done.stdout + done.stderr, command


def test_the_program_is_installed_as_pip_installs_scripts(tmp_path: Path) -> None:
    built = tmp_path / "build" / "csrc"
    built.mkdir(parents=True)
    shutil.copy2(PROGRAM, built)
    commands = ["egg_info", "-e", tmp_path, "build_scripts", "-d", tmp_path / "b"]
    commands += ["install_scripts", "-b", tmp_path / "b", "-d", tmp_path / "bin"]
    subprocess.run(
        [sys.executable, "setup.py", "-q", *commands],
        check=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"HSDP_CKPT_BUILD_DIR": str(built.parent)},
        timeout=120,
    )
    done = subprocess.run(
        [tmp_path / "bin" / "hsdp-ckpt", "--help"], capture_output=True, text=True, env={}
    )
    assert done.returncode == 0 and "usage" in done.stdout


def test_the_program_says_how_it_is_used(tmp_path: Path) -> None:
    assert "usage" in _run("--help").stdout
    for wrong in (
        [],
        ["verify"],
        ["check", tmp_path],
        ["verify", tmp_path / "none"],
        ["verify", tmp_path, "--threads", "x"],
    ):
        assert _run(*wrong).returncode == 2
    libraries = subprocess.run(["ldd", PROGRAM], capture_output=True, text=True).stdout
    assert "torch" not in libraries and "python" not in libraries
