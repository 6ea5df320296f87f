"""Files that are exchanged while they are opened, that are all holes, or that are named too often;
and names that are put there to be obeyed, or to be printed."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import memory_of
from small_checkpoints import load_small, save_small

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt import _C
from torch_hsdp_ckpt.checkpoint.storage.metadata import encode_metadata, read_metadata

_EXCHANGE = """
import os, shutil, sys
kind, place, other = sys.argv[1:]
shutil.copy(place, place + ".kept")
while True:
    temporary = place + ".tmp"
    os.symlink(other, temporary) if kind == "link" else os.mkfifo(temporary)
    os.replace(temporary, place)
    shutil.copy(place + ".kept", temporary)
    os.replace(temporary, place)
"""


@pytest.mark.parametrize("kind", ["link", "pipe"])
@pytest.mark.parametrize("which", ["*.distcp", ".metadata"])
def test_what_is_looked_at_is_what_is_read(tmp_path: Path, kind: str, which: str) -> None:
    """Another process exchanges a file, over and over, for a link that leads out or for a pipe."""
    path = tmp_path / "c"
    h.save({"w": torch.ones(8)}, checkpoint_id=path)
    (place,) = path.glob(which)
    outside = tmp_path / "outside"
    outside.write_bytes(place.read_bytes())
    os.utime(outside, (0, 0))
    other = subprocess.Popen([sys.executable, "-c", _EXCHANGE, kind, place, outside])

    def hangs(*_: Any) -> None:
        raise TimeoutError("a load waits for a pipe")

    signal.signal(signal.SIGALRM, hangs)
    outcomes = set()
    try:
        end = time.monotonic() + 1
        while time.monotonic() < end:
            signal.alarm(10)
            try:
                h.load({"w": torch.zeros(8)}, checkpoint_id=path)
                outcomes.add("loaded")
            except (h.CheckpointError, OSError):
                outcomes.add("refused")
    finally:
        signal.alarm(0)
        other.kill()
        other.wait()
    assert outcomes == {"loaded", "refused"}
    assert outside.stat().st_atime == 0


def test_links_inside_the_directory_are_followed(tmp_path: Path) -> None:
    path = save_small(tmp_path / "c")
    for place in (*path.glob("*.distcp"), path / ".metadata"):
        place.rename(path / f"{place.name}.real")
        place.symlink_to(f"{place.name}.real")
    load_small(path)
    assert h.verify(path).ok


def _with_hole(path: Path, size: int) -> None:
    """A stock checkpoint whose object is a file of holes."""
    dcp.save({"w": torch.zeros(4), "o": {"n": 1}}, checkpoint_id=path, no_dist=True)
    metadata = read_metadata(path / ".metadata")
    (path / "__1_0.distcp").write_bytes(b"PK")
    os.truncate(path / "__1_0.distcp", size)
    for index, place in metadata.storage_data.items():
        if index.fqn == "o.n":
            metadata.storage_data[index] = dataclasses.replace(
                place, relative_path="__1_0.distcp", offset=0, length=size
            )
    (path / ".metadata").write_bytes(encode_metadata(metadata))


@pytest.mark.parametrize("size", [1 << 30, 1 << 42])
def test_holes_take_no_memory(tmp_path: Path, size: int) -> None:
    _with_hole(tmp_path, size)

    def load() -> None:
        # Not as damage: what looks so may lie on another tier of storage.
        with pytest.raises(h.CheckpointError, match="a file of holes") as caught:
            h.load({"w": torch.zeros(4), "o": {"n": 0}}, checkpoint_id=tmp_path)
        assert not isinstance(caught.value, h.CorruptCheckpointError)
        assert not h.verify(tmp_path).ok

    assert memory_of(load) < 64 << 20
    os.truncate(tmp_path / ".metadata", 3 << 30)
    with pytest.raises(h.CheckpointError, match="a file of holes"):
        h.load({"w": torch.zeros(4)}, checkpoint_id=tmp_path)


def test_a_record_that_is_named_often_is_read_once(tmp_path: Path) -> None:
    large = torch.zeros(1 << 20)
    for side in (h, dcp):
        path = tmp_path / side.__name__
        side.save({"w": large}, checkpoint_id=path, no_dist=True)
        once = h.verify(path).bytes
        metadata = read_metadata(path / ".metadata")
        ((index, place),) = metadata.storage_data.items()
        entry = metadata.state_dict_metadata["w"]
        for i in range(3000):
            name = f"w{i}"
            metadata.state_dict_metadata[name] = entry
            metadata.storage_data[dataclasses.replace(index, fqn=name)] = place
        (path / ".metadata").write_bytes(encode_metadata(metadata))
        assert h.verify(path).bytes <= once


def test_a_planted_claim_keeps_nobody_out(tmp_path: Path) -> None:
    h.save({"w": torch.ones(8)}, checkpoint_id=tmp_path)
    for number in (10**12, 10**12 + 1, 10**17, 10**18 - 1):
        planted = f".metadata__0_{7:016x}_{1:08x}_{2:08x}_3_4_{number}.distcp.tmp"
        (tmp_path / planted).touch()
        for _ in range(2):
            h.save({"w": torch.ones(8)}, checkpoint_id=tmp_path)
    assert h.verify(tmp_path).ok


def test_names_do_nothing_to_the_terminal(tmp_path: Path) -> None:
    name = "a\u202egnp.exe\x1b[2J\u2066b"
    h.save({name: torch.ones(8)}, checkpoint_id=tmp_path)
    (file,) = tmp_path.glob("*.distcp")
    file.write_bytes(b"x" + file.read_bytes()[1:])
    with pytest.raises(h.CorruptCheckpointError) as caught:
        h.load({name: torch.zeros(8)}, checkpoint_id=tmp_path)
    program = Path(_C.__file__).with_name("hsdp-ckpt")
    shown = subprocess.run([program, "verify", tmp_path], capture_output=True, text=True)
    for text in (str(caught.value), shown.stdout, shown.stderr, repr(h.verify(tmp_path).problems)):
        assert not {"\u202e", "\x1b", "\u2066"} & set(text)
    assert "\\u202e" in str(caught.value)
    assert "\\u202e" in shown.stdout
